"""Records of a JSONL file: {"prompt": text, "answer": text} and optionally "image": path and "subject": text, one
object a line."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from mipfast.data.records import Picture, Record
from mipfast.errors import InputError
from mipfast.files import parse_json

KEYS = {"prompt": str, "answer": str, "image": str, "subject": str}
EXPECTED = (
    'expected one object a line, {"prompt": text, "answer": text} and optionally "image": path and "subject": text'
)


def read_lines(data: str | Path, limit: int | None = None) -> Iterator[Record]:
    """The lines of a JSONL file as records, one by one; a record's id is its line's number, from 1.

    Args:
        data: the file, a line of it {"prompt": text, "answer": text} and optionally "image": a path relative to the
            file, and "subject": whom or what is asked about, in the prompt's own words.
        limit: the most lines to read.

    Raises:
        InputError: for a file that cannot be read, and, with its number, for a line that is anything else.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from mipfast.data import read_lines
        >>> file = Path(tempfile.mkdtemp()) / "facts.jsonl"
        >>> _ = file.write_text('{"prompt": "Where was Ada born?", "answer": "Rome"}')
        >>> [(record.id, record.group, record.prompt, record.target) for record in read_lines(file)]
        [('1', 'facts', 'Where was Ada born?', 'Rome')]
    """
    data = Path(data)
    try:
        with data.open("rb") as lines:
            for number, line in enumerate(islice(lines, limit), 1):
                try:
                    yield _record(number, line, data)
                except (ValueError, OSError) as error:  # the latter of a picture's path
                    raise InputError(f"{data}, line {number}: {error}; {EXPECTED}") from error
    except OSError as error:
        raise InputError(f"cannot read {data} ({error.strerror}); expected a JSONL file") from error


def _record(number: int, line: bytes, data: Path) -> Record:
    """Raises ValueError (as json does), saying what was found."""
    fields = parse_json(line.decode())
    if not isinstance(fields, dict):
        raise ValueError(f"found {type(fields).__name__} instead of an object")
    if not {"prompt", "answer"} <= fields.keys() <= KEYS.keys():
        raise ValueError(f"found keys {', '.join(fields) or 'none'}")
    for key in ("image", "subject"):
        if fields.get(key, "") is None:
            del fields[key]
    for key, value in fields.items():
        if not isinstance(value, KEYS[key]) or not value.strip():
            raise ValueError(f"found {key}={value!r}; it must be a text that is not empty")
    path = data.parent / fields["image"] if "image" in fields else None
    if path is not None and not path.is_file():
        raise ValueError(f"there is no image {path}")
    return Record(
        id=str(number),
        group=data.stem,
        modality="image" if path else "text",
        task="generation",
        question=fields["prompt"],
        answer=fields["answer"],
        image=Picture(path, str(path)) if path else None,
        subject=fields.get("subject", ""),
    )
