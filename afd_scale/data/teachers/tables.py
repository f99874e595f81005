"""Tables of prompts in any format: the names of their columns, and rows with the places where they begin.

What a row must be is checked in `prompts.py`, for all formats alike.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afd_scale.config import ConfigError, one_line
from afd_scale.files import system_errors

Row = dict[str, Any] | str  # fields of a row, or why there are none
Rows = Iterable[tuple[str, Row]]  # with their places

FASTVIDEO = {"video": "path", "prompt": "cap"}
_NO_OBJECT = "must be a JSON object with prompt"
_BLANKS = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Table:
    """A table whose rows are not looked into yet.

    Attributes:
        columns: their names; where each row has names of its own, all that occur. None where no row can be read.
        rows: given the columns that are wanted, the rows; they may hold more.
        aliases: column that a field of ours is in, where no column has the field's name.
    """

    columns: tuple[str, ...] | None
    rows: Callable[[Collection[str]], Rows]
    aliases: Mapping[str, str] = field(default_factory=dict)


def read_table(path: Path) -> Table:
    """Open a table; the suffix says how it is read. Places are the file's name and the line, of parquet the row.

    Raises:
        ConfigError: the file cannot be read, or is in none of the formats; rows may raise it when they are read.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        from afd_scale.data.teachers.parquet import read_parquet

        names, rows_of = read_parquet(path)
        return Table(names, lambda wanted: _placed(path, rows_of(wanted)))
    if suffix not in _TEXTS:
        raise ConfigError(f"prompts ({path}) must be one of {', '.join(_TEXTS)}, .parquet: "
                          "the suffix says how it is read")  # fmt: skip
    columns, rows = _TEXTS[suffix](_text(path), path)
    return Table(columns, lambda wanted: _placed(path, rows), FASTVIDEO if suffix == ".json" else {})


def json_problem(error: ValueError | RecursionError, within: int = 0) -> str:
    """Why a text, or its part from a character on, is no JSON; the line is for the caller to say."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos - within + 1}"
    return one_line(error)


_Numbered = Iterable[tuple[int, Row]]
_Read = tuple[tuple[str, ...] | None, _Numbered]


def _placed(path: Path, rows: _Numbered) -> Rows:
    return ((f"{path.name}:{number}", row) for number, row in rows)


def _text(path: Path) -> str:
    with system_errors(f"prompts ({path}) must be a readable file"):
        content = path.read_bytes()
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        found = "it is UTF-16" if utf16 else f"byte {error.start} is not"
        raise ConfigError(f"prompts ({path}) must be UTF-8: {found}") from error


def _of_objects(rows: list[tuple[int, Row]]) -> _Read:
    """Rows that have names of their own."""
    objects = [row for _, row in rows if isinstance(row, dict)]
    return (tuple(dict.fromkeys(name for row in objects for name in row)) if objects else None), rows


def _jsonl(text: str, path: Path) -> _Read:
    return _of_objects([(number, _object(line)) for number, line in _lines(text)])


def _object(line: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"must be a JSON object: {json_problem(error)}"
    return row if isinstance(row, dict) else _NO_OBJECT


def _json(text: str, path: Path) -> _Read:
    """A list of objects, decoded one by one to know their lines."""
    decoder, rows = json.JSONDecoder(), list[tuple[int, Row]]()
    at = _past_blanks(text, 0)
    if not text.startswith("[", at):
        raise ConfigError(f"prompts ({path}) must be a JSON list of objects: it begins with {text[at : at + 20]!r}; "
                          "objects that have a line each are a .jsonl")  # fmt: skip
    begin, line = 0, 1
    at = _past_blanks(text, at + 1)
    while not text.startswith("]", at):
        begin, line = at, line + text.count("\n", begin, at)
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"prompts ({path}:{line}) must be JSON: {json_problem(error, within=begin)}") from error
        rows.append((line, row if isinstance(row, dict) else _NO_OBJECT))
        at = _past_blanks(text, at)
        if text.startswith(",", at):
            at = _past_blanks(text, at + 1)
        elif not text.startswith("]", at):
            raise ConfigError(f"prompts ({path}:{line}) must be JSON: neither a comma nor the end follows this row")
    if _past_blanks(text, at + 1) < len(text):
        raise ConfigError(f"prompts ({path}) must be JSON: something follows the end of its list")
    return _of_objects(rows)


def _past_blanks(text: str, at: int) -> int:
    match = _BLANKS.match(text, at)
    return match.end() if match else at


def _csv(text: str, path: Path) -> _Read:
    rows = _csv_rows(text, path)
    _, header = next(rows, (1, []))

    def named() -> Iterator[tuple[int, Row]]:
        for line, values in rows:
            fits = len(values) <= len(header)
            yield line, dict(zip(header, values, strict=False)) if fits else "must have as many values as the header"

    return tuple(header), named()


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Values of each row that has any, with the line that it begins on."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    begin = 1
    try:
        for values in reader:
            if values:
                yield begin, values
            begin = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(f"prompts ({path}:{begin}) must be CSV: {one_line(error)}") from error


def _txt(text: str, path: Path) -> _Read:
    return ("prompt",), [(number, {"prompt": line}) for number, line in _lines(text)]


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Those that are not blank; splitlines would cut at U+2028, which JSON allows."""
    return ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


_TEXTS: Mapping[str, Callable[[str, Path], _Read]] = {".jsonl": _jsonl, ".csv": _csv, ".txt": _txt, ".json": _json}
