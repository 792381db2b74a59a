"""A benchmark's parquet tables: found in a folder or fetched, and read row by row. Every complaint names file, row
(the first is 0) and column."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mipfast.data.records import Picture
from mipfast.errors import ArtefactError, InputError
from mipfast.files import parse_json

log = logging.getLogger("mipfast")

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
ROWS_AT_ONCE = 16  # a row holds pictures of up to a megabyte
FETCH = """\
  MLLMU-Bench:          hf download MLLMMU/MLLMU-Bench --repo-type dataset --local-dir {0}
  its training tables:  hf download MLLMMU/baseline_train_split --local-dir {0}
  CLEAR:                hf download therem/CLEAR --repo-type dataset --local-dir {0}"""


def find_table(source: str | Path, group: str) -> list[Path]:
    """The files of one table, <source>/<group>/*.parquet, in order. source: a folder, or as str a Hub id, which is
    fetched. Raises InputError where there is none."""
    folder = Path(source)
    if not folder.is_dir():
        if not (isinstance(source, str) and HUB_ID.fullmatch(source)):
            raise InputError(f"there is no folder {source}; fetch one of\n{FETCH.format(shlex.quote(str(source)))}")
        folder = _fetch(source, group)
    files = sorted((folder / group).glob("*.parquet"))
    if not files:
        present = sorted({file.parent.name for file in folder.glob("*/*.parquet")})
        raise InputError(
            f"{folder} has no table {group!r}; it has {', '.join(present) or 'no folder with a .parquet file'}. Name "
            f"one of them, or fetch it (hf download ... --include {shlex.quote(group + '/*')}) from one of\n"
            + FETCH.format(shlex.quote(str(source)))
        )
    return files


def _fetch(repository: str, group: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    log.info("no folder %s here: fetching %s/*.parquet of that name from the Hub", repository, group)
    reasons = []
    for kind in ("dataset", "model"):  # MLLMU-Bench's training tables are a model's repository
        try:
            return Path(snapshot_download(repository, repo_type=kind, allow_patterns=f"{group}/*.parquet"))
        except (RepositoryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
            reasons.append(f"as a {kind}: {str(error).strip().splitlines()[0]}")
    raise InputError(
        f"{repository} is no folder here and cannot be fetched from the Hub ({'; '.join(reasons)}); give a folder, "
        f"fetched with one of\n{FETCH.format('DIR')}"
    )


@dataclass(frozen=True)
class Row:
    """One row of a table: its file, its number there, and what it holds by column."""

    file: Path
    number: int
    values: dict[str, Any]

    def error(self, column: str, found: Any, expected: str) -> InputError:
        shown = found if isinstance(found, str) else repr(found)[:80]
        return InputError(f"{self.where(column)}: found {shown}; expected {expected}")

    def where(self, column: str) -> str:
        return f"{self.file}, row {self.number}, column {column}"

    def text(self, column: str, value: Any = ...) -> str:
        """The column's text, or value as one that was found in it. Raises InputError for an empty one."""
        value = self.values.get(column) if value is ... else value
        if not isinstance(value, str) or not value.strip():
            raise self.error(column, repr(value)[:80], "a text that is not empty")
        return value

    def texts(self, column: str) -> tuple[str, ...]:
        return tuple(self.text(column, value) for value in self.items(column, self.values.get(column)))

    def items(self, column: str, value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise self.error(column, value, "a list")
        return value

    def fields(self, column: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.error(column, value, "named fields")
        return value

    def json(self, column: str, kind: type) -> Any:
        """The column's JSON text, parsed. Raises InputError for what is no JSON, or not of that kind."""
        try:
            value = parse_json(self.text(column))
        except ValueError as error:
            raise self.error(column, f"what is no JSON ({error})", f"a JSON {kind.__name__}") from error
        if not isinstance(value, kind):
            raise self.error(column, value, f"a JSON {kind.__name__}")
        return value

    def picture(self, column: str, value: Any) -> Picture:
        """A datasets image, {bytes, path}. Raises InputError for what is no picture, as far as its header says."""
        data = self.fields(column, value).get("bytes")
        if not isinstance(data, bytes):
            raise self.error(column, f"bytes={data!r}", "the bytes of a picture")
        picture = Picture(data, self.where(column))
        picture.size  # noqa: B018  # raises
        return picture


def read_rows(files: list[Path]) -> Iterator[Row]:
    """Raises ArtefactError for what is no parquet, InputError for a table without rows."""
    if find_spec("pyarrow") is None:
        raise InputError("tables need pyarrow, which is not installed; run: pip install 'mipfast[data]'")
    import pyarrow
    from pyarrow import parquet

    total = 0
    for file in files:
        number = 0
        try:
            # reading a group of rows ahead takes another copy of its pictures: 720 MB instead of 460 for 250
            with parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20) as table:
                for batch in table.iter_batches(ROWS_AT_ONCE):
                    for values in batch.to_pylist():
                        yield Row(file, number, values)
                        number += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise ArtefactError(
                f"{file}, after row {number - 1}: cannot be read as parquet ({error}); fetch it again"
                if number
                else f"{file} cannot be read as parquet ({error}); fetch it again"
            ) from error
        total += number
    if not total:
        raise InputError(f"{', '.join(map(str, files))}: the table has no rows; fetch it again")
