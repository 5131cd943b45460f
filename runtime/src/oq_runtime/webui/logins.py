"""How often a wrong password may be tried: per account, and per address from which it comes.

Who has tried too often waits until the oldest failure is WINDOW_SECS ago, also with the right
password. What is kept is bounded, whatever names and addresses come.
"""

from __future__ import annotations

import ipaddress
import time
import unicodedata
from collections import OrderedDict, deque
from collections.abc import Callable

#: failures within WINDOW_SECS, of an account and from an address
ACCOUNT_FAILURES, ADDRESS_FAILURES = 10, 30
WINDOW_SECS = 300.0
#: accounts and addresses of which failures are kept; the one that failed longest ago goes first
MOST_KEYS = 10_000
#: characters of a name that are kept; the engine's accounts have at most 150
NAME_CHARACTERS = 150


class Failures:
    """Failed logins by key: an account, or an address.

    :param most: failures of a key within WINDOW_SECS
    :param clock: seconds, monotonic
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self.clock = clock
        self.times: OrderedDict[str, deque[float]] = OrderedDict()

    def add(self, key: str) -> None:
        times = self.times.setdefault(key, deque(maxlen=self.most))
        times.append(self.clock())
        self.times.move_to_end(key)
        if len(self.times) > MOST_KEYS:
            self.times.popitem(last=False)

    def forget(self, key: str) -> None:
        self.times.pop(key, None)

    def wait_s(self, key: str) -> float:
        """Return the seconds until the key may be tried again; 0 when it may now."""
        times = self.times.get(key)
        if times is None or len(times) < self.most:
            return 0.0
        return max(0.0, times[0] + WINDOW_SECS - self.clock())


class Logins:
    """Counts failed logins by account and by address."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.accounts = Failures(ACCOUNT_FAILURES, clock)
        self.addresses = Failures(ADDRESS_FAILURES, clock)

    def failed(self, account: str, address: str) -> None:
        self.accounts.add(name(account))
        self.addresses.add(network(address))

    def succeeded(self, account: str) -> None:
        self.accounts.forget(name(account))

    def wait_s(self, account: str, address: str) -> float:
        return max(
            self.accounts.wait_s(name(account)),
            self.addresses.wait_s(network(address)),
        )


def name(account: str) -> str:
    """Return what counts as one account: a form of Django's takes other spellings for the same."""
    return unicodedata.normalize("NFKC", account[:NAME_CHARACTERS]).strip()


def network(address: str) -> str:
    """Return what counts as one address: of IPv6 the network of a subscriber."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:NAME_CHARACTERS]
    if parsed.version == 4:
        return str(parsed)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
