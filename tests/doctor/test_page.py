"""The page in a browser: it complains of nothing, loads nothing, and fits a narrow screen."""

import os
from pathlib import Path

import pytest
import torch

import batchnorm as bn
from batchnorm.lab.nets import LeNet
from tests.browser import opened


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (360, "dark")])
def test_in_a_browser(tmp_path: Path, width: int, scheme: str) -> None:
    path = tmp_path / "report.html"
    bn.diagnose(LeNet("handwritten"), [torch.rand(8, 1, 28, 28) for _ in range(2)]).to_html(path)
    with opened(path, width, scheme) as (shown, complaints):
        shown.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        assert "BN120" in shown.inner_text("body")
        assert shown.locator("svg:visible").count() == 3 * 4
        assert complaints == [path.as_uri()]
        if picture := os.environ.get("BATCHNORM_SCREENSHOTS"):
            shown.screenshot(path=f"{picture}/doctor-{width}.png")
