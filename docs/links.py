"""A hook of the site: pages may link to any file of the checkout, as its readers expect, and the file comes along.

A link is written so that it works where the page lies in the checkout. In the site ``docs/`` is the root, files from
outside of it keep their path, and Markdown among them becomes a page.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
PAGES = ("DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md")


def on_files(files: Files, config: Any) -> Files:
    root = Path(config.config_file_path).parent

    def add(name: str, inclusion: InclusionLevel) -> None:
        files.append(File.generated(config, name, abs_src_path=str(root / name), inclusion=inclusion))

    for name in PAGES:
        add(name, InclusionLevel.INCLUDED)
    for page in list(files.documentation_pages()):
        for link in LINK.findall(page.content_string):
            name = in_site(link, page.src_uri)
            if files.get_file_from_path(name) is None and (root / name).is_file():
                add(name, InclusionLevel.NOT_IN_NAV)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return LINK.sub(lambda match: in_site(match[0], page.file.src_uri), markdown)


def in_site(link: str, page: str) -> str:
    """Where a link of a page, which lies at the root of the site, leads there."""
    folder = "" if page in PAGES else "docs"
    return posixpath.normpath(posixpath.join(folder, link)).removeprefix("docs/")
