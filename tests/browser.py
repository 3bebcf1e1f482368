"""A page in headless Chromium, for the tests of pages; they skip where it is missing."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def opened(path: Path, width: int, scheme: str) -> Iterator[tuple[Any, list[str]]]:
    """The page in a browser, and what it complained of or asked the network for."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser_path = os.environ.get("BATCHNORM_CHROMIUM") or next(
        filter(None, map(shutil.which, BROWSERS)), None
    )
    if browser_path is None:
        pytest.skip("no Chromium: set BATCHNORM_CHROMIUM to its path")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path, args=["--no-sandbox", "--no-zygote", "--single-process"]
        )
        shown = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        complaints: list[str] = []
        shown.on("console", lambda message: complaints.append(message.text))
        shown.on("pageerror", lambda error: complaints.append(str(error)))
        shown.on("request", lambda request: complaints.append(request.url))
        shown.goto(path.as_uri())
        yield shown, complaints
        browser.close()
