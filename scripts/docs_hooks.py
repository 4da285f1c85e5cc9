"""What MkDocs does not do by itself for this site.

* Pages are read on a code host, too, so they link to files outside of docs/: sources, tests,
  examples. Each of them gets a page of its own, with its text.
* The changelog is a page of the site.
* Directives for the tests (``<!-- not run: ... -->``) are for the tests alone.
* A page that stands alone in its part of the site needs no list of pages beside it.
* The name of a test may be broken after an underscore, or tables of tests would be too wide.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
_LINK = re.compile(
    r"(?P<start>!?\[(?:[^]\[]|\[[^]]*\])*\]\()(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)"
)
_CODE = re.compile(r"^(?P<fence>[ ]*```).*?^(?P=fence)[ ]*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_DIRECTIVE = re.compile(r"^<!--\s*(?:not run|before):.*?-->\n", re.MULTILINE | re.DOTALL)
# The text of a link, in rendered HTML.
_TEST = re.compile(r"(?<=>)test_\w+(?=</a>)")
_LANGUAGES = {".py": "python", ".yml": "yaml", ".yaml": "yaml", ".toml": "toml", ".sh": "bash"}
# What a page of the site already says.
_PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: Any) -> Files:
    files.append(_made(config, "changelog.md", (ROOT / "CHANGELOG.md").read_text("utf-8")))
    linked: set[str] = set()
    for file in tuple(files.documentation_pages()):
        for _, outside in _links(file.content_string, file.src_uri):
            linked.add(outside)
    for outside in sorted(linked):
        path = ROOT / outside
        if outside not in _PAGES and path.exists():
            files.append(_made(config, _page_of(outside), _listing(path, outside)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown
    markdown = _DIRECTIVE.sub("", markdown)
    for link, outside in _links(markdown, here):
        target = _PAGES.get(outside) or _page_of(outside)
        relative = posixpath.relpath(target, posixpath.dirname(here) or ".")
        # An anchor of a listing has no place on its page.
        anchor = link["anchor"] or "" if outside in _PAGES else ""
        markdown = markdown.replace(link[0], f"{link['start']}{relative}{anchor})")
    return markdown


def on_page_context(context: Any, page: Any, config: Any, nav: Any) -> Any:
    if page.parent is None:
        page.meta.setdefault("hide", []).append("navigation")
    return context


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    return _TEST.sub(lambda name: name[0].replace("_", "_<wbr>"), html)


def _links(markdown: str, here: str) -> list[tuple[re.Match[str], str]]:
    """The links that leave docs/, each with its path from the root of the repository."""
    found = []
    for link in _LINK.finditer(_CODE.sub(_blank, markdown)):
        target = link["target"]
        if ":" in target or target.startswith("/"):
            continue
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(here), target))
        if not path.startswith("docs/"):
            found.append((link, path))
    return found


def _blank(code: re.Match[str]) -> str:
    # The text of a link may be code; only whole blocks can hold what merely looks like a link.
    return code[0] if code["fence"] is None else " " * len(code[0])


def _page_of(path: str) -> str:
    return f"source/{path}.md" if (ROOT / path).is_file() else f"source/{path}/files.md"


def _listing(path: Path, name: str) -> str:
    front = f"---\ntitle: {path.name}\nsearch:\n  exclude: true\n---\n\n# {name}\n\n"
    if path.is_dir():
        names = sorted(one.name for one in path.iterdir() if not one.name.startswith(("_", ".")))
        return front + "".join(f"* `{one}`\n" for one in names)
    text = path.read_text("utf-8")
    fence = "`" * max(4, *(len(run) + 1 for run in re.findall("`+", text) or [""]))
    return f"{front}{fence}{_LANGUAGES.get(path.suffix, 'text')}\n{text}\n{fence}\n"


def _made(config: Any, src_uri: str, text: str) -> File:
    return File.generated(config, src_uri, content=text)
