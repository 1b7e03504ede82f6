"""Results that an experiment attaches to a run, so that the run's report shows them: text, tables, charts, data.

An attachment is one JSON file, `<run>/attachments/NAME.json`, that holds all that is shown. The report knows nothing of
the experiment: the writer of the file decides on its tables and charts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from afmrl_ray import storage
from afmrl_ray.report.drawing import Chart
from afmrl_ray.report.text_table import TextTable
from afmrl_ray.runs import RunDirectory

FOLDER = "attachments"
"""Below a run."""


@dataclass(frozen=True)
class Attachment:
    """Results of an experiment.

    Attributes:
        name: file name without extension; also the id of its section of the page.
        title: heading of the section.
        note: one paragraph below the heading.
        record: the numbers as JSON values, for `report.json`.
    """

    name: str
    title: str
    note: str
    tables: list[TextTable]
    charts: list[Chart]
    record: dict[str, Any]


def write_attachment(run: RunDirectory, attachment: Attachment) -> None:
    """Write or replace the attachment of that name.

    Raises:
        StorageError: it cannot be written.
    """
    storage.write_json(storage.join(run.path, FOLDER, f"{attachment.name}.json"), asdict(attachment))


def read_attachments(run: RunDirectory) -> list[Attachment]:
    """All attachments of a run, ordered by name."""
    folder = storage.join(run.path, FOLDER)
    names = [name for name in storage.list_files(folder) if name.endswith(".json")]
    return [_attachment(storage.read_json(storage.join(folder, name))) for name in names]


def _attachment(record: dict[str, Any]) -> Attachment:
    tables = [TextTable(**table) for table in record["tables"]]
    charts = [Chart(**chart) for chart in record["charts"]]
    return Attachment(**{**record, "tables": tables, "charts": charts})
