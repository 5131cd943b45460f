"""Run in place of ``oq_runtime.node.daemon``: the agent of a node that differs in one thing.

    differing.py NAME=VALUE [options of oq-agent]

``protocol=3`` is the version that it speaks; any other name is a field of the facts that it tells.
"""

from __future__ import annotations

import importlib.util
import re
import sys

import msgspec

import oq_runtime.wire


def speak(version: str) -> None:
    """Load the protocol module with another version in it."""
    spec = importlib.util.find_spec("oq_runtime.wire.protocol")
    assert spec and spec.origin
    with open(spec.origin) as file:
        source = file.read()
    pattern, line = r"^PROTOCOL_VERSION = \d+$", f"PROTOCOL_VERSION = {version}"
    source, found = re.subn(pattern, line, source, flags=re.MULTILINE)
    assert found == 1
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = oq_runtime.wire.protocol = module
    exec(compile(source, spec.origin, "exec"), module.__dict__)


def main() -> None:
    name, _, value = sys.argv.pop(1).partition("=")
    if name == "protocol":
        speak(value)
    from oq_runtime import facts
    from oq_runtime.node import daemon

    own = facts.own
    if name != "protocol":
        facts.own = lambda *args: msgspec.structs.replace(own(*args), **{name: value})
    daemon.daemon()


if __name__ == "__main__":
    main()
