"""The page is one file that needs nothing else, readable with a keyboard, on a phone, in light and dark."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from batchnorm.lab.why import campaign
from batchnorm.lab.why.page import MINUS, number, page
from tests.browser import opened

from .examples import make, two_layers


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> str:
    experiments = [make(1, "first", layers=two_layers), make(2, "second", above=100)]
    return page(campaign.run(experiments, 5, "quick", tmp_path_factory.mktemp("why"))).decode()


class Elements(HTMLParser):
    """Tags with their attributes, and which are left open."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_nothing_is_loaded(content: str) -> None:
    for tag, attributes in Elements(content).found:
        for name in ("src", "href", "xlink:href", "action", "data"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:")), (tag, name, target)
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", content)


def test_ids_are_unique_and_every_reference_has_one(content: str) -> None:
    elements = Elements(content).found
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    hrefs = [attributes.get(name) or "" for _, attributes in elements for name in ("href", "xlink:href")]
    referred = [href[1:] for href in hrefs if href.startswith("#")] + re.findall(r"url\(#([\w-]+)\)", content)
    assert set(referred) <= set(ids)


def test_every_experiment_has_its_section(content: str) -> None:
    assert content.count("<section") == 2
    for wanted in (
        "1. Title of &lt;first&gt;",
        "Values are above a threshold &amp; more.",
        "3.00 (1.04 to 4.96) points",
        "above 0: yes",
        "above 100: no",
        "not supported",
        "batchnorm why second --quick --seeds 5 --out why",
    ):
        assert wanted in content, wanted


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (3.14159, "3.14"),
        (-1.3, f"{MINUS}1.30"),
        (9.99999, "10.0"),
        (12345.6, "12,346"),
        (0.000012, f"1.20e{MINUS}05"),
        (float("nan"), "not finite"),
        (float("-inf"), f"{MINUS}∞"),
    ],
)
def test_numbers_are_written_for_readers(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (360, "dark")])
def test_in_a_browser(content: str, tmp_path: Path, width: int, scheme: str) -> None:
    path = tmp_path / "index.html"
    path.write_text(content, encoding="utf-8")
    with opened(path, width, scheme) as (shown, complaints):
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        visible = shown.locator("figure > div:visible").evaluate_all(
            "found => found.map(div => div.className)"
        )
        assert visible == [f"{scheme} {'narrow' if width < 640 else 'wide'}"] * 2
        drawn = "document.querySelector('.bars').getAttribute('d')"
        before, says = shown.evaluate(drawn), shown.inner_text("output")
        shown.keyboard.press("Tab")
        while shown.evaluate("document.activeElement.tagName") == "A":
            shown.keyboard.press("Tab")
        shown.keyboard.press("ArrowRight")
        assert shown.evaluate(drawn) != before
        assert (says, shown.inner_text("output")) == (
            "step 0: 10 % right without batch norm, 10 % right with batch norm",
            "step 10: 50 % right without batch norm, 50 % right with batch norm",
        )
        assert shown.get_attribute("input", "aria-valuetext") == "step 10"
        picture = shown.screenshot(full_page=True)
        assert complaints == [path.as_uri()]
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
