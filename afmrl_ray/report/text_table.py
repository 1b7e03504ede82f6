"""Tables of formatted cells, printed by rich: styled on a terminal, elsewhere plain text as wide as its cells."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

_WIDTH = 10_000
"""Characters; wider than any table, so that no cell is wrapped."""


@dataclass(frozen=True)
class TextTable:
    """A titled table.

    Attributes:
        title: heading, printed above the table.
        columns: [C] headers.
        rows: [R] rows of C cells; the first cell is the name of the row.
        left: number of first columns that are aligned to the left; the others are aligned to the right.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    left: int = 1

    def plain(self) -> str:
        """Title and aligned columns without rules, for terminals and logs; ASCII if the cells are."""
        return f"{self.title}\n{_text(_table(self))}" if self.title else _text(_table(self))

    def markdown(self) -> str:
        """A second-level heading and a Markdown table."""
        return f"## {self.title}\n\n{_text(_table(self, markdown=True))}"


def print_tables(tables: Sequence[TextTable], *, notes: Sequence[str] = ()) -> None:
    """Print tables, and notes below them, to standard output, with a blank line between any two of them.

    Headers and titles are bold on a terminal; elsewhere the text is that of `TextTable.plain`.
    """
    if not sys.stdout.isatty():
        sys.stdout.write("\n\n".join([*(table.plain() for table in tables), *notes]) + "\n")
        return
    console = _console(sys.stdout, _WIDTH)
    for table in tables:
        console.print(table.title, style="bold", soft_wrap=True)
        console.print(_table(table), soft_wrap=True)
        console.print()
    for note in notes:
        console.print(note, soft_wrap=True)


def _table(table: TextTable, *, markdown: bool = False) -> Table:
    drawn = Table(box=box.MARKDOWN) if markdown else Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(table.columns):
        drawn.add_column(_cell(column, markdown), justify="left" if index < table.left else "right", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*(_cell(cell, markdown) for cell in row))
    return drawn


def _cell(text: str, markdown: bool) -> str:
    return text.replace("|", "\\|") if markdown else text


def _text(table: Table) -> str:
    """The table without styles and without spaces at line ends."""
    buffer = io.StringIO()
    _console(buffer, _WIDTH).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines() if line.strip())


def _console(file: io.TextIOBase | object, width: int) -> Console:
    # Cells are data: brackets and colons in them are not markup, and numbers are not coloured.
    return Console(file=file, width=width, markup=False, emoji=False, highlight=False)  # type: ignore[arg-type]
