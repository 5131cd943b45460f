"""Make an administrator's account of the WebUI: ``python -m oq_runtime.webui.account NAME``.

The password comes on stdin. Prints ``made``, or ``there`` for an account that is not touched.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def find(name: str) -> Any:
    """Return the account of a name, None where there is none; Django has been set up."""
    from django.contrib.auth.models import User

    return User.objects.filter(username=name).first()


def make(name: str, password: str) -> None:
    """Make an administrator's account."""
    from django.contrib.auth.models import User

    user = User.objects.create_superuser(name, password=password)
    user.profile.level = 2  # sees all outputs; made with the account by a signal of the engine
    user.profile.save()


def main() -> None:
    os.environ["DJANGO_SETTINGS_MODULE"] = "oq_runtime.webui.settings"
    import django

    django.setup()
    name, password = sys.argv[1], sys.stdin.readline().strip()
    if find(name):
        print("there")
        return
    make(name, password)
    print("made")


if __name__ == "__main__":
    main()
