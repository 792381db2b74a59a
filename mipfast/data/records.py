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

    Example:
        >>> from PIL import Image
        >>> from mipfast.data import Picture
        >>> picture = Picture(Image.new("L", (4, 3)))
        >>> picture.size, picture.open().mode
        ((4, 3), 'RGB')
    """

    source: Any = field(repr=False)
    """A file's bytes, a path or a PIL.Image."""
    where: str = "the picture"
    """What messages call it."""

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
    """One question of a benchmark, whatever table or file it came from, with its answer.

    Example:
        >>> from mipfast.data import Record
        >>> record = Record("7/choice", "forget_5", "text", "choice", "Where is Rome?", "Italy", ("Spain", "Italy"))
        >>> print(record.prompt)
        Where is Rome?
        A: Spain
        B: Italy
        Just give ONE letter representing the answer directly.
        >>> record.target
        'B'
    """

    id: str
    """Unique within its group, with the person's or row's own id in front of the first "/"."""
    group: str
    """The set it came from, such as forget_5."""
    modality: Literal["text", "image"]
    """One of RECORD_MODALITIES: image where the question is about a picture."""
    task: Literal["generation", "choice", "cloze"]
    question: str
    answer: str
    options: tuple[str, ...] = ()
    """Of a choice, in the order shown; the answer is one of them."""
    image: Any = None
    """A Picture (or what one is made of) or None; only modality="image" has one."""
    paraphrase: str = ""
    """The answer reworded, for the truth ratio; empty where the table has none."""
    perturbed: tuple[str, ...] = ()
    """Wrong answers of the same form as the answer; empty where the table has none."""
    letter: str = ""
    """Of a choice, the answer's letter where the table says it."""
    subject: str = ""
    """Whom or what is asked about, in the question's own words; empty where it is not said."""

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
    whole = hashlib.blake2b(digest_size=16)
    pictures: dict[int, bytes] = {}  # a person's questions share one
    for record in records:
        if (image := record.image) is not None and id(image) not in pictures:
            source = getattr(image, "source", image)
            if not isinstance(source, bytes):
                source = source.tobytes() if hasattr(source, "tobytes") else Path(source).read_bytes()
            pictures[id(image)] = hashlib.blake2b(source, digest_size=16).digest()
        whole.update(repr(replace(record, image=pictures.get(id(image)))).encode())
    return whole.hexdigest()
