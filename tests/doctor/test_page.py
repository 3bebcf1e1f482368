"""The page in a browser: it complains of nothing, loads nothing, and fits a narrow screen."""

import os
import shutil
from pathlib import Path

import pytest
import torch

import batchnorm as bn
from batchnorm.lab.nets import LeNet

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (360, "dark")])
def test_in_a_browser(tmp_path: Path, width: int, scheme: str) -> None:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser_path = os.environ.get("BATCHNORM_CHROMIUM") or next(
        filter(None, map(shutil.which, BROWSERS)), None
    )
    if browser_path is None:
        pytest.skip("no Chromium: set BATCHNORM_CHROMIUM to its path")
    path = tmp_path / "report.html"
    bn.diagnose(LeNet("handwritten"), [torch.rand(8, 1, 28, 28) for _ in range(2)]).to_html(path)
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
        shown.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        assert "BN120" in shown.inner_text("body")
        assert shown.locator("svg:visible").count() == 3 * 4
        assert complaints == [path.as_uri()]
        if picture := os.environ.get("BATCHNORM_SCREENSHOTS"):
            shown.screenshot(path=f"{picture}/doctor-{width}.png")
        browser.close()
