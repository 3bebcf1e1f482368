"""The report: order, words that fit 80 columns, JSON, and a page that is written whole."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.doctor.pictures import SIDE, LayerPicture, plots
from batchnorm.lab.nets import LeNet
from tests.model.zoo import build


@pytest.fixture
def report() -> bn.Report:
    model, _ = build("resnet basic")
    model.layer1[0].bn1.running_var[0] = -1
    model.layer2[0].bn1.momentum = 0.9
    images = [torch.randn(8, 3, 16, 16) for _ in range(2)]
    return bn.diagnose(
        model, images, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=5e-4)
    )


def test_the_gravest_comes_first(report: bn.Report) -> None:
    ranks = [("error", "warning", "note").index(finding.severity) for finding in report.findings]
    assert ranks == sorted(ranks)
    assert report.worst == "error"


def test_it_fits_80_columns_and_says_everything(report: bn.Report) -> None:
    text = str(report)
    assert max(map(len, text.splitlines())) <= 80
    for finding in report.findings:
        assert finding.code in text
    assert text.startswith("ResNet: 10 batch norms, 2 batches of data: ")
    # Layers that have the same are in one line.
    assert re.search(r"bn1, layer1.0.bn1, layer1.0.bn2, layer1.1.bn1 and 6 more: weight\s+decay", text)


def test_json_has_all_findings_and_no_nan(report: bn.Report) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads(report.to_json(), parse_constant=refuse)
    assert read["worst"] == "error"
    assert [finding["code"] for finding in read["findings"]] == [f.code for f in report.findings]
    assert set(read["findings"][0]) == {"code", "severity", "layer", "what", "evidence", "why", "fix"}


def test_numbers_that_json_has_no_word_for() -> None:
    finding = bn.Finding("BN999", "note", None, "x", {"ratio": float("inf"), "n": 3}, "why", "fix")
    text = bn.Report("Net", 1, 0, (finding,)).to_json()
    assert json.loads(text)["findings"][0]["evidence"] == {"ratio": "inf", "n": 3}


class Page(HTMLParser):
    """Checks that what is opened is closed, and collects what a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_has_a_picture_per_layer(report: bn.Report, tmp_path: Path) -> None:
    (tmp_path / "r.html").write_text("old")
    report.to_html(tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.loads == []
    assert "url(" not in text
    assert page.count["svg"] == 3 * 10
    assert "nan" not in re.findall(r'c[xy]="([^"]*)"', text)
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_what_is_written_into_the_page_is_escaped() -> None:
    finding = bn.Finding("BN999", "error", "<script>", "<b>&", {}, "<i>", "<u>")
    html = bn.Report("<x>", 1, 0, (finding,))._repr_html_()
    for raw in ("<script>", "<b>&", "<i>", "<u>", "<x>"):
        assert raw not in html


def test_a_notebook_gets_the_findings_without_a_page_of_its_own(report: bn.Report) -> None:
    html = report._repr_html_()
    assert "<html" not in html
    assert "<svg" not in html
    assert "BN109" in html
    page = Page()
    page.feed(html)
    assert page.open == []


def test_a_page_that_cannot_be_written_leaves_the_old_one(report: bn.Report, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        report.to_html(tmp_path / "nowhere" / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_a_page_without_data_draws_the_buffers(tmp_path: Path) -> None:
    bn.diagnose(build("lenet")[0]).to_html(tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text().count("<svg") == 3
    bn.diagnose(nn.Linear(2, 2)).to_html(tmp_path / "none.html")
    assert "no batch norm" in (tmp_path / "none.html").read_text()
    bn.diagnose(LeNet("handwritten")).to_html(tmp_path / "hand.html")
    assert "BN120" in (tmp_path / "hand.html").read_text()


def test_pictures_of_odd_statistics_stay_in_their_frame() -> None:
    odd = torch.tensor([0.0, -1.0, torch.nan, torch.inf, 1e-30, 1e30, 1.0])
    for picture in (
        LayerPicture("odd", odd, odd, odd.flip(0), odd.flip(0)),
        LayerPicture("one", torch.zeros(1), torch.ones(1), torch.zeros(1), torch.ones(1)),
        LayerPicture("many", torch.randn(5000), torch.rand(5000), torch.randn(5000), torch.rand(5000)),
    ):
        shown = list(plots(picture))
        assert len(shown) == 3
        for plot in shown:
            places = [place for point in plot.points for place in point]
            places += [tick.at for tick in (*plot.x_ticks, *plot.y_ticks)]
            assert all(0 <= place <= SIDE for place in places)
            assert len(plot.points) <= 200
            assert 1 <= len(plot.x_ticks) <= 6
