"""Many workers: what each of them costs in a run. They are all one spare machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.provisioning.machine import PATH, Machine
from tests.provisioning.roles import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path, services=True, address="192.0.2.1")
    try:
        yield made
    finally:
        made.close()


def inventory(workers: int) -> str:
    rows = [f"w{n} openquake_address=198.51.100.{n}" for n in range(1, workers + 1)]
    settings = ["ansible_connection=local", "ansible_become=false"]
    settings += ["ansible_python_interpreter=/usr/bin/python3", "openquake_shared_dir=/oq_shared"]
    lines = ["[master]", "m1 openquake_address=192.0.2.1", "[workers]", *rows, "[all:vars]"]
    return "\n".join([*lines, *settings])


def validate(machine: Machine, workers: int) -> float:
    """Return the seconds that all checks take, the first part of every playbook."""
    machine.sh("cat >/tmp/inventory.ini", stdin=inventory(workers))
    env = {
        "PATH": f"{Path(sys.executable).parent}:{PATH}",
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_CACHE_PLUGIN_CONNECTION": f"/tmp/facts-{workers}",
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_FORKS": "4",
        "HOME": "/root",
    }
    playbook = str(ROOT / "playbooks/validate.yml")
    began_s = time.monotonic()
    done = machine.run("ansible-playbook", "-i/tmp/inventory.ini", playbook, env=env)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("failed=0") == workers + 2
    return time.monotonic() - began_s


def test_time_per_worker_does_not_grow(machine: Machine) -> None:
    machine.sh("for n in $(seq 40); do ip address add 198.51.100.$n/32 dev lo; done")
    few_s, many_s = validate(machine, 20) / 20, validate(machine, 40) / 40
    print(f"per worker: {few_s:.2f} s of 20, {many_s:.2f} s of 40")
    assert many_s < 1.3 * few_s
