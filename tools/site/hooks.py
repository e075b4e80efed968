"""What MkDocs does with each page beyond Markdown: code by reference, figures, measurements, two languages.

Conventions for writers are in CONTRIBUTING.md. The pages stay plain Markdown that also reads well as it is.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import site_code
import site_results
from site_pages import DOCS, MACRO, ROOT, Fence, counterpart, fences, is_chinese

ROOT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
"""Documents beside the sources that are pages of the site, too."""
HOMES = {"README.md": "index.md", "README_zh.md": "zh/index.md"}
"""Documents that have a page of the site in their place."""
log = get_plugin_logger("site")  # a warning fails a strict build
LINK = re.compile(r"(?P<text>\]\()(?P<target>[^)\s#]+)(?P<rest>#[^)\s]*)?(?P<end>[)\s])")
WORDS = {
    '<html lang="en"': '<html lang="zh"',
    "Table of contents\n": "目录\n",
    "\n                Previous\n": "\n                上一页\n",
    "\n                Next\n": "\n                下一页\n",
}
FOLDER = re.compile(r"\[(?P<words>[^\]]*)\]\((?P<target>[^)\s#]+)\)")
IMAGE = re.compile(r"<p>\s*<img (?P<attributes>[^>]*\.svg\"[^>]*)/?>\s*</p>")


def on_files(files: Files, config: Any) -> Files:
    """Add the documents of the root, and each file of the repository that a page links to."""
    for name in ROOT_PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, name.lower(), content=text))
    for file in list(files.documentation_pages()):
        for match in LINK.finditer(_with_macros(file.content_string, file.src_uri)):
            target = _repository_file(file.src_uri, match["target"])
            uri = _copy_uri(target) if target else ""
            if target and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, content=(ROOT / target).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Fill in what a page refers to, before it becomes HTML."""
    uri = page.file.src_uri
    markdown = _with_links(_with_code(_with_macros(markdown, uri), uri), uri)
    other = counterpart(uri)
    if files.get_file_from_path(other) is not None:
        name = "English" if is_chinese(uri) else "中文"
        link = f"\n\n[{name}]({posixpath.relpath(other, posixpath.dirname(uri) or '.')}){{ .language }}\n"
        markdown = re.sub(r"\A(# .*)$", lambda match: match[1] + link, markdown, count=1, flags=re.MULTILINE)
    return markdown


def on_page_content(content: str, /, page: Page, config: Any, files: Files) -> str:
    """Put figures into the page itself, so that they take its colours."""
    return IMAGE.sub(lambda match: _figure(match, page), content)


def on_post_page(output: str, page: Page, config: Any) -> str:
    """Say which language a page is in, also in what the theme writes."""
    if is_chinese(page.file.src_uri):
        for english, chinese in WORDS.items():
            output = output.replace(english, chinese)
    return output


# --- code and figures measured ----------------------------------------------------------------------------


def _with_macros(text: str, uri: str) -> str:
    def value(match: re.Match[str]) -> str:
        try:
            return site_results.evaluate(match[1], is_chinese(uri))
        except site_results.ResultError as error:
            log.warning("%s: %s", uri, error)
            return "?"

    return MACRO.sub(value, text)


def _code(fence: Fence, uri: str) -> str:
    try:
        return site_code.included(fence)
    except site_code.IncludeError as error:
        log.warning("%s: %s", uri, error)
        return "?"


def _with_code(text: str, uri: str) -> str:
    lines = text.splitlines()
    for fence in reversed(list(fences(text))):
        shown = dict(fence.options)
        body = fence.body
        if "include" in shown:
            body = _code(fence, uri)
            shown = {key: value for key, value in shown.items() if key in ("title", "hl_lines")}
            shown.setdefault("title", site_code.title(fence))
        elif "output" in fence.words:
            shown.setdefault("title", "输出" if is_chinese(uri) else "Output")
        language = fence.language or "text"
        if language == "console" and not body.startswith("$ "):
            language = "bash"  # commands alone: highlighted as such
        info = " ".join([language, *(f'{key}="{value}"' for key, value in shown.items())])
        block = [fence.ticks + info, *body.splitlines(), fence.ticks]
        lines[fence.first : fence.last + 1] = [(fence.indent + line).rstrip() for line in block]
    return "\n".join(lines) + "\n"


