"""The report of a run: `report/index.html`, plots and `report.json` below the run directory."""

from __future__ import annotations

import base64
import io
from importlib import resources
from typing import Any, Protocol

import jinja2
from PIL import Image

from afmrl_ray import storage
from afmrl_ray.cit.stages import RunDirectory
from afmrl_ray.config import dump_yaml, validate
from afmrl_ray.report.collect import Summary, collect
from afmrl_ray.report.plots import plots
from afmrl_ray.report.table import render_text, tables

_THUMBNAIL_PX = 112


class Pictures(Protocol):
    """Pictures by catalogue row."""

    def picture(self, row: int) -> Image.Image: ...


def run_table(run: RunDirectory) -> str:
    """The tables of a run as text for the terminal."""
    return render_text(tables(collect(run)))


def write_report(run: RunDirectory, *, listings: Pictures | None = None) -> str:
    """Write the report and return the path of its page, which needs no network and no other file.

    Args:
        listings: pictures of the catalogue; none = no examples on the page.
    """
    summary = collect(run)
    folder = storage.join(run.path, "report")
    images = plots(summary)
    for name, data in images.items():
        storage.write_bytes(storage.join(folder, f"{name}.png"), data)
    storage.write_json(storage.join(folder, "report.json"), machine_readable(summary))
    page = (
        _environment()
        .get_template("template.html")
        .render(
            run=summary.run,
            tables=tables(summary),
            plots={name: _data_url(data, "png") for name, data in images.items()},
            examples=_examples(summary, listings) if listings is not None else [],
            config=dump_yaml(validate(summary.run["config"])),
        )
    )
    index = storage.join(folder, "index.html")
    storage.write_bytes(index, page.encode())
    return index


def machine_readable(summary: Summary) -> dict[str, Any]:
    """Rounds with metrics and intervals, floor, stage seconds and peak memory (DESIGN 4.6)."""
    return {
        "name": summary.run["name"],
        "versions": summary.run["versions"],
        "catalogue": summary.run["catalogue"],
        "rounds": [
            {"title": c.title, "protocols": c.protocols, "attributes": c.attributes, "rar": c.rar}
            for c in summary.columns
        ],
        "floor": summary.floor,
        "stages": [{"name": s.name, "seconds": s.seconds, "peak_memory_mb": s.peak_memory_mb} for s in summary.stages],
        "seconds": sum(stage.seconds for stage in summary.stages),
        "peak_memory_mb": max((stage.peak_memory_mb for stage in summary.stages), default=0.0),
    }


def _environment() -> jinja2.Environment:
    source = resources.files("afmrl_ray.report").joinpath("template.html").read_text()
    return jinja2.Environment(loader=jinja2.DictLoader({"template.html": source}), autoescape=True)


def _examples(summary: Summary, listings: Pictures) -> list[dict[str, Any]]:
    def picture(row: int) -> str:
        image = listings.picture(row)
        image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
        data = io.BytesIO()
        image.save(data, "JPEG", quality=85)
        return _data_url(data.getvalue(), "jpeg")

    return [
        {
            **example,
            "picture": picture(example["query_row"]),
            "hits": [{**hit, "picture": picture(hit["row"])} for hit in example["hits"] if hit["row"] >= 0],
        }
        for example in summary.examples
    ]


def _data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
