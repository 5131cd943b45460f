"""Say how TCP ports of another host answer: ``python3 - HOST PORT...`` prints one JSON object.

``open``: connected; ``refused``: reached, nobody listens; ``timeout``: no answer at all, which is
what a firewall that drops gives. Sent over stdin, so it needs only Python's own library.
"""

import json
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

#: hosts on one bridge answer within a millisecond
LIMIT_SECS = 3.0


def answer(host: str, port: int) -> str:
    try:
        with socket.create_connection((host, port), LIMIT_SECS):
            return "open"
    except TimeoutError:
        return "timeout"
    except ConnectionRefusedError:
        return "refused"


host, ports = sys.argv[1], [int(text) for text in sys.argv[2:]]
with ThreadPoolExecutor(len(ports)) as pool:
    answers = list(pool.map(lambda port: answer(host, port), ports))
print(json.dumps(dict(zip(map(str, ports), answers, strict=True))))
