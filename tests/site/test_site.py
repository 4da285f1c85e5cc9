"""The documentation site in a real browser: every page, at the width of a desk and of a phone."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# The browser asks nobody but our server.
ALONE = [
    "--no-sandbox",  # it runs as root in a container
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# Whatever sticks out to the right, other than what scrolls within a box of its own.
STICKING_OUT = """() => {
  const width = document.documentElement.clientWidth;
  if (document.scrollingElement.scrollWidth <= width) return [];
  return [...document.querySelectorAll("main *")]
    .filter((one) => one.getBoundingClientRect().right > width + 1)
    .map((one) => one.outerHTML.slice(0, 120));
}"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a link to a page or a heading that is not there is an error."""
    pytest.importorskip("mkdocs", reason="needs mkdocs, not installed: make docs")
    pytest.importorskip("material", reason="needs mkdocs-material, not installed: make docs")
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    environ = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return directory


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    reason = "needs playwright, not installed: make docs"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    if CHROMIUM is None:
        pytest.skip("needs chromium: scripts/install-test-servers")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=ALONE)
        yield running
        running.close()


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if value and name in ("href", "src"):
                self.links.append(value)
            elif value and name in ("id", "name"):
                self.anchors.add(value)


def pages(site: Path) -> list[str]:
    return sorted(
        path.relative_to(site).as_posix()
        for path in site.rglob("*.html")
        if path.name != "404.html"
    )


def test_every_link_leads_to_a_page_and_a_heading(site: Path) -> None:
    read = functools.lru_cache(maxsize=None)(Page)
    broken = []
    for page in pages(site):
        for link in read(site / page).links:
            parts = urlsplit(urljoin(f"http://here/{page}", link))
            if parts.netloc != "here":
                continue
            target = site / unquote(parts.path).lstrip("/")
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                broken.append(f"{page}: {link}")
            elif parts.fragment and target.suffix == ".html":
                anchors = read(target).anchors
                if unquote(parts.fragment) not in anchors and parts.fragment != "__skip":
                    broken.append(f"{page}: {link}")
    assert not broken


def test_no_page_fetches_anything_from_elsewhere(site: Path) -> None:
    foreign = []
    for page in pages(site):
        text = (site / page).read_text("utf-8")
        for line in text.splitlines():
            if "://" in line and ("<script src=" in line or "stylesheet" in line or "<img" in line):
                foreign.append(f"{page}: {line.strip()[:120]}")
    assert not foreign


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_pages_are_whole_and_quiet(browser: Any, address: str, site: Path, size: Any) -> None:
    """No error on the console, no request that fails, and nothing wider than the window."""
    context = browser.new_context(viewport=size)
    tab = context.new_page()
    noise: list[str] = []
    tab.on("console", lambda said: noise.append(said.text) if said.type == "error" else None)
    tab.on("pageerror", lambda error: noise.append(str(error)))
    tab.on("requestfailed", lambda request: noise.append(f"not fetched: {request.url}"))
    wide: list[str] = []
    # Of the listings of sources, which are all made alike, one will do.
    seen = [page for page in pages(site) if not page.startswith("source/")]
    listings = [page for page in pages(site) if page.startswith("source/")]
    for page in seen + listings[:1]:
        tab.goto(address + page)
        wide += [f"{page}: {one}" for one in tab.evaluate(STICKING_OUT)]
        assert tab.locator("h1").count() >= 1, page
    context.close()
    assert not noise
    assert not wide


def test_a_reader_clicks_from_the_start_to_a_guarantee_and_its_test(
    browser: Any, address: str
) -> None:
    tab = browser.new_page(viewport=DESK)
    tab.goto(address + "index.html")
    tab.get_by_role("link", name="Guarantees").first.click()
    tab.wait_for_url("**/guarantees.html")
    tab.locator("main a[href*='source/tests']").first.click()
    tab.wait_for_url("**/source/tests/**")
    assert tab.locator("main pre").first.is_visible()
    tab.close()


def test_a_reader_finds_a_word_by_searching(browser: Any, address: str) -> None:
    tab = browser.new_page(viewport=DESK)
    tab.goto(address + "index.html")
    tab.locator("input.md-search__input").click()
    tab.keyboard.type("ensure_held")
    found = tab.locator(".md-search-result__item a").first
    found.wait_for()
    found.click()
    tab.wait_for_function("() => location.pathname != '/index.html'")
    assert "ensure_held" in tab.locator("main").inner_text()
    tab.close()
