"""What all lanes share: the count of the attacks that were tried."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

ATTACKS = pytest.StashKey["Attacks"]()


class Attacks:
    """How often somebody tried what he must not be able to do, and how often it worked."""

    def __init__(self) -> None:
        self.attempts = 0
        self.successes = 0

    def tried(self, attempts: int = 1, successes: int = 0) -> None:
        """Count attempts, and those that worked; the test fails at its end if there is one."""
        self.attempts += attempts
        self.successes += successes


def pytest_configure(config: pytest.Config) -> None:
    # in the background of a script, or under nohup, it is ignored, and would be by all that the
    # tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    config.stash[ATTACKS] = Attacks()


@pytest.fixture
def attacks(request: pytest.FixtureRequest) -> Iterator[Attacks]:
    """The attacks of one test, which has to make at least one."""
    own = Attacks()
    yield own
    total = request.config.stash[ATTACKS]
    total.tried(own.attempts, own.successes)
    assert own.attempts, "no attack was tried"
    assert not own.successes, f"{own.successes} of {own.attempts} attacks succeeded"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    total = terminalreporter.config.stash[ATTACKS]
    if total.attempts:
        terminalreporter.write_line(f"attacks: {total.attempts} tried, {total.successes} succeeded")
