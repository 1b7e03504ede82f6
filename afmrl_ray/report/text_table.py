"""Tables whose cells are text already, and how numbers become such cells."""

from __future__ import annotations

from dataclasses import dataclass

from afmrl_ray.report.estimate import Estimate


@dataclass(frozen=True)
class TextTable:
    """A titled table; the first cell of a row is its name."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table below its title, as Markdown."""
        lines = ["| " + " | ".join(self.columns) + " |", "|" + " --- |" * len(self.columns)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return f"## {self.title}\n\n" + "\n".join(lines)

    def plain(self) -> str:
        """The table below its title with aligned columns, for terminals."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        aligned = (
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        )
        return "\n".join([self.title, *(line.rstrip() for line in aligned)])


def share(value: Estimate | None) -> str:
    """A share as per cent with half of its interval."""
    return spread(value, 100.0, 1)


def spread(value: Estimate | None, scale: float, digits: int) -> str:
    """`mean ± half of the interval`, scaled."""
    if value is None or value.mean is None:
        return ""
    text = f"{scale * value.mean:.{digits}f}"
    if value.low is None or value.high is None:
        return text
    return f"{text} ± {scale * (value.high - value.low) / 2:.{digits}f}"


def points(value: Estimate) -> str:
    """A gain in points with its interval."""
    if value.mean is None:
        return ""
    text = f"{100 * value.mean:+.1f}"
    return (
        text if value.low is None or value.high is None else f"{text} [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"
    )
