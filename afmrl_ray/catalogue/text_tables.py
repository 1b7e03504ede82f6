"""Rows of text files as shops and spreadsheets export them: CSV and its relatives, JSON, JSON Lines, gzipped or not."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from dataclasses import dataclass, field
from typing import Any

from afmrl_ray import storage
from afmrl_ray.errors import CatalogueError

_DELIMITERS = {".csv": ",;\t|", ".tsv": "\t", ".tab": "\t", ".txt": "\t;|,"}
"""Delimiters that are looked for, by suffix; of those that a header has equally often, the first."""
_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass
class TextTable:
    """Rows of a file.

    Attributes:
        rows: values by column; a column that a row lacks is missing in it.
        columns: names of all columns, in order of appearance.
        faults: reason and detail of rows that cannot be read, whose values are empty.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    faults: dict[int, tuple[str, str]] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.columns += [name for name in row if name not in self.columns]

    def add_fault(self, reason: str, detail: str) -> None:
        self.faults[len(self.rows)] = reason, detail
        self.rows.append({})


def read_text_table(path: str, *, delimiter: str | None = None, encoding: str | None = None) -> TextTable:
    """Read `.csv`, `.tsv`, `.tab` or `.txt` (delimited), `.json`, `.jsonl` or `.ndjson`, each with or without `.gz`.

    Suffixes may be of any case. A `.json` file holds an array of objects, an object with one such array, or JSON Lines.

    Args:
        path: local path or URI.
        delimiter: of a delimited file; None = it is found in the header.
        encoding: of the text; None = UTF-8, or what a byte order mark or its zero bytes show.

    Raises:
        CatalogueError: it does not exist, is of another kind, cannot be decoded, or names a column twice.
    """
    name = path.lower().removesuffix(".gz")
    suffix = next((each for each in (*_DELIMITERS, *_JSON_SUFFIXES) if name.endswith(each)), None)
    if suffix is None:
        known = ", ".join((*_DELIMITERS, *_JSON_SUFFIXES))
        raise CatalogueError(f"{path}: not one of {known} (with or without .gz)")
    text = read_text(path, encoding=encoding)
    if suffix == ".json":
        return _json_table(text, path)
    if suffix in _JSON_SUFFIXES:
        return _json_lines(text, path)
    return _delimited(text, path, delimiter, _DELIMITERS[suffix])


def read_text(path: str, *, encoding: str | None = None) -> str:
    """The text of a file, see `read_text_table`.

    Raises:
        CatalogueError: it does not exist, or cannot be decoded.
    """
    if not storage.exists(path):
        raise CatalogueError(f"{path} does not exist")
    if storage.is_dir(path):
        raise CatalogueError(f"{path} is a folder; name a file in it")
    data = storage.read_bytes(path)
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise CatalogueError(f"{path}: damaged gzip ({error})") from error
    elif data[:4] == b"PK\x03\x04":
        raise CatalogueError(f"{path}: a zip archive or a spreadsheet (.xlsx); save it as CSV, or unpack it")
    encoding = encoding or _encoding(data)
    try:
        return data.decode(encoding)
    except LookupError as error:
        raise CatalogueError(f"--encoding {encoding}: no such encoding") from error
    except UnicodeDecodeError as error:
        raise CatalogueError(
            f"{path}: not {encoding.upper()} (byte {error.start}); say what it is, as --encoding cp1252 (Excel in "
            "Europe and America, Latin-1), gb18030 (China) or shift_jis (Japan), or save it as UTF-8"
        ) from error


def _encoding(data: bytes) -> str:
    """By a byte order mark; without one, every other byte is zero in UTF-16 of European text."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return encoding
    head = data[:400]
    if head.count(0) > len(head) // 4:
        return "utf-16-le" if head[1::2].count(0) > head[0::2].count(0) else "utf-16-be"
    return "utf-8"


def _delimited(text: str, path: str, delimiter: str | None, candidates: str) -> TextTable:
    csv.field_size_limit(sys.maxsize)
    # Universal newlines: files of old Macs and of mixed tools.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    first, _, rest = text.partition("\n")
    if first.lower().startswith("sep=") and len(first.strip()) == 5:
        delimiter, text = delimiter or first.strip()[4], rest
        first = text.partition("\n")[0]
    delimiter = delimiter or max(candidates, key=lambda each: _outside_quotes(first, each))
    if len(delimiter) != 1:
        raise CatalogueError(f"--delimiter {delimiter!r}: one character is needed")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    table = TextTable()
    try:
        header = [name.strip() for name in next(reader, [])]
        names = [name or f"column {place + 1}" for place, name in enumerate(header)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise CatalogueError(f"{path}: the header names column {twice[0]!r} twice; rename one of them")
        table.columns = names
        for row in reader:
            if not row or (len(row) == 1 and not row[0].strip() and len(names) > 1):
                continue
            while len(row) > len(names) and not row[-1].strip():
                row.pop()
            if len(row) > len(names):
                detail = f"line {reader.line_num} has {len(row)} fields, the header {len(names)}"
                table.add_fault("too_many_fields", f"{detail}; quote fields that contain {delimiter!r}")
            else:
                table.add(dict(zip(names, (value.strip() for value in row), strict=False)))
    except csv.Error as error:
        raise CatalogueError(f"{path}:{reader.line_num}: no CSV ({error})") from error
    return table


def _outside_quotes(line: str, character: str) -> int:
    return sum(part.count(character) for part in line.split('"')[::2])


def _json_table(text: str, path: str) -> TextTable:
    try:
        value = json.loads(text)
    except ValueError as error:
        if "\n" in text.strip() and text.lstrip().startswith("{"):
            return _json_lines(text, path)
        raise CatalogueError(f"{path}: not JSON ({error})") from error
    if isinstance(value, dict):
        lists = [content for content in value.values() if isinstance(content, list)]
        value = [value] if not lists else lists[0] if len(lists) == 1 else None
    if not isinstance(value, list):
        raise CatalogueError(f"{path}: an array of objects is needed, one for each item")
    table = TextTable()
    for place, row in enumerate(value):
        if isinstance(row, dict):
            table.add(row)
        else:
            table.add_fault("unreadable_row", f"element {place} of {path} is no JSON object")
    return table


def _json_lines(text: str, path: str) -> TextTable:
    table = TextTable()
    # Not splitlines(): a title may contain U+2028 and other line separators.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            table.add_fault("unreadable_row", f"{path}:{number}: not JSON ({error})")
            continue
        if isinstance(row, dict):
            table.add(row)
        else:
            table.add_fault("unreadable_row", f"{path}:{number}: a JSON object is needed")
    return table
