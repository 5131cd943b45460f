"""Write docs/variables.md from the argument specifications of the roles.

``python -m tests.provisioning.variables`` writes the file, which a test keeps equal.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tests.provisioning.roles import ROLES, ROOT, options, read

FILE = ROOT / "docs" / "variables.md"
HEAD = """\
# Variables of the roles

Made from the argument specifications of the roles by `python -m tests.provisioning.variables`; do
not edit. Most clusters need only the first table. Set variables in the inventory, those of the
first table in `[all:vars]`: they must be the same for all hosts, but for `openquake_address` and
`openquake_cores`, which belong to one host.
"""


def plain(text: str) -> str:
    """Return a description without Ansible's markup, on one line, fit for a cell of a table."""
    text = re.sub(r"[OV]\((?:[\w.]+#)?([^)]*)\)", r"`\1`", text)
    text = re.sub(r"C\(([^)]*)\)", r"`\1`", text)
    return " ".join(text.split()).replace("|", "\\|")


def cell(value: Any) -> str:
    """Return a default as it would be written in an inventory in YAML."""
    if value is None:
        return ""
    text = " ".join(value.split()) if isinstance(value, str) else json.dumps(value)
    return "`" + (text or '""').replace("|", "\\|") + "`"


def rows(found: dict[str, dict[str, Any]], prefix: str = "") -> list[str]:
    lines = []
    for name, option in found.items():
        description = option["description"]
        kind = option["type"] + (f" of {option['elements']}" if "elements" in option else "")
        text = plain(description if isinstance(description, str) else " ".join(description))
        lines.append(f"| `{prefix}{name}` | {kind} | {cell(option.get('default'))} | {text} |")
        lines += rows(option.get("options", {}), f"{prefix}{name}.")
    return lines


def document() -> str:
    """Return the whole document."""
    parts = [HEAD]
    for role in ROLES:
        spec = read(role, "meta/argument_specs.yml")["argument_specs"]["main"]
        parts.append(f"\n## {role}\n\n{spec['short_description']}.\n")
        if found := options(role):
            table = ["| variable | type | default | meaning |", "|---|---|---|---|", *rows(found)]
            parts.append("\n" + "\n".join(table) + "\n")
    return "".join(parts)


if __name__ == "__main__":
    FILE.write_text(document())
