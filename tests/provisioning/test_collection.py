"""The playbooks and roles as a collection: what is in its archive, and that it does without us."""

from __future__ import annotations

import re
import sys
import tarfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.provisioning.machine import INVENTORY, PATH, Machine
from tests.provisioning.roles import PLAYBOOKS, ROLES, ROOT, ansible, read

pytestmark = pytest.mark.timeout(300)

INFO = yaml.safe_load((ROOT / "galaxy.yml").read_text())
NAME = f"{INFO['namespace']}.{INFO['name']}"
LOCK = ROOT / "constraints/provision.txt"
CONTENT = {"MANIFEST.json", "FILES.json", "README.md", "CHANGELOG.md", "LICENSE", "docs"}
CONTENT |= {"inventory.example.ini", "meta", "playbooks", "roles"}
CONTENT |= {"constraints", "runtime", "examples"}  # which the roles bring to the master


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    done = ansible("ansible-galaxy", "collection", "build", f"--output-path={folder}")
    assert done.returncode == 0, done.stderr
    [file] = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def installed(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    done = ansible("ansible-galaxy", "collection", "install", f"-p{folder}", str(archive))
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "inventory.ini").write_text(INVENTORY)
    return folder


def test_archive_has_what_a_cluster_is_made_of(archive: Path) -> None:
    with tarfile.open(archive) as found:
        names = found.getnames()
    assert {name.split("/")[0] for name in names} == CONTENT
    assert not [name for name in names if "__pycache__" in name or "tests/" in name]
    assert archive.stat().st_size < 1_000_000


def test_version_is_one() -> None:
    version = INFO["version"]
    assert f'version = "{version}"' in (ROOT / "runtime/pyproject.toml").read_text()
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_version_of_ansible_is_the_one_that_is_tried() -> None:
    pinned = re.search(r"^ansible-core==(\d+\.\d+)\.", LOCK.read_text(), re.MULTILINE)
    assert pinned is not None
    version = pinned[1]
    said = {read(name, "meta/main.yml")["galaxy_info"]["min_ansible_version"] for name in ROLES}
    assert said == {version}
    assert f'">={version}.0"' in (ROOT / "meta/runtime.yml").read_text()
    assert f"is version('{version}', '>=')" in (ROOT / "playbooks/inventory.yml").read_text()
    assert f"ansible-core {version}" in (ROOT / "docs/operating.md").read_text()


@pytest.mark.parametrize("what", ["--syntax-check", "--list-tasks"])
def test_playbooks_by_name(installed: Path, what: str) -> None:
    """Without the settings and the roles of the checkout."""
    env = {"ANSIBLE_COLLECTIONS_PATH": str(installed), "ANSIBLE_CONFIG": str(installed / "none")}
    env |= {"ANSIBLE_ROLES_PATH": "/nonexistent"}
    playbooks = {f"{NAME}.{Path(path).stem}" for path in PLAYBOOKS}
    inventory = f"--inventory={installed}/inventory.ini"
    done = ansible("ansible-playbook", inventory, what, *sorted(playbooks), env=env)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path, address="192.0.2.1")
    try:
        made.sh("mkdir /srv/ours; cat >/srv/ours/inventory.ini", stdin=INVENTORY)
        yield made
    finally:
        made.close()


def documented() -> str:
    """Return the ansible.cfg of docs/operating.md."""
    text = (ROOT / "docs/operating.md").read_text()
    found = re.search(r"^    \[defaults\]\n(?:    .+\n)+", text, re.MULTILINE)
    assert found is not None
    return textwrap.dedent(found[0])


def run(machine: Machine, program: str, *args: str) -> str:
    """Run a program of Ansible in a directory of somebody's own; return what it says."""
    env = {"PATH": f"{Path(sys.executable).parent}:{PATH}", "ANSIBLE_NOCOLOR": "1"}
    env |= {"HOME": "/root", "ANSIBLE_COLLECTIONS_PATH": "/srv/collections"}
    command = ("env", "--chdir=/srv/ours", "--unset=ANSIBLE_CONFIG", program)
    done = machine.run(*command, *args, env=env)
    return f"{done.stdout}{done.stderr}\nexit code {done.returncode}"


PLAY = """
- hosts: m1
  roles: [openquake]
  collections: [NAME]
  tasks:
    - ansible.builtin.import_role:
        name: openquake_user
        tasks_from: account.yml
    - ansible.builtin.import_role:
        name: openquake_config
    - ansible.builtin.import_role:
        name: openquake_engine
        tasks_from: validate.yml
    - ansible.builtin.import_role:
        name: openquake_engine
        tasks_from: identify.yml
    - ansible.builtin.import_role:
        name: openquake_verify
        tasks_from: job.yml
    - ansible.builtin.debug:
        msg: "wanted: {{ __openquake_engine_venv }}"
""".replace("NAME", NAME)


@pytest.mark.slow
def test_roles_of_the_installed_collection(machine: Machine, archive: Path) -> None:
    """Account and settings of a machine; locks, runtime and job are found; a check has its say."""
    galaxy = ("ansible-galaxy", "collection")
    run(machine, *galaxy, "build", str(ROOT), "--output-path=/srv/ours")
    said = run(machine, *galaxy, "install", f"/srv/ours/{archive.name}", "-p/srv/collections")
    assert "was installed successfully" in said
    machine.sh("chmod -R a-w /srv/collections; cat >/srv/ours/play.yml", stdin=PLAY)
    said = run(machine, "ansible-playbook", "-i", "inventory.ini", "play.yml")
    assert "wanted: /opt/openquake/venv-3.26.2-" in said, said
    assert machine.sh("id -u openquake") == "880"
    assert "host = 192.0.2.1" in machine.sh("cat /opt/openquake/openquake.cfg")
    assert machine.can("test -e /opt/openquake/verify/job.ini", "openquake")
    command = ("ansible-playbook", "-i", "inventory.ini", f"{NAME}.validate")
    said = run(machine, *command)
    assert "put inject_facts_as_vars = false into the section [defaults]" in said, said
    machine.sh("cat >/srv/ours/ansible.cfg", stdin=documented())
    typo = ("-e", "openquake_shareddir=/data")
    said = run(machine, *command, *typo)
    assert "openquake_shareddir is no setting, did you mean openquake_shared_dir?" in said, said
