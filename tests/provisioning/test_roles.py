"""What every role must have, and that its parts agree."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.provisioning import variables
from tests.provisioning.roles import ROLES, ROOT, options, read, tasks_of


def test_list_is_complete() -> None:
    assert set(ROLES) == {path.name for path in (ROOT / "roles").iterdir()}
    assert read("openquake", "vars/main.yml")["__openquake_roles"] == ROLES


@pytest.mark.parametrize("role", ROLES)
def test_defaults_equal_the_argument_specification(role: str) -> None:
    specified = {name: option.get("default") for name, option in options(role).items()}
    assert specified == read(role, "defaults/main.yml")


@pytest.mark.parametrize("role", ROLES)
def test_every_variable_is_explained(role: str) -> None:
    bare = [name for name, option in options(role).items() if not option.get("description")]
    assert bare == []


@pytest.mark.parametrize("role", ROLES)
def test_names_have_the_prefix_of_the_role(role: str) -> None:
    names = list(options(role))
    for path in (ROOT / "roles" / role).glob("tasks/*.yml"):
        text = path.read_text()
        names += re.findall(r"^\s*register: (\w+)", text, re.MULTILINE)
    assert [name for name in names if not name.lstrip("_").startswith(role)] == []


@pytest.mark.parametrize("role", ROLES)
def test_readme(role: str) -> None:
    text = (ROOT / "roles" / role / "README.md").read_text()
    assert text.startswith(f"# {role}\n")
    assert "heck mode" in text  # what it does there


def test_table_of_variables_is_up_to_date() -> None:
    made = "python -m tests.provisioning.variables"
    assert variables.FILE.read_text() == variables.document(), f"run {made}"


def test_example_inventory_names_only_variables_that_exist() -> None:
    text = (ROOT / "inventory.example.ini").read_text()
    known = {name for role in ROLES for name in options(role)}
    assert set(re.findall(r"\b(openquake_\w+)=", text)) <= known


def test_only_modules_of_ansible_core() -> None:
    """Enterprise Linux alone may need a collection, and none of these roles does today."""
    pattern = re.compile(r"^\s*(?:- )?(\w+\.\w+\.\w+):", re.MULTILINE)
    files = [*(ROOT / "roles").glob("*/*/*.yml"), *(ROOT / "playbooks").rglob("*.yml")]
    used = {module for path in files for module in pattern.findall(path.read_text())}
    assert {module for module in used if not module.startswith("ansible.builtin.")} == set()


def test_packages_are_installed_in_one_way() -> None:
    """The one that waits for other programs that install."""
    pattern = re.compile(r"ansible\.builtin\.(package|apt|dnf|yum):")
    files = [*(ROOT / "roles").glob("*/tasks/*.yml"), *(ROOT / "playbooks").rglob("*.yml")]
    found = [path for path in files if pattern.search(path.read_text())]
    assert found == [ROOT / "roles/openquake/tasks/package.yml"]
    assert "lock_timeout: 600" in found[0].read_text()


def test_tasks_on_the_controller_are_never_those_of_root() -> None:
    """Whatever the inventory says for all hosts."""
    files = [*(ROOT / "roles").glob("*/tasks/*.yml"), *(ROOT / "playbooks").rglob("*.yml")]
    tasks = [task for path in files for task in tasks_of(yaml.safe_load(path.read_text()))]
    here = [task for task in tasks if task.get("delegate_to") == "localhost"]
    assert len(here) >= 6
    for task in here:
        assert (task["become"], task["vars"]["ansible_become"]) == (False, False), task["name"]


def test_no_host_chooses_a_file_of_the_controller() -> None:
    """What it says of itself could be a path there, of a file that somebody else has written."""
    files = [*(ROOT / "roles").glob("*/*/*.yml"), *(ROOT / "playbooks").rglob("*.yml")]
    names = re.compile(r"(?:include_\w+|import_\w+|src|file|tasks_from|vars_from): *(.*\{\{.*)")
    chosen = {name for path in files for name in names.findall(path.read_text())}
    assert '"{{ openquake_os_family }}.yml"' in chosen
    assert [name for name in chosen if "ansible_facts" in name] == []


def test_no_proxy_is_asked_for_the_hosts_own_services() -> None:
    files = [*(ROOT / "roles").glob("*/tasks/*.yml"), *(ROOT / "playbooks").rglob("*.yml")]
    asked = re.compile(r"ansible\.builtin\.uri:\n(.*?)(?:\n\n|\Z)", re.DOTALL)
    tasks = [task for path in files for task in asked.findall(path.read_text())]
    assert tasks
    assert [task for task in tasks if "use_proxy: false" not in task] == []


def test_requirements_name_the_collection_for_enterprise_linux() -> None:
    found = yaml.safe_load((ROOT / "requirements.yml").read_text())
    assert [collection["name"] for collection in found["collections"]] == ["ansible.posix"]


def test_there_are_no_handlers() -> None:
    """A run that is killed loses them, and the next one, which changes nothing, has none."""
    files = [*(ROOT / "roles").glob("*/tasks/*.yml"), *(ROOT / "playbooks").rglob("*.yml")]
    assert len(files) > 50
    assert [path for path in files if "notify:" in path.read_text()] == []
    assert [*(ROOT / "roles").glob("*/handlers")] == []
