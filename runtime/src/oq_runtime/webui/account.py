"""Make an administrator's account of the WebUI: ``python -m oq_runtime.webui.account NAME``.

The password comes on stdin. Prints ``made``, or ``there`` for an account that is not touched.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    os.environ["DJANGO_SETTINGS_MODULE"] = "oq_runtime.webui.settings"
    import django

    django.setup()
    from django.contrib.auth.models import User

    name, password = sys.argv[1], sys.stdin.readline().strip()
    if User.objects.filter(username=name).exists():
        print("there")
        return
    user = User.objects.create_superuser(name, password=password)
    user.profile.level = 2  # sees all outputs; made with the account by a signal of the engine
    user.profile.save()
    print("made")


if __name__ == "__main__":
    main()
