"""Settings: what is accepted, and what an error names."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import pwd
import subprocess
import sys
import tempfile

import pytest

from oq_runtime import config
from oq_runtime.config import Config, check_cores
from oq_runtime.core.limits import Limits
from oq_runtime.errors import ConfigError
from oq_runtime.settings import KEYS


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "available_cores", lambda: (4, "all CPUs"))
    for name in ("OQ_NUM_CORES", "OQ_DISTRIBUTE", "OQ_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("text", "cores"), [("1", 1), ("4", 4), (3, 3), ("-1", 4), (-1, 4), (" 2 ", 2)]
)
def test_cores(text: str | int, cores: int) -> None:
    assert check_cores(text) == cores


@pytest.mark.parametrize("text", ["0", "5", "-2", "two", "", "1.5", 0, 5, -2])
def test_wrong_cores_name_the_setting_and_the_range(text: str | int) -> None:
    with pytest.raises(ConfigError) as caught:
        check_cores(text)
    expected = f"cores={text}: give a number from 1 to 4 (all CPUs), or -1 for all of them"
    assert str(caught.value) == expected


def test_defaults() -> None:
    assert Config.from_sections({}) == Config(cores=4, window_bytes=1 << 30)
    empty = {"oq_runtime": {"cores": "", "window_mb": ""}}
    assert Config.from_sections(empty) == Config.from_sections({})


def test_section() -> None:
    section = {"cores": "2", "window_mb": "3", "code": "import x"}
    assert Config.from_sections({"oq_runtime": section}) == Config(cores=2, window_bytes=3 << 20)


@pytest.mark.parametrize(
    ("text", "modules"),
    [("a, b.c,", ("a", "b.c")), ("", ()), (None, ("openquake.calculators.base",))],
)
def test_preload(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    text: str | None,
    modules: tuple[str, ...],
) -> None:
    line = "" if text is None else f"preload = {text}\n"
    (tmp_path / "openquake.cfg").write_text(f"[oq_runtime]\n{line}")
    monkeypatch.setenv("OQ_CONFIG_FILE", str(tmp_path / "openquake.cfg"))
    assert config.read_preload() == modules


def test_log_level() -> None:
    assert Config.from_sections({"oq_runtime": {"log_level": "debug"}}).log_level == "debug"


@pytest.mark.parametrize(("section", "cores"), [({}, 3), ({"cores": "1"}, 1)])
def test_environment_gives_way_to_the_section(
    monkeypatch: pytest.MonkeyPatch, section: dict[str, str], cores: int
) -> None:
    monkeypatch.setenv("OQ_NUM_CORES", "3")
    assert Config.from_sections({"oq_runtime": section}).cores == cores


def test_wrong_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OQ_NUM_CORES", "9")
    with pytest.raises(ConfigError, match=r"cores=9: .* from 1 to 4"):
        Config.from_sections({})


@pytest.mark.parametrize("text", ["0", "00", "-1", "1.5", "many", "1 0"])
def test_wrong_window(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_sections({"oq_runtime": {"window_mb": text}})
    assert (
        str(caught.value)
        == f"[oq_runtime] window_mb={text}: give a whole number of MiB from 1 up to 1000000"
    )


def test_digit_that_is_no_number() -> None:
    with pytest.raises(ConfigError):
        Config.from_sections({"oq_runtime": {"window_mb": "²"}})


# ---- limits


def limits(**section: str) -> Limits:
    return Config.from_sections({"oq_runtime": section}).limits


def test_the_limits_by_default() -> None:
    assert limits() == Limits(
        beat_s=2,
        suspect_s=10,
        lost_s=30,
        no_nodes_limit_s=60,
        memory_soft_percent=80,
        memory_hard_percent=90,
        max_attempts=3,
        task_timeout_s=0,
        speculation=False,
    )


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Limits)])
def test_every_limit_can_be_set(name: str) -> None:
    values = {"beat_s": 0.5, "memory_soft_percent": 85, "memory_hard_percent": 85}
    value = True if name == "speculation" else values.get(name, 12)
    assert getattr(limits(**{name: str(value)}), name) == value


#: a uid that no account has
NOBODYS_UID = 4_000_000
SECONDS = "a number of seconds above 0 up to 1000000"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"beat_s": "0"}, f"beat_s=0: give {SECONDS}"),
        ({"beat_s": "-1"}, f"beat_s=-1: give {SECONDS}"),
        ({"lost_s": "30 s"}, f"lost_s=30 s: give {SECONDS}"),
        ({"no_nodes_limit_s": "nan"}, f"no_nodes_limit_s=nan: give {SECONDS}"),
        ({"no_nodes_limit_s": "inf"}, f"no_nodes_limit_s=inf: give {SECONDS}"),
        (
            {"task_timeout_s": "x"},
            "task_timeout_s=x: give a number of seconds from 0 up to 1000000",
        ),
        ({"max_attempts": "0"}, "max_attempts=0: give a whole number from 1 up"),
        ({"speculation": "2"}, "speculation=2: give on or off"),
        (
            {"memory_hard_percent": "101"},
            "memory_hard_percent=101: give a whole number of per cent from 1 up to 100",
        ),
        ({"log_level": "loud"}, "log_level=loud: give one of debug, info, warning, error"),
        ({"journal_gb": "inf"}, "journal_gb=inf: give a number of GB from 0 up to 1000000"),
        ({"lost": "3"}, "lost is not a setting; did you mean lost_s?"),
        ({"beats_s": "3"}, "beats_s is not a setting; did you mean beat_s?"),
        ({"zzz": "3"}, f"zzz is not a setting; there are {', '.join(KEYS)}"),
        ({"beat_s": "10"}, "suspect_s=10: give more than beat_s, 10"),
        ({"lost_s": "5"}, "lost_s=5: give more than suspect_s, 10"),
        (
            {"memory_soft_percent": "95"},
            "memory_hard_percent=90: give more than memory_soft_percent, 95",
        ),
    ],
)
def test_wrong_limit(section: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        limits(**section)
    assert str(caught.value) == f"[oq_runtime] {message}"


def test_limits_reach_broker_and_agent_unchanged() -> None:
    found = Limits(beat_s=0.5, max_attempts=7)
    assert Limits.from_text(found.as_text()) == found


# ---- the cluster

SECTIONS = {
    "distribution": {"oq_distribute": "zmq"},
    "dbserver": {"host": "192.0.2.1", "receiver_ports": "1912-1920", "authkey": "x" * 20},
    "zworkers": {"host_cores": "192.0.2.2 -1, 192.0.2.3 7", "ctrl_port": "1909"},
    "directory": {"shared_dir": "/oq_shared"},
}


def changed(section: str, **values: str) -> dict[str, dict[str, str]]:
    return SECTIONS | {section: SECTIONS[section] | values}


def test_cluster_of_the_deployment_page() -> None:
    cluster = Config.from_sections(SECTIONS).cluster
    assert cluster is not None
    assert cluster.hosts == {"192.0.2.2": -1, "192.0.2.3": 7}
    assert list(cluster.receiver_ports) == list(range(1912, 1921)), "both ends included"
    assert cluster.receiver_host == "192.0.2.1"
    assert cluster.control_url("192.0.2.2") == "tcp://192.0.2.2:1909"
    assert "x" * 20 not in repr(cluster)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        changed("distribution", oq_distribute="processpool"),
        changed("zworkers", host_cores="127.0.0.1 -1"),
        changed("zworkers", host_cores=""),
    ],
)
def test_no_cluster(sections: dict[str, dict[str, str]]) -> None:
    assert Config.from_sections(sections).cluster is None


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("dbserver", {"host": "127.0.0.1"}, ["receiver_host", "127.0.0.1", "192.0.2.2"]),
        ("dbserver", {"receiver_host": "localhost"}, ["receiver_host", "localhost"]),
        ("dbserver", {"receiver_ports": "1920-1912"}, ["receiver_ports", "above"]),
        ("dbserver", {"receiver_ports": "many"}, ["receiver_ports", "many"]),
        ("zworkers", {"host_cores": "192.0.2.2 two"}, ["host_cores", "192.0.2.2 two"]),
        ("zworkers", {"host_cores": "192.0.2.2 -2"}, ["host_cores", "-2"]),
        ("zworkers", {"host_cores": "192.0.2.2 1,192.0.2.2 2"}, ["host_cores", "twice"]),
        ("zworkers", {"ctrl_port": "0"}, ["ctrl_port", "0"]),
        ("zworkers", {"host_cores": "192.0.2.2 1, fd00::2 -1"}, ["host_cores: fd00::2 is IPv6"]),
        ("dbserver", {"receiver_host": "[fe80::1%eth0]"}, ["receiver_host: [fe80::1%eth0] is"]),
        ("dbserver", {"host": "fd00::1"}, ["[dbserver] host: fd00::1 is IPv6; give an IPv4"]),
        ("dbserver", {"host": "192.0..2"}, ["[dbserver] host: 192.0..2 is neither an address nor"]),
        ("zworkers", {"host_cores": f"{'a' * 64}.b -1"}, ["host_cores: aaa", "neither an address"]),
    ],
)
def test_wrong_cluster(section: str, values: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_sections(changed(section, **values))
    assert all(word in str(caught.value) for word in words), caught.value


def test_files_are_read_in_the_order_of_the_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "openquake.cfg").write_text("[zworkers]\nhost_cores = a 1\nctrl_port = 1\n")
    (tmp_path / "last.cfg").write_text("[zworkers]\nhost_cores = b 2\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OQ_CONFIG_FILE", str(tmp_path / "last.cfg"))
    assert config.read()["zworkers"] == {"host_cores": "b 2", "ctrl_port": "1"}


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_an_account_without_a_home() -> None:
    with pytest.raises(KeyError):
        pwd.getpwuid(NOBODYS_UID)
    code = (
        "import os; from oq_runtime import config; "
        f"os.setuid({NOBODYS_UID}); print(list(config.read()['distribution']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={name: text for name, text in os.environ.items() if name != "HOME"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    assert "oq_distribute" in done.stdout


def test_a_file_that_cannot_be_parsed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "bad.cfg").write_text("nonsense")
    monkeypatch.setenv("OQ_CONFIG_FILE", str(tmp_path / "bad.cfg"))
    with pytest.raises(ConfigError, match=r"bad\.cfg"):
        config.read()


def test_file_that_is_not_utf8(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "openquake.cfg"
    path.write_bytes(b"[oq_runtime]\n# caf\xe9\n")
    monkeypatch.setenv("OQ_CONFIG_FILE", str(path))
    with pytest.raises(ConfigError, match=f"{path} is not UTF-8, at byte 18"):
        config.read()


def test_file_that_cannot_be_read(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "openquake.cfg"
    monkeypatch.setenv("OQ_CONFIG_FILE", str(path))
    with pytest.raises(ConfigError, match=f"OQ_CONFIG_FILE={path}: there is no such file"):
        config.read()
    os.mkfifo(path)
    with pytest.raises(ConfigError, match=f"{path} is not a file, but a pipe"):
        config.read()
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match=f"{path}: Is a directory"):
        config.read()
    monkeypatch.setenv("OQ_CONFIG_FILE", os.devnull)
    assert config.read()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_file_that_others_may_not_read(tmp_path: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        path = pathlib.Path(name, "openquake.cfg")
        path.touch(0o600)
        code = f"import os; from oq_runtime import config; os.setuid({NOBODYS_UID}); config.read()"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"OQ_CONFIG_FILE": str(path)},
            capture_output=True,
            text=True,
        )
    assert f"ConfigError: {path}: Permission denied; its owner must let you" in done.stderr
