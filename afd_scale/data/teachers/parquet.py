"""Tables in parquet: only the columns that are asked for are read, and not all rows at once."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from afd_scale.config import ConfigError, one_line
from afd_scale.files import system_errors

_ROWS_AT_ONCE = 4096

NumberedRows = Iterable[tuple[int, dict[str, Any]]]


def read_parquet(path: Path) -> tuple[tuple[str, ...], Callable[[Collection[str]], NumberedRows]]:
    """The columns of a file, and what gives its rows, numbered from 1, with some of them.

    Raises:
        ConfigError: it cannot be read; rows may raise it too, and do where a column holds no texts.
    """
    import pyarrow.parquet

    with system_errors(f"prompts ({path}) must be a readable file"):
        path.open("rb").close()
    with _problems(path):
        file = pyarrow.parquet.ParquetFile(path)
        schema = file.schema_arrow

    def rows(wanted: Collection[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        columns = [name for name in schema.names if name in wanted]
        for name in columns:
            if not _holds_texts(schema.field(name).type):
                raise ConfigError(f"prompts ({path}) must have texts in the column {name}: "
                                  f"it holds {one_line(schema.field(name).type)[:80]}")  # fmt: skip
        number = 0
        with _problems(path):
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row

    return tuple(schema.names), rows


def _holds_texts(kind: Any) -> bool:
    """Texts, lists of texts, or nothing."""
    from pyarrow import types

    if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind):
        return _holds_texts(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)


@contextmanager
def _problems(path: Path) -> Iterator[None]:
    """What pyarrow finds wrong, as ConfigError; some of it are errors of the system's classes."""
    from pyarrow import ArrowException

    try:
        yield
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompts ({path}) must be UTF-8: {error.reason}") from error
    except (ArrowException, OSError) as error:
        raise ConfigError(f"prompts ({path}) must be whole parquet: {one_line(error)}") from error
