"""Tables of text: alignment, data that looks like markup, Markdown, terminals."""

from __future__ import annotations

import io
import sys

import pytest

from afmrl_ray.report.text_table import TextTable, print_tables

TABLE = TextTable("gains [bold]", ["name", "gain"], [["[red]a", "+1.5 [-0.2, +3.1]"], [":smile: b|c", ""]])
PLAIN = """\
gains [bold]
name                      gain
[red]a       +1.5 [-0.2, +3.1]
:smile: b|c"""
MARKDOWN = """\
## gains [bold]

| name         |              gain |
|--------------|-------------------|
| [red]a       | +1.5 [-0.2, +3.1] |
| :smile: b\\|c |                   |"""


def test_columns_are_aligned_and_cells_are_printed_as_they_are() -> None:
    assert TABLE.plain() == PLAIN


def test_several_first_columns_can_be_aligned_to_the_left() -> None:
    table = TextTable("", ["a", "b", "c"], [["1", "22", "333"], ["4444", "5", "6"]], left=2)
    assert table.plain().splitlines() == ["a     b     c", "1     22  333", "4444  5     6"]


def test_the_markdown_has_one_line_per_row_and_escapes_pipes() -> None:
    assert TABLE.markdown() == MARKDOWN


def test_the_width_depends_on_the_cells_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    wide = TextTable("", ["name", "value"], [["x" * 200, "y" * 200]])
    assert [len(line) for line in wide.plain().splitlines()] == [402, 402]
    assert TABLE.plain() == PLAIN


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [False, True])
def test_text_is_styled_on_terminals_alone(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    target = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", target)
    print_tables([TABLE, TABLE], notes=["* a note"])
    text = target.getvalue()
    assert ("\x1b[1m" in text) == terminal
    assert text.count("+1.5 [-0.2, +3.1]") == 2
    if not terminal:
        assert text == f"{PLAIN}\n\n{PLAIN}\n\n* a note\n"
