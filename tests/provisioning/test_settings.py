"""openquake.cfg as the roles write it, read by the engine's parser and by the runtime's."""

from __future__ import annotations

import configparser
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from oq_runtime.config import Config
from oq_runtime.settings import KEYS, ORDERED, Key
from tests.cluster.netns import Net, unavailable
from tests.provisioning.packages import program_of_the_roles
from tests.provisioning.roles import ROOT, ansible, options, read
from tests.provisioning.variables import plain

INVENTORY = """\
[master]
m1 ansible_host=192.0.2.1
[workers]
w1 ansible_host=192.0.2.2
w2 ansible_host=198.51.100.3 openquake_address=192.0.2.3 openquake_cores=16
w3 ansible_host=192.0.2.4 openquake_cores=0
"""
PLAY = """\
- hosts: m1:w2
  gather_facts: false
  connection: local
  roles: [openquake]
  vars_files:
    - {root}/roles/openquake_config/defaults/main.yml
    - {root}/roles/openquake_config/vars/main.yml
    - {root}/roles/openquake_firewall/defaults/main.yml
    - {root}/roles/openquake_firewall/vars/main.yml
  vars:
    ansible_python_interpreter: "{{{{ ansible_playbook_python }}}}"
  tasks:
    - ansible.builtin.template:
        src: {root}/roles/openquake_config/templates/openquake.cfg.j2
        dest: {folder}/openquake.cfg
        mode: "0644"
      run_once: true
    - ansible.builtin.template:
        src: {root}/roles/openquake_firewall/templates/firewall.nft.j2
        dest: {folder}/{{{{ inventory_hostname }}}}.nft
        mode: "0644"
"""


