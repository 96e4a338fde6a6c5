"""A real Chromium for the tests of explorer pages, and pages opened in it.

MHEX_CHROMIUM names the browser where it is not on PATH; MHEX_BROWSER=1 makes its absence a failure; MHEX_SCREENSHOTS is
a folder that keeps the pictures.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
]
NAMES = ("chromium", "chromium-browser", "google-chrome")


def missing(reason):
    if os.environ.get("MHEX_BROWSER") == "1":
        pytest.fail(f"{reason}, and MHEX_BROWSER=1 asks for it")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser():
    """Chromium, without a window."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        missing("playwright is not installed")
    named = os.environ.get("MHEX_CHROMIUM")
    path = named or next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=path, args=FLAGS)
        except Error as error:
            if named:
                raise
            missing(f"there is no Chromium ({str(error).splitlines()[0]})")
        yield started
        started.close()


@pytest.fixture
def open_page(browser):
    """Opens a file: a page that is ready; in the end it must have asked the network for nothing, nor complained."""
    contexts, faults = [], []

    def open_(html_path, *, width=1440, height=900, dark=False, fragment="", quiet=True):
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
            accept_downloads=True,
        )
        contexts.append(context)
        context.set_default_timeout(15_000)
        page = context.new_page()
        address = Path(html_path).resolve().as_uri()
        if quiet:
            page.on("console", lambda message: faults.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("request", lambda request: None if allowed(request.url, address) else faults.append(request.url))
        page.goto(address + fragment)
        page.evaluate("() => window.mhexExplorer.ready")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert faults == []


def allowed(url, address):
    return url.startswith((address, "data:", "blob:"))


@pytest.fixture
def write_page(tmp_path):
    """Writes a page beside the test's other files."""

    def write(page, name="page.html"):
        return page.save(tmp_path / name)

    return write


@pytest.fixture
def screenshot(tmp_path):
    """Takes a picture of a page; MHEX_SCREENSHOTS says where they are kept."""
    folder = Path(os.environ.get("MHEX_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)

    def take(page, name, **settings):
        return page.screenshot(path=folder / f"{name}.png", **settings)

    return take
