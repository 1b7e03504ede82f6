"""Reads an HTML page into elements, so that tests look at ids, classes and table cells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"br", "hr", "img", "link", "meta", "source"}
"""Elements without an end tag."""


@dataclass
class Element:
    """An element; `parts` are its texts and child elements in order."""

    tag: str
    attributes: dict[str, str]
    parts: list[str | Element] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text inside, with white space folded."""
        return " ".join("".join(self._texts()).split())

    def _texts(self) -> Iterator[str]:
        for part in self.parts:
            if isinstance(part, str):
                yield part
            else:
                yield from part._texts()

    @property
    def own_text(self) -> str:
        """The text outside child elements, with white space folded."""
        return " ".join("".join(part for part in self.parts if isinstance(part, str)).split())

    def all(self, tag: str | None = None, *, kind: str | None = None) -> list[Element]:
        """Descendants with a tag and a class, in document order."""
        found: list[Element] = []
        for part in self.parts:
            if isinstance(part, Element):
                if tag in (None, part.tag) and (kind is None or kind in part.attributes.get("class", "").split()):
                    found.append(part)
                found += part.all(tag, kind=kind)
        return found

    def find(self, name: str) -> Element | None:
        """The descendant with an id."""
        return next((each for each in self.all() if each.attributes.get("id") == name), None)

    def section(self, name: str) -> Element:
        """The same, which must exist."""
        found = self.find(name)
        assert found is not None, f"no element has the id {name!r}"
        return found

    def rows(self) -> list[list[str]]:
        """Cell texts of a table, without the small print."""
        return [[cell.own_text for cell in row.all() if cell.tag in ("th", "td")] for row in self.all("tr")]

    def table(self, label: str) -> list[list[str]]:
        """Rows of the table with a label, header first."""
        (table,) = [each for each in self.all("table") if each.attributes.get("aria-label") == label]
        return table.rows()


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element("page", {})
        self._open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self._open[-1].parts.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self._open[-1].parts.append(data)


def read_page(text: str) -> Element:
    """The page as a tree of elements.

    Raises:
        AssertionError: elements are not nested properly.
    """
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert len(reader._open) == 1, f"<{reader._open[-1].tag}> is not closed"
    return reader.root