def sections(folder: Path, **settings: object) -> dict[str, dict[str, str]]:
    """Return the rendered openquake.cfg, parsed as the engine parses it."""
    (folder / "inventory.ini").write_text(INVENTORY)
    (folder / "play.yml").write_text(PLAY.format(root=ROOT, folder=folder))
    done = ansible(
        "ansible-playbook",
        "-i",
        str(folder / "inventory.ini"),
        "-e",
        json.dumps(settings),
        str(folder / "play.yml"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(folder / "openquake.cfg", encoding="utf8")
    return {name: dict(parser.items(name)) for name in parser.sections()}


def test_every_parameter_of_the_engines_page(tmp_path: Path) -> None:
    found = sections(tmp_path, openquake_custom_tmp="/scratch")
    assert "sessions" not in (tmp_path / "m1.nft").read_text()  # no metrics are asked for
    assert found["distribution"] == {"oq_distribute": "zmq"}  # serialize_jobs is left as it is
    assert found["directory"] == {"shared_dir": "/home", "custom_tmp": "/scratch"}
    cores = "192.0.2.2 -1, 192.0.2.3 16, 192.0.2.4 0"
    assert found["zworkers"] == {"host_cores": cores, "ctrl_port": "1909"}
    assert found["dbserver"] == {
        "file": "/var/lib/openquake/oqdata/db.sqlite3",
        "listen": "192.0.2.1",
        "host": "192.0.2.1",
        "port": "1908",
        "receiver_host": "192.0.2.1",
        "receiver_ports": "1912-1920",
        "authkey": "file:/etc/openquake/authkey",
    }


@pytest.fixture
def distribute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OQ_DISTRIBUTE", raising=False)


@pytest.mark.usefixtures("distribute")
def test_the_runtime_reads_it(tmp_path: Path) -> None:
    found = sections(
        tmp_path,
        openquake_dbserver_port=11908,
        openquake_receiver_ports="11912-11913",
        openquake_ctrl_port=11909,
        openquake_shared_dir="/oq_shared",
        openquake_runtime={
            "window_mb": 64, "lost_s": 45.5, "speculation": True, "metrics_port": 9680,
        },
        openquake_firewall_metrics_sources=["192.0.2.9"],
    )  # fmt: skip
    assert found["oq_runtime"]["code"] == "import oq_runtime.activate"
    config = Config.from_sections(found)
    assert config.window_bytes == 64 << 20
    assert (config.limits.lost_s, config.limits.speculation) == (45.5, True)
    assert config.metrics_port == 9680
    filter = (tmp_path / "m1.nft").read_text()
    assert "tcp dport 9681-9689 ip saddr { 192.0.2.9 } accept" in filter
    cluster = config.cluster
    assert cluster is not None
    assert cluster.hosts == {"192.0.2.2": -1, "192.0.2.3": 16, "192.0.2.4": 0}
    assert cluster.control_url("192.0.2.3") == "tcp://192.0.2.3:11909"
    assert cluster.dbserver == cluster.receiver_host == "192.0.2.1"
    assert list(cluster.receiver_ports) == [11912, 11913]
    assert cluster.shared_dir == "/oq_shared"
    assert cluster.authkey == "file:/etc/openquake/authkey"


#: listens on the ports of its arguments
LISTEN = """
import socket, sys, time
held = [socket.create_server(("", int(port))) for port in sys.argv[1:]]
print("listening", flush=True)
time.sleep(60)
"""
#: prints which ports of an address are open to it; all at the same time, as a dropped packet is
#: known by the silence alone
PROBE = """
import socket, sys, concurrent.futures
def reached(port):
    try:
        socket.create_connection((sys.argv[1], int(port)), 1).close()
    except OSError:
        return ""
    return port
with concurrent.futures.ThreadPoolExecutor(20) as pool:
    print(*filter(None, pool.map(reached, sys.argv[2:])))
"""
PORTS = {"m1": ["1908", *map(str, range(1912, 1921)), "2049"], "w2": ["1909"]}


def test_the_ports_are_open_for_the_nodes_alone(tmp_path: Path) -> None:
    if reason := unavailable():
        pytest.skip(reason)
    sections(tmp_path)
    nft = program_of_the_roles("nft")
    with Net(("m1", "w1", "w2", "w3", "stranger")) as net:
        for host, ports in PORTS.items():
            done = net.run(host, [*nft, "-f", tmp_path / f"{host}.nft"])
            assert done.returncode == 0, done.stderr
            python = [sys.executable, "-ISc"]
            every = [*ports, "111"]  # where somebody has unmasked rpcbind
            server = net.popen(host, [*python, LISTEN, *every], stdout=subprocess.PIPE)
            assert server.stdout and server.stdout.readline() == "listening\n"

        def opened(source: str, host: str) -> list[str]:
            probe = [*python, PROBE, net.address[host], *PORTS[host], "111"]
            return net.run(source, probe).stdout.split()

        assert opened("w1", "m1") == opened("w3", "m1") == PORTS["m1"]
        assert opened("m1", "w2") == PORTS["w2"]
        assert opened("stranger", "m1") == opened("stranger", "w2") == opened("w1", "w2") == []


def test_secret_is_never_in_it(tmp_path: Path) -> None:
    sections(tmp_path, openquake_authkey="correct-horse-battery-staple")
    assert "battery" not in (tmp_path / "openquake.cfg").read_text()


def test_more_settings_join_the_sections(tmp_path: Path) -> None:
    extra = {"memory": {"pmap_max_mb": 200}, "performance": {"pointsource_distance": 50}}
    found = sections(tmp_path, openquake_config_extra=extra)
    assert found["memory"] == {
        "soft_mem_limit": "90",
        "hard_mem_limit": "99",
        "pmap_max_mb": "200",
    }
    assert found["performance"] == {"pointsource_distance": "50"}


def specified(key: Key) -> dict[str, Any]:
    """What the argument specification of openquake_runtime must say of a key."""
    assert key.meta.description
    found: dict[str, Any] = {
        "type": {bool: "bool", int: "int", float: "float"}.get(key.kind, "str"),
        "description": key.meta.description[0].upper() + key.meta.description[1:] + ".",
    }
    if get_origin(key.kind) is Literal:
        found["choices"] = list(get_args(key.kind))
    return found


def test_the_variable_has_the_keys_of_the_runtime() -> None:
    """But ``code``, which the role sets, and ``cores``, which has no meaning on a cluster."""
    spec = options("openquake")["openquake_runtime"]["options"]
    found = {name: spec[name] | {"description": plain(spec[name]["description"])} for name in spec}
    expected = {name: specified(key) for name, key in KEYS.items() if name not in ("code", "cores")}
    assert found == expected


def test_the_checks_have_the_limits_of_the_runtime() -> None:
    """Before a host is touched there is no runtime to ask."""
    found = read("openquake", "vars/main.yml")
    expected = {}
    for name, key in KEYS.items():
        if key.kind in (int, float) and name != "cores":
            least = f"from {key.meta.ge}" if key.meta.gt is None else f"above {key.meta.gt}"
            expected[name] = [least, key.meta.le or 1_000_000, key.default]
    assert found["__openquake_runtime_ranges"] == expected
    assert found["__openquake_runtime_ordered"] == [list(pair) for pair in ORDERED]
