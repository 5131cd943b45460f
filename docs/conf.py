"""How Sphinx makes pages of these files, which can be read as they are, too; see ``make docs``."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

project = "OpenQuake cluster"
copyright = "its authors, AGPL-3.0-or-later"
extensions = ["myst_parser", "sphinxcontrib.mermaid"]
root_doc = "README"
html_theme = "furo"
html_title = project
myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]


def add_contents(_: Sphinx, name: str, source: list[str]) -> None:
    """Put the pages of the index beside each page, in the order of the index."""
    if name == root_doc:
        pages = re.findall(r"\]\((\w[\w-]*)\.md\)", source[0])
        pages = list(dict.fromkeys(pages))
        source[0] += "\n\n".join(["", "```{toctree}\n:hidden:\n" + "\n".join(pages) + "\n```\n"])


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_contents)