# --- links ------------------------------------------------------------------------------------------------


def _source(uri: str) -> str:
    """Where a page lies in the repository."""
    return next((name for name in ROOT_PAGES if name.lower() == uri), f"docs/{uri}")


def _target(uri: str, link: str) -> str | None:
    """What a link of a page names, from the root of the repository; None if it leads out of it."""
    if re.match(r"[a-z]+:", link):
        return None
    if link.startswith("/"):
        return link.removeprefix("/")
    return posixpath.normpath(posixpath.join(posixpath.dirname(_source(uri)), link))


def _repository_file(uri: str, link: str) -> str | None:
    """The file outside the documentation that a link names, if it is one."""
    target = _target(uri, link)
    if target is None or target in (*ROOT_PAGES, *HOMES) or target.startswith(("docs/", "..")):
        return None
    return target if (ROOT / target).is_file() else None


def _copy_uri(target: str) -> str:
    """Where the site keeps a copy of a file of the repository: under a name that browsers show as text."""
    return f"files/{target}" if target.endswith((".json", ".txt")) else f"files/{target}.txt"


def _with_links(text: str, uri: str) -> str:
    lines = text.splitlines()
    code = {row for fence in fences(text) for row in range(fence.first, fence.last + 1)}
    for row, line in enumerate(lines):
        if row not in code:
            line = FOLDER.sub(lambda match: _without_folder(match, uri), line)
            lines[row] = LINK.sub(lambda match: _link(match, uri), line)
    return "\n".join(lines) + "\n"


def _without_folder(match: re.Match[str], uri: str) -> str:
    """A link to a folder becomes plain words: the site has pages and files only."""
    target = _target(uri, match["target"])
    return match["words"] if target is not None and (ROOT / target).is_dir() else match[0]


def _link(match: re.Match[str], uri: str) -> str:
    target = _target(uri, match["target"])
    if target is None:
        return match[0]
    if _repository_file(uri, match["target"]):
        address, rest = _copy_uri(target), ""
    elif target in HOMES:
        address, rest = HOMES[target], ""
    elif target in ROOT_PAGES:
        address, rest = target.lower(), match["rest"] or ""
    elif target.startswith("docs/"):
        address, rest = target.removeprefix("docs/"), match["rest"] or ""
    else:
        return match[0]
    relative = posixpath.relpath(address, posixpath.dirname(uri) or ".")
    return f"{match['text']}{relative}{rest}{match['end']}"


# --- figures ----------------------------------------------------------------------------------------------


def _figure(match: re.Match[str], page: Page) -> str:
    attributes = re.findall(r'([\w-]+)="([^"]*)"', match["attributes"])
    values = {name: html.unescape(value) for name, value in attributes}
    path = DOCS / posixpath.normpath(posixpath.join(posixpath.dirname(page.file.url), values["src"]))
    if not path.is_file():
        return match[0]  # MkDocs has warned of it
    drawing = inline_svg(path, values.get("alt", ""))
    caption = values.get("title", "")
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="drawing">{drawing}{below}</figure>'


def inline_svg(path: Path, label: str) -> str:
    """A drawing as part of a page: its own names made unique, its size left to the page."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"\A.*?(?=<svg\b)", "", text, flags=re.DOTALL)
    prefix = path.name.split(".")[0]
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    tag = re.match(r"<svg\b[^>]*>", text)
    if tag is None:
        raise PluginError(f"{path}: no drawing")
    opening = re.sub(r'\s(?:width|height)="[^"]*"', "", tag[0])
    return f'{opening[:-1]} role="img" aria-label="{html.escape(label)}">{text[tag.end() :]}'
