"""Hosts that do not answer, facts of an earlier run, clocks that differ: a cluster as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.leftovers import wait_for
from tests.provisioning.machines import Machines
from tests.provisioning.roles import failures

pytestmark = pytest.mark.timeout(600)

VALIDATE = "playbooks/validate.yml"
LEAVING = ("playbooks/remove_worker.yml", "-e", "openquake_leaving=w2")
#: of a host whose clock is an hour before the others'
AHEAD = """\
#!/bin/sh
exec /usr/bin/date.real --date='1 hour' "$@"
"""
DATE = "mv /usr/bin/date /usr/bin/date.real; cat >/usr/bin/date; chmod +x /usr/bin/date"
#: the first word from a host comes after more than a minute
SLOW = """\
#!/bin/sh
[ -e /tmp/awake ] || { touch /tmp/awake; sleep 65; }
exec /usr/bin/date.real "$@"
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Machines]:
    made = Machines(tmp_path, openquake_nfs_client_provider="external")
    try:
        yield made
    finally:
        made.close()


@pytest.mark.slow
def test_dead_worker_does_not_stop_the_others(cluster: Machines) -> None:
    done = cluster.play(VALIDATE)
    assert done.returncode == 0, done.stdout
    cluster.cut("w2")
    done = cluster.play(VALIDATE)
    assert done.returncode == 4, done.stdout  # Ansible's code for unreachable hosts
    assert done.stdout.count("failed=0") == 4
    assert done.stdout.count("unreachable=1") == 1
    done = cluster.play(VALIDATE, "--limit=w1")  # by what the others have said last
    assert done.returncode == 0, done.stdout
    cluster.cut("m1")
    done = cluster.play(VALIDATE)
    assert "The master m1 does not answer to Ansible; nothing was changed" in done.stdout


def test_more_cores_than_there_are(cluster: Machines) -> None:
    done = cluster.play(VALIDATE, "-e", "openquake_cores=9999")
    assert done.returncode != 0
    assert "openquake_cores=9999 is more than the" in failures(done.stdout)[0]


def test_clock_that_differs_is_named(cluster: Machines) -> None:
    cluster["w2"].sh(DATE, stdin=AHEAD)
    done = cluster.play(VALIDATE)
    assert done.returncode != 0
    [message] = failures(done.stdout)
    assert re.match(r"The clock here is 3[56]\d\d s", message), message
    assert "fatal: [w2]" in done.stdout


@pytest.mark.slow
def test_slow_way_to_a_host_is_no_clock_that_differs(cluster: Machines) -> None:
    cluster["m1"].sh(DATE, stdin=SLOW)
    done = cluster.play(VALIDATE)
    assert done.returncode == 0, done.stdout


#: a worker whose agent takes long to stop
HELD = """
cat >/usr/bin/drain <<'EOF'
#!/bin/sh
touch /tmp/held
while [ -e /tmp/held ]; do sleep 0.1; done
EOF
chmod +x /usr/bin/drain
printf '[Service]\\nExecStart=sleep infinity\\nExecStop=/usr/bin/drain\\n' \\
    >/etc/systemd/system/openquake-worker.service
systemctl start openquake-worker
"""


@pytest.mark.slow
def test_worker_that_dies_while_it_leaves_is_not_shut_out(cluster: Machines) -> None:
    """It still mounts what the master exports: with /home, nobody could log in there any more."""
    cluster["w2"].sh(HELD)
    process = cluster.start(*LEAVING)
    assert wait_for(lambda: cluster["w2"].can("test -e /tmp/held", "root"), 300)
    cluster.cut("w2")
    cluster["w2"].sh("rm /tmp/held")
    output, _ = process.communicate()
    assert process.returncode != 0 and "PLAY [Prepare the master]" not in output, output


UNITS = """
cd /etc/systemd/system
printf '[Unit]\\nDescription=OpenQuake: /oq of the master when it is used\\n' >oq.automount
printf '[Automount]\\nWhere=/oq\\n' >>oq.automount
printf '[Mount]\\nWhat=tmpfs\\nWhere=/oq\\nType=tmpfs\\n' >oq.mount
mkdir -p /oq
systemctl start oq.mount
"""


@pytest.mark.slow
def test_worker_that_leaves_unmounts_before_the_master_hears_of_it(cluster: Machines) -> None:
    """The run ends there, for the master has died; what comes next would shut the worker out."""
    cluster["w2"].sh(UNITS + HELD)
    process = cluster.start(*LEAVING)
    assert wait_for(lambda: cluster["w2"].can("test -e /tmp/held", "root"), 300)
    cluster.cut("m1")
    cluster["w2"].sh("rm /tmp/held")
    output, _ = process.communicate()
    assert process.returncode != 0, output
    left = "ls /etc/systemd/system | grep -E '^(oq|openquake)' || test -e /oq"
    assert not cluster["w2"].can(left, "root"), output


def test_worker_stays_while_something_is_wrong_with_the_others(cluster: Machines) -> None:
    cluster["w2"].sh(HELD)
    cluster["w1"].sh(DATE, stdin=AHEAD)
    done = cluster.play(*LEAVING)
    assert done.returncode != 0
    assert [message for message in failures(done.stdout) if message.startswith("The clock here")]
    assert cluster["w2"].can("systemctl is-active openquake-worker", "root"), done.stdout
