"""Records of a JSONL file: {"prompt": text, "answer": text} and optionally "image": path, one object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from mipfast.data.records import Picture, Record
from mipfast.errors import InputError

KEYS = {"prompt": str, "answer": str, "image": str}
EXPECTED = 'expected one object a line, {"prompt": text, "answer": text} and optionally "image": path'


def read_lines(data: str | Path, limit: int | None = None) -> Iterator[Record]:
    """The lines of a JSONL file, at most limit of them; a record's id is its line's number, from 1. Raises InputError,
    with that number, for one that is not {"prompt": str, "answer": str, "image": optional path of a file}."""
    data = Path(data)
    try:
        with data.open("rb") as lines:
            for number, line in enumerate(islice(lines, limit), 1):
                try:
                    yield _record(number, line, data)
                except ValueError as error:
                    raise InputError(f"{data}, line {number}: {error}; {EXPECTED}") from error
    except OSError as error:
        raise InputError(f"cannot read {data} ({error.strerror}); expected a JSONL file") from error


def _record(number: int, line: bytes, data: Path) -> Record:
    """Raises ValueError (as json does), saying what was found."""
    found = json.loads(line.decode())
    if not isinstance(found, dict):
        raise ValueError(f"found {type(found).__name__} instead of an object")
    if not {"prompt", "answer"} <= found.keys() <= KEYS.keys():
        raise ValueError(f"found keys {', '.join(found) or 'none'}")
    if found.get("image", "") is None:
        del found["image"]
    for key, value in found.items():
        if not isinstance(value, KEYS[key]) or not value.strip():
            raise ValueError(f"found {key}={value!r}; it must be a text that is not empty")
    path = data.parent / found["image"] if "image" in found else None
    if path is not None and not path.is_file():
        raise ValueError(f"there is no image {path}")
    return Record(
        id=str(number),
        group=data.stem,
        modality="image" if path else "text",
        task="generation",
        question=found["prompt"],
        answer=found["answer"],
        image=Picture(path, str(path)) if path else None,
    )
