"""How often a password may be tried; with a clock of its own."""

from __future__ import annotations

from oq_runtime.webui.logins import (
    ACCOUNT_FAILURES,
    ADDRESS_FAILURES,
    MOST_KEYS,
    WINDOW_SECS,
    Logins,
    network,
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_an_account_waits_after_too_many_failures_from_anywhere() -> None:
    logins = Logins(clock := Clock())
    for number in range(ACCOUNT_FAILURES):
        assert logins.wait_s("alice", "192.0.2.1") == 0
        logins.failed("alice", f"192.0.2.{number}")
        clock.now_s += 1
    assert logins.wait_s("alice", "198.51.100.1") == WINDOW_SECS - ACCOUNT_FAILURES
    assert logins.wait_s("bob", "192.0.2.1") == 0
    clock.now_s += WINDOW_SECS - ACCOUNT_FAILURES
    assert logins.wait_s("alice", "192.0.2.1") == 0


def test_an_address_waits_after_too_many_failures_with_any_names() -> None:
    logins = Logins(Clock())
    for number in range(ADDRESS_FAILURES):
        assert logins.wait_s("alice", "2001:db8::1") == 0
        logins.failed(f"name {number}", f"2001:db8::{number}")
    assert logins.wait_s("alice", "2001:db8::ffff") == WINDOW_SECS
    assert logins.wait_s("alice", "2001:db8:0:1::1") == 0


def test_success_forgets_the_failures_of_the_account_only() -> None:
    logins = Logins(Clock())
    for _ in range(ADDRESS_FAILURES):
        logins.failed("alice", "192.0.2.1")
    logins.succeeded("alice")
    assert logins.wait_s("alice", "192.0.2.2") == 0
    assert logins.wait_s("alice", "192.0.2.1") > 0


def test_memory_is_bounded() -> None:
    logins = Logins(Clock())
    for number in range(3 * MOST_KEYS):
        logins.failed(f"{number}" + "x" * 10_000, f"not an address {number}" + "x" * 10_000)
    for failures in (logins.accounts, logins.addresses):
        assert len(failures.times) == MOST_KEYS
        assert max(map(len, failures.times)) <= 150


def test_network() -> None:
    assert network("192.0.2.1") == "192.0.2.1"
    assert network("2001:db8:1:2:3:4:5:6") == "2001:db8:1:2::/64"
    assert network("") == ""
