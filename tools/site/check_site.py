"""Look through a built site: each link and anchor leads somewhere, and nothing is fetched from a network.

python tools/site/check_site.py build/site
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}
NOT_LOADED = ("canonical", "prev", "next", "alternate", "edit")
"""Relations of `link` that the browser does not follow by itself."""
FETCHED = re.compile(r"(?:url\(|@import )[\"']?(https?:[^\"')]*)")


class Page(HTMLParser):
    """The links and anchors of a page, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in LOADED and LOADED[tag] in values and values.get("rel", "") not in NOT_LOADED:
            self.loaded.append(values[LOADED[tag]])


@cache
def page(path: Path) -> Page:
    """A page, read once."""
    return Page(path)


def problems(site: Path) -> Iterator[str]:
    """What is wrong, a line each."""
    for path in sorted(site.rglob("*.html")):
        name = path.relative_to(site).as_posix()
        if name == "404.html":
            continue
        for target in page(path).loaded:
            if urlsplit(target).scheme not in ("", "data") or target.startswith("//"):
                yield f"{name}: loads {target} from a network"
        for target in [*page(path).links, *page(path).loaded]:
            parts = urlsplit(target)
            if parts.scheme or target.startswith("//"):
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not file.is_file():
                yield f"{name}: {target} is not there"
            elif parts.fragment and file.suffix == ".html":
                anchors = page(file).anchors
                if unquote(parts.fragment) not in anchors and not parts.fragment.startswith("__"):
                    yield f"{name}: {target} has no such anchor"
    for path in sorted(site.rglob("*.css")):
        for target in re.findall(
            r"(?:url\(|@import )[\"']?(https?:[^\"')]*)", path.read_text(encoding="utf-8")
        ):
            yield f"{path.relative_to(site).as_posix()}: loads {target} from a network"


def main() -> int:
    """Print problems; 1 if there are any."""
    site = Path(sys.argv[1])
    found = list(problems(site))
    print("\n".join(found) or f"{len(list(site.rglob('*.html')))} pages, all links lead somewhere")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
