"""Settings: what is accepted, and what an error names."""

from __future__ import annotations

import pytest

from oq_runtime import config
from oq_runtime.config import Config, check_cores
from oq_runtime.errors import ConfigError


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "available_cores", lambda: 4)
    monkeypatch.delenv("OQ_NUM_CORES", raising=False)


@pytest.mark.parametrize(
    ("text", "cores"), [("1", 1), ("4", 4), (3, 3), ("-1", 4), (-1, 4), (" 2 ", 2)]
)
def test_cores(text: str | int, cores: int) -> None:
    assert check_cores(text) == cores


@pytest.mark.parametrize("text", ["0", "5", "-2", "two", "", "1.5", 0, 5, -2])
def test_wrong_cores_name_the_setting_and_the_range(text: str | int) -> None:
    with pytest.raises(ConfigError) as caught:
        check_cores(text)
    assert str(caught.value) == f"cores={text}: give a number from 1 to 4, or -1 for all cores"


def test_defaults() -> None:
    assert Config.from_section({}) == Config(cores=4, window_bytes=1 << 30)
    assert Config.from_section({"cores": "", "window_mb": ""}) == Config.from_section({})


def test_section() -> None:
    section = {"cores": "2", "window_mb": "3", "code": "import x"}
    assert Config.from_section(section) == Config(cores=2, window_bytes=3 << 20)


@pytest.mark.parametrize(("section", "cores"), [({}, 3), ({"cores": "1"}, 1)])
def test_environment_gives_way_to_the_section(
    monkeypatch: pytest.MonkeyPatch, section: dict[str, str], cores: int
) -> None:
    monkeypatch.setenv("OQ_NUM_CORES", "3")
    assert Config.from_section(section).cores == cores


def test_wrong_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OQ_NUM_CORES", "9")
    with pytest.raises(ConfigError, match=r"cores=9: .* from 1 to 4"):
        Config.from_section({})


@pytest.mark.parametrize("text", ["0", "00", "-1", "1.5", "many", "1 0"])
def test_wrong_window(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_section({"window_mb": text})
    assert str(caught.value) == f"[oq_runtime] window_mb={text}: give a whole number above 0"


def test_digit_that_is_no_number() -> None:
    with pytest.raises(ConfigError):
        Config.from_section({"window_mb": "²"})
