"""The WebUI as somebody with a browser meets it: login, upload, log, outputs, download."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.leftovers import wait_for
from tests.system import network
from tests.system.browser import Browser
from tests.system.cluster import EXAMPLES, Cluster
from tests.system.playbooks import ROOT
from tests.system.test_jobs import busy

PORT = 8800
JOB_LIMIT_S, START_LIMIT_S = 900.0, 180.0


def test_a_browser_from_login_to_download(cluster: Cluster, tmp_path: Path) -> None:
    cluster.settings["openquake_webui_enabled"] = True
    cluster.settings["openquake_webui_sources"] = [network.GATEWAY]
    played = cluster.play("site.yml")
    assert played.code == 0, played
    password = cluster.master.out("cat /etc/openquake/webui-admin-password")
    example = ROOT / "examples" / EXAMPLES["hazard"]
    archive = shutil.make_archive(str(tmp_path / "job"), "zip", example)
    jobs = cluster.jobs()

    with Browser(cluster.directory / "browser") as browser:
        browser.open(f"http://{cluster.master.address}:{PORT}/engine/")
        assert "/accounts/login/" in browser.address
        browser.picture("1-login")
        browser.type("input[name=username]", "admin")
        browser.type("input[name=password]", password)
        browser.click("button[type=submit]")
        browser.wait_for("#my-calculations")
        assert browser.address.endswith("/engine/")
        browser.picture("2-calculations")

        browser.type("#hazard_archive", archive)
        browser.wait_for("#calculation_table .btn-log")
        [number] = set(cluster.jobs()) - set(jobs)
        browser.picture("3-uploaded")
        most: dict[str, int] = {}

        def ended() -> bool:
            for name, slots in busy(cluster).items():
                most[name] = max(most.get(name, 0), slots)
            return cluster.jobs()[number] in ("complete", "failed", "aborted")

        browser.click(f"#calculation_table [data-calc-id='{number}'].btn-log")
        browser.until(
            lambda: "Tarsk" in browser.text("body") or "INFO" in browser.text("body"), 120
        )
        browser.picture("4-log")
        browser.until(ended, JOB_LIMIT_S)
        assert cluster.jobs()[number] == "complete"
        assert all(most.get(name) for name in cluster.workers), f"tasks under way: {most}"

        browser.open(f"http://{cluster.master.address}:{PORT}/engine/{number}/outputs")
        browser.wait_for("#my-outputs a")
        assert "Hazard Curves" in browser.text("#my-outputs")
        browser.picture("5-outputs")
        browser.click("#my-outputs a[href*='export_type=csv']")
        browser.until(
            lambda: [*browser.downloads.glob("*.csv"), *browser.downloads.glob("*.zip")], 60
        )


def test_it_is_there_again_after_a_start_of_the_host(cluster: Cluster) -> None:
    assert cluster.settings.get("openquake_webui_enabled"), "the row before has not come to it"
    cluster.master.reboot()
    assert wait_for(lambda: cluster.master.reaches(PORT), START_LIMIT_S, 1.0)
    cluster.wait_all_up()
