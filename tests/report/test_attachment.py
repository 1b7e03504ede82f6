"""Results that experiments attach to a run: stored as one file, shown by the report."""

from __future__ import annotations

import json
from pathlib import Path

from afmrl_ray.report import write_report
from afmrl_ray.report.attachment import Attachment, read_attachments, write_attachment
from afmrl_ray.report.drawing import Panel, make_charts
from afmrl_ray.report.text_table import TextTable
from tests.report.fake_run import FakeRun
from tests.report.page import read_page


def attachment(name: str, rows: list[list[str]]) -> Attachment:
    charts = make_charts([Panel("a <chart>", lambda axes, theme: axes.plot([0, 1], [0, 1]))])
    tables = [TextTable("first", ["", "hit@1"], rows), TextTable("second", ["", "hit@5"], [["a", "1"]])]
    return Attachment(name, "A study <b>", "A note.", tables, charts, {"gain": {"mean": 0.25}})


def test_attachments_are_read_as_they_were_written_ordered_by_name(tmp_path: Path) -> None:
    run = FakeRun(str(tmp_path)).run
    assert read_attachments(run) == []
    second, first = attachment("b", [["x", "2"]]), attachment("a", [["y", "3"]])
    for each in (second, first):
        write_attachment(run, each)
    assert read_attachments(run) == [first, second]
    replaced = attachment("a", [])
    write_attachment(run, replaced)
    assert read_attachments(run) == [replaced, second]


def test_the_report_shows_tables_and_charts_and_its_json_holds_the_record(tmp_path: Path) -> None:
    fake = FakeRun(str(tmp_path))
    fake.stage("catalogue", {})
    folder = Path(write_report(fake.run)).parent
    assert read_page((folder / "index.html").read_text("utf-8")).find("attachment-study") is None
    shown = attachment("study", [["<i>low</i>", "21.1"], ["high", ""]])
    write_attachment(fake.run, shown)
    write_report(fake.run)
    section = read_page((folder / "index.html").read_text("utf-8")).section("attachment-study")
    assert section.all("h2")[0].text == shown.title
    assert section.table("first") == [["", "hit@1"], ["<i>low</i>", "21.1"], ["high", "–"]]
    assert section.table("second") == [["", "hit@5"], ["a", "1"]]
    (picture,) = section.all("picture")
    (source,), (image,) = picture.all("source"), picture.all("img")
    assert image.attributes["src"] == f"data:image/png;base64,{shown.charts[0].light}"
    assert source.attributes["srcset"] == f"data:image/png;base64,{shown.charts[0].dark}"
    record = json.loads((folder / "report.json").read_text())
    assert record["attachments"] == {"study": {"title": shown.title, "record": {"gain": {"mean": 0.25}}}}
