"""One question of a benchmark, whatever table or file it came from, and its picture."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from mipfast.errors import InputError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
RECORD_MODALITIES = ("text", "image")  # a config's modality is another: which stack is scored, text or vision
ORIENTATION = 0x0112  # EXIF; from 5 on the picture lies on its side


@dataclass(frozen=True)
class Picture:
    """A picture that is decoded anew each time it is asked for, so that a list of records stays as small as its files.
    source: a file's bytes, a path or a PIL.Image. where: what messages call it."""

    source: Any = field(repr=False)
    where: str = "the picture"

    def open(self) -> Any:
        """The PIL.Image: RGB, upright. Raises InputError for what is no picture."""
        with self._opened() as image:
            from PIL import ImageOps

            return ImageOps.exif_transpose(image).convert("RGB")

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels, read from the file's header. Raises InputError for what is no picture."""
        with self._opened() as image:
            on_its_side = image.getexif().get(ORIENTATION, 1) >= 5
            return image.size[::-1] if on_its_side else image.size

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        if find_spec("PIL") is None:
            raise InputError("pictures need Pillow, which is not installed; run: pip install 'mipfast[data]'")
        from PIL import Image

        if isinstance(self.source, Image.Image):
            yield self.source
            return
        try:
            with Image.open(BytesIO(self.source) if isinstance(self.source, bytes) else self.source) as image:
                yield image
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{self.where} cannot be read as a picture ({error})") from error


@dataclass(frozen=True)
class Record:
    """id: unique within its set, with the person's or row's own id in front of the first "/". group: the set it came
    from, such as forget_5. options: of a multiple choice, in the order shown; answer is one of them, and letter its
    place where the table says it. image: a Picture (or what one is made of) or None; only modality="image" has one.
    paraphrase, perturbed: the answer reworded, and wrong answers of the same form, for the truth ratio; empty where the
    table has none."""

    id: str
    group: str
    modality: Literal["text", "image"]
    task: Literal["generation", "choice", "cloze"]
    question: str
    answer: str
    options: tuple[str, ...] = ()
    image: Any = None
    paraphrase: str = ""
    perturbed: tuple[str, ...] = ()
    letter: str = ""

    @property
    def prompt(self) -> str:
        """What the model is asked: MLLMU-Bench's wording of a choice, and its blank."""
        if self.task == "choice":
            shown = "\n".join(f"{LETTERS[i]}: {option}" for i, option in enumerate(self.options))
            return f"{self.question}\n{shown}\nJust give ONE letter representing the answer directly."
        return self.question.replace("__", "[Blank]") if self.task == "cloze" else self.question

    @property
    def target(self) -> str:
        """What the model should write: the letter of a choice, else the answer."""
        if self.task == "choice":
            return self.letter or LETTERS[self.options.index(self.answer)]
        return self.answer


def digest(records: Sequence[Record]) -> str:
    """A hash of all a record's texts and of its picture: the encoded bytes, or the pixels of one already decoded."""
    found = hashlib.blake2b(digest_size=16)
    pictures: dict[int, bytes] = {}  # a person's questions share one
    for record in records:
        if (image := record.image) is not None and id(image) not in pictures:
            source = getattr(image, "source", image)
            if not isinstance(source, bytes):
                source = source.tobytes() if hasattr(source, "tobytes") else Path(source).read_bytes()
            pictures[id(image)] = hashlib.blake2b(source, digest_size=16).digest()
        found.update(repr(replace(record, image=pictures.get(id(image)))).encode())
    return found.hexdigest()
