"""The report as a page, and as a fragment for a notebook."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from batchnorm.doctor.pictures import SIDE, LayerPicture, plots
from batchnorm.doctor.report import Report, said_of


def page(report: Report) -> str:
    """A whole page, with the pictures of all layers; those with findings first, and open."""
    return _render(report, whole=True)


def fragment(report: Report) -> str:
    """The findings alone, to be shown inside another page."""
    return _render(report, whole=False)


def _render(report: Report, whole: bool) -> str:
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(
        files("batchnorm.doctor").joinpath("page.html.jinja").read_text("utf-8")
    )
    return template.render(
        report=report, whole=whole, layers=_layers(report) if whole else [], side=SIDE, said_of=said_of
    )


def _layers(report: Report) -> list[dict[str, Any]]:
    codes: dict[str, dict[str, str]] = {}
    for finding in report.findings:
        if finding.layer is not None:
            codes.setdefault(finding.layer, {}).setdefault(finding.code, finding.severity)
    grave = {
        name: {code: severity for code, severity in of_layer.items() if severity != "note"}
        for name, of_layer in codes.items()
    }

    def layer(picture: LayerPicture) -> dict[str, Any]:
        name = picture.layer
        return {
            "name": name,
            "codes": codes.get(name, {}),
            "open": bool(grave.get(name)),
            "channels": picture.running_var.numel(),
            "plots": list(plots(picture)),
        }

    return sorted(map(layer, report.pictures), key=lambda shown: not shown["open"])
