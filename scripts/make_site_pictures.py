#!/usr/bin/env python3
"""Take pictures of the documentation site, as a browser shows it on a desk and on a phone.

    .venv/bin/python scripts/make_site_pictures.py            # the picture in docs/images
    .venv/bin/python scripts/make_site_pictures.py FOLDER     # each page in each size and colour
    .venv/bin/python scripts/make_site_pictures.py FOLDER index.html cli.html

Needs what ``make docs`` installs, and Chromium.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
IMAGE = ROOT / "docs" / "images" / "site.png"
SIZES = {"desk": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
COLOURS = ("light", "dark")
# The browser asks nobody; it runs as root in a container.
ALONE = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-sync",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("pages", nargs="*", help="index.html, cli.html ...; default: all")
    parser.add_argument("--site", type=Path, help="a site that has been built")
    parser.add_argument("--whole", action="store_true", help="down to the end of each page")
    options = parser.parse_args()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if browser is None:
        sys.exit("make_site_pictures: there is no chromium; apt-get install chromium")
    with contextlib.ExitStack() as stage:
        directory = stage.enter_context(tempfile.TemporaryDirectory())
        site = options.site or build(Path(directory))
        address = stage.enter_context(served(site))
        driver = stage.enter_context(sync_playwright())
        running = driver.chromium.launch(executable_path=browser, args=ALONE)
        if options.folder is None:
            take(running, address + "index.html", IMAGE, "desk", "light")
        else:
            options.folder.mkdir(parents=True, exist_ok=True)
            for page in options.pages or pages(site):
                for size in SIZES:
                    for colours in COLOURS:
                        name = (
                            f"{page.removesuffix('.html').replace('/', '-')}-{size}-{colours}.png"
                        )
                        file = options.folder / name
                        take(running, address + page, file, size, colours, whole=options.whole)
        running.close()


def build(directory: Path) -> Path:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(directory)]
    environ = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(command, cwd=ROOT, env=environ, check=True)
    return directory


@contextlib.contextmanager
def served(site: Path) -> Iterator[str]:
    """The search needs a server: a browser starts no worker from a file."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def pages(site: Path) -> list[str]:
    """All pages, without the listings of sources, which look all alike."""
    found = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    return [page for page in found if not page.startswith("source/") and page != "404.html"]


def take(
    browser: Any, address: str, file: Path, size: str, colours: str, *, whole: bool = False
) -> None:
    context = browser.new_context(viewport=SIZES[size], color_scheme=colours)
    tab = context.new_page()
    tab.goto(address, wait_until="networkidle")
    tab.screenshot(path=file, full_page=whole)
    context.close()


if __name__ == "__main__":
    main()
