"""``site.yml`` is killed again and again, on hosts that have nothing of the cluster any more."""

from __future__ import annotations

from tests.system.cluster import USERS, Cluster
from tests.system.test_upgrade import OLD

#: of the tasks of a whole run
MOMENTS = (0.2, 0.4, 0.6, 0.75, 0.9)


def test_it_converges(provisioned: Cluster) -> None:
    """The older engine, for the rows about upgrades."""
    provisioned.settings["openquake_engine_version"] = OLD
    for moment in MOMENTS:
        played = provisioned.play("site.yml", kill_after=int(moment * provisioned.tasks))
        assert played.code < 0, f"it had ended before {moment:.0%}: {played}"
    played = provisioned.play("site.yml")
    assert played.code == 0, played
    provisioned.wait_all_up()
    again = provisioned.play("site.yml")
    assert again.total("changed") == 0, again.changed_tasks
    provisioned.submit(USERS[0], provisioned.give_example(USERS[0], "hazard")).complete()
