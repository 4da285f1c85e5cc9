"""The site and the timeline of the history in a real browser, on a desk and on a phone."""

from __future__ import annotations

import functools
import html
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("site")]  # which is built once

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
# The browser asks nobody but our server.
ALONE = [
    "--no-sandbox",  # it runs as root in a container
    "--disable-gpu",
    "--disable-dev-shm-usage",  # which is small in a container
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
  const found = [...document.querySelectorAll("body *")]
    .filter((one) => one.getBoundingClientRect().right > width + 1)
    .filter((one) => !one.closest("pre, table"))
    .map((one) => one.outerHTML.slice(0, 120));
  return found.length ? found.slice(0, 5) : ["a block of code, or a table"];
}"""
COMMAND = Path(sys.executable).with_name("orchard-infra")


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


class Page:
    def __init__(self, path: Path) -> None:
        # In a listing the quotation marks are escaped.
        text = path.read_text("utf-8")
        self.links = {html.unescape(one) for one in re.findall(r'\b(?:href|src)="([^"]+)"', text)}
        self.anchors = {html.unescape(one) for one in re.findall(r'\b(?:id|name)="([^"]+)"', text)}


class Watch:
    """What a tab complains about, and what it asks others for."""

    def __init__(self, tab: Any, address: str) -> None:
        self.noise: list[str] = []
        self.address = address
        tab.on("console", self.hear)
        tab.on("pageerror", lambda error: self.noise.append(str(error)))
        tab.on("request", self.see)
        tab.on("response", self.judge)

    def hear(self, said: Any) -> None:
        if said.type in ("error", "warning"):
            self.noise.append(f"{said.text} {said.location}")

    def see(self, request: Any) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.noise.append(f"from elsewhere: {request.url}")

    def judge(self, response: Any) -> None:
        if response.status >= 400:
            self.noise.append(f"{response.status}: {response.url}")


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


def test_no_page_shows_a_word_to_the_tests(site: Path) -> None:
    shown = [page for page in pages(site) if not page.startswith("source/")]
    directive = re.compile(r"(?:<|&lt;)!--\s*(?:not run|before):")
    assert not [page for page in shown if directive.search((site / page).read_text("utf-8"))]


def test_pages_are_whole_and_quiet(browser: Any, address: str, site: Path) -> None:
    """No error on the console, nothing from elsewhere, and nothing wider than the window."""
    tab = browser.new_page()
    # Each page would read the whole index of the search, which takes longer than all the rest.
    index = json.loads((site / "search" / "search_index.json").read_text("utf-8"))
    short = json.dumps({**index, "docs": index["docs"][:1]})
    tab.route("**/search_index.json", lambda route: route.fulfill(body=short))
    watch = Watch(tab, address)
    wide: list[str] = []
    # Of the listings of sources, which are all made alike, one will do.
    shown = [page for page in pages(site) if not page.startswith("source/")]
    listings = [page for page in pages(site) if page.startswith("source/")]
    for page in shown + listings[:1]:
        tab.set_viewport_size(DESK)
        tab.goto(address + page)
        assert tab.locator("h1").count() >= 1, page
        for size in (DESK, PHONE):
            tab.set_viewport_size(size)
            wide += [f"{page}, {size}: {one}" for one in tab.evaluate(STICKING_OUT)]
    tab.close()
    assert watch.noise + wide == []


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_the_timeline_of_the_history_is_whole_and_quiet(
    browser: Any, tmp_path: Path, size: Any
) -> None:
    pytest.importorskip("rich", reason="needs the extra cli, not installed")
    timeline = tmp_path / "history.html"
    _write_history(tmp_path / "orchard")
    command = [COMMAND, "history", "--html", timeline]
    environ = {**os.environ, "ORCHARD_INFRA_DIR": str(tmp_path / "orchard")}
    subprocess.run(command, env=environ, check=True)
    tab = browser.new_page(viewport=size)
    watch = Watch(tab, timeline.as_uri())
    tab.goto(timeline.as_uri())
    assert "imagenet" in tab.locator("body").inner_text()
    wide = tab.evaluate(STICKING_OUT)
    tab.close()
    assert watch.noise + wide == []


def _write_history(directory: Path) -> None:
    """The runs of the picture in the documentation."""
    path = ROOT / "scripts" / "make_history_picture.py"
    spec = importlib.util.spec_from_file_location("make_history_picture", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write_history(directory)


def test_the_commands_of_a_block_are_copied_without_prompts_and_output(
    browser: Any, address: str
) -> None:
    context = browser.new_context(viewport=DESK, permissions=["clipboard-read", "clipboard-write"])
    tab = context.new_page()
    tab.goto(address + "tutorial.html")
    block = tab.locator("div.highlight", has_text="pid 4711 begins").first
    block.hover()
    block.locator("button[data-md-type=copy]").click()
    copied = tab.evaluate("() => navigator.clipboard.readText()")
    context.close()
    assert copied.strip() == "python examples/tutorial.py"


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
