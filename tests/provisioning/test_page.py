"""docs/page.md: each sentence has a role and a test, and these exist."""

from __future__ import annotations

import re

import pytest

from tests.provisioning.roles import ROLES, ROOT

TEXT = (ROOT / "docs/page.md").read_text()
ROWS = [row.strip("| ").split(" | ") for row in TEXT.splitlines() if "::" in row]


def test_all_rows_are_read() -> None:
    assert len(ROWS) == sum(row.startswith("| ") for row in TEXT.splitlines()) - 1
    assert {len(row) for row in ROWS} == {3}


@pytest.mark.parametrize(("roles", "test"), [row[1:] for row in ROWS])
def test_role_and_test_exist(roles: str, test: str) -> None:
    assert {*roles.split(", ")} <= {*ROLES}
    file, _, name = test.strip("`").partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE)
