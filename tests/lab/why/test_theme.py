"""The figures' colours are readable and told apart by colour-blind readers; figures become SVG elements."""

import itertools
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from batchnorm.lab.why.theme import DARK, LIGHT, Theme, label_ends, panels, to_png, to_svg

THEMES = pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
# Machado, Oliveira & Fernandes 2009, severity 1, for linear RGB.
BLINDNESS = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.3039],
    ],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(color: str) -> np.ndarray:
    rgb = np.array(to_rgb(color))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    light = sorted(float(linear(color) @ XYZ[1]) for color in (one, other))
    return (light[1] + 0.05) / (light[0] + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    x, y, z = np.cbrt((XYZ @ rgb.clip(0, 1)) / XYZ.sum(1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@THEMES
def test_all_text_is_readable(theme: Theme) -> None:
    for color in (theme.foreground, theme.muted, *theme.colors):
        assert contrast(color, theme.background) >= 4.5, color


@THEMES
@pytest.mark.parametrize("blindness", BLINDNESS)
def test_colours_differ_for_colour_blind_readers(theme: Theme, blindness: str) -> None:
    seen = {color: lab(np.array(BLINDNESS[blindness]) @ linear(color)) for color in theme.colors}
    for one, other in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[one] - seen[other]) > 15, (one, other)
    assert np.linalg.norm(seen[theme.blue] - seen[theme.vermilion]) > 40


@THEMES
def test_a_figure_is_one_svg_element_equal_for_equal_figures(theme: Theme) -> None:
    def draw() -> str:
        figure, (axes,) = panels(theme, "title")
        axes.plot([0, 1], [2, 3], "o-", color=theme.blue)
        return to_svg(figure, f"figure-{theme.name}")

    assert draw() == draw()
    assert ElementTree.fromstring(draw()).tag == "{http://www.w3.org/2000/svg}svg"
    assert ">title</text>" in draw()


def test_panels_stand_below_each_other_on_a_phone() -> None:
    wide, _ = panels(LIGHT, "a", "b")
    narrow, _ = panels(LIGHT.narrowed(), "a", "b")
    assert wide.get_figwidth() > narrow.get_figwidth()
    assert wide.get_figheight() < narrow.get_figheight()
    assert to_png(narrow).startswith(b"\x89PNG")


def test_labels_do_not_lie_on_each_other() -> None:
    figure, (axes,) = panels(LIGHT, "title")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    label_ends(
        axes, [(1, 0.5, "one", LIGHT.blue), (1, 0.5, "two", LIGHT.green), (1, 0.9, "far", LIGHT.ochre)]
    )
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 2 for low, high in itertools.pairwise(boxes))
