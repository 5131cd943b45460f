"""What the environment says of the WebUI; without Django."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from oq_runtime.errors import ConfigError
from oq_runtime.webui.site import LOOPBACK, Site, read_key


def test_without_variables_it_is_for_this_machine() -> None:
    site = Site.read({})
    assert (site.key, site.hosts, site.prefix, site.origin, site.proxy) == (
        None, LOOPBACK, "", "", "",
    )  # fmt: skip
    assert site.only_here and not site.secure and site.upload_bytes == 4 << 30


def test_one_address_says_name_prefix_and_scheme() -> None:
    site = Site.read({"OQ_WEBUI_URL": "https://hazard.example:8443/oq/"})
    assert site.hosts == ("hazard.example", *LOOPBACK)
    assert (site.prefix, site.origin) == ("/oq", "https://hazard.example:8443")
    assert site.secure and site.proxy == "127.0.0.1" and not site.only_here
    assert not Site.read({"OQ_WEBUI_URL": "http://10.0.0.1"}).secure
    assert Site.read({"OQ_WEBUI_URL": "https://[fd00::1]/"}).hosts[0] == "[fd00::1]"


def test_others_are_kept() -> None:
    site = Site.read({"OQ_WEBUI_HOSTS": "a.example, b.example,localhost", "OQ_WEBUI_PROXY": "::1",
                      "OQ_WEBUI_UPLOAD_MB": "2", "OQ_WEBUI_SECRET_KEY_FILE": "/k"})  # fmt: skip
    assert site.hosts == ("a.example", "b.example", *LOOPBACK)
    assert site.secure, "a proxy without an address is one with TLS"
    assert (site.proxy, site.upload_bytes, site.key) == ("::1", 2 << 20, Path("/k"))


@pytest.mark.parametrize(
    "url",
    ["hazard.example", "ftp://a.example", "https:///oq", "https://u@a.example", "https://a.example/?q",
     "https://a.example/<str:x>", "https://a.example:port/", "https://a.example//x",
     "https://a.example/o.q"],
)  # fmt: skip
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"OQ_WEBUI_URL=.*as https://hazard.example/oq"):
        Site.read({"OQ_WEBUI_URL": url})


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "4G"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"OQ_WEBUI_UPLOAD_MB=.*whole number of MiB"):
        Site.read({"OQ_WEBUI_UPLOAD_MB": text})


def test_key(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(ConfigError, match="make it with oq-webui --init"):
        read_key(path)
    path.write_text("short")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="give at least 32 characters"):
        read_key(path)
    path.write_text("k" * 40)
    assert read_key(path) == "k" * 40
    path.chmod(0o604)
    with pytest.raises(ConfigError, match="others may read it"):
        read_key(path)
    path.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(path, 12345, 0)
        with pytest.raises(ConfigError, match="is somebody else's"):
            read_key(path)
