"""Records to model inputs: a folder's model, and the tokenizer, image processor and chat template it comes with."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mipfast.data.checkpoint import _first_sentence, _loaded
from mipfast.data.records import Picture, Record
from mipfast.errors import InputError, ModelError
from mipfast.model import families

log = logging.getLogger("mipfast")


@dataclass(frozen=True)
class Encoded:
    """A record as token ids."""

    id: str
    prompt: list[int]
    """The picture's placeholders among them."""
    answer: list[int]
    image: Picture | None
    patches: int
    """Of the picture, in the vision tower; 0 without one."""
    subject: list[int] = field(default_factory=list)
    """Indices into the prompt of the subject's tokens; empty where they were not asked for."""

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.answer)


def labelled(tokenizer: Any, prompt: str, answer: str) -> dict[str, torch.Tensor]:
    """A batch of one text without a chat template, its answer labelled; see `Encoder` for all else.

    Args:
        tokenizer: the model's.
        prompt: the text before the answer.
        answer: with the space that separates it from the prompt, where the tokenizer wants one. Both are tokenised on
            their own: counting the prompt's tokens in the whole text goes wrong where a tokenizer appends an end token.

    Returns:
        input_ids and labels [1,S] int64, -100 but for the answer.

    Raises:
        InputError: for a prompt or an answer without tokens.

    Example:
        >>> import mipfast
        >>> from pathlib import Path
        >>> from mipfast.data import labelled
        >>> from mipfast.samples import Encoder
        >>> encoder = Encoder.from_pretrained(Path(mipfast.__file__).parent / "demo" / "weights" / "base")
        >>> labelled(encoder.tokenizer, "Name the pet", "dog")["labels"].tolist()[0][:-1]
        [-100, -100, -100]
    """
    before = _opened(tokenizer, prompt)
    scored = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    _check_tokens(before, scored)
    labels = [-100] * len(before) + scored
    return {"input_ids": torch.tensor([before + scored]), "labels": torch.tensor([labels])}


def _opened(tokenizer: Any, text: str, special: bool = True) -> list[Any]:
    """The tokens of a text behind which an answer stands: with what the tokenizer puts in front, without an end."""
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(text)["input_ids"]) if special else plain
    ends = (at + len(plain) for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
    return whole[: next(ends, len(whole))]


def _check_tokens(prompt: list[int], answer: list[int]) -> None:
    if not prompt or not answer:
        raise InputError(f"the {'answer' if prompt else 'prompt'} gives no token; expected at least one")


class Encoder:
    """Records to model inputs.

    With a chat template the prompt is the user's turn and the answer begins the assistant's; without one the answer's
    tokens follow the prompt's. Both are tokenised on their own, so that the boundary between them is a boundary between
    tokens: without a template begin an answer with the space that separates it where the tokenizer wants one. Only the
    answer is labelled, without an end token unless a batch asks for one. A picture stands where the prompt has one
    placeholder token, else before the prompt.

    Args:
        tokenizer: the model folder's.
        image_processor: the model folder's; None reads text only.
        config: the model folder's.
        processor: the family's, where it can be built; it says how many tokens a picture takes. Without it that is
            known for Qwen-VL alone, whose processor asks for torchvision because of its videos.

    Example:
        >>> import mipfast
        >>> from pathlib import Path
        >>> from mipfast.data import Record
        >>> from mipfast.samples import Encoder
        >>> encoder = Encoder.from_pretrained(Path(mipfast.__file__).parent / "demo" / "weights" / "base")
        >>> record = Record("7", "pets", "text", "generation", "Name the pet", "dog")
        >>> batch = encoder.batch([record])
        >>> encoder.tokenizer.decode(batch["input_ids"][0]), batch["labels"].tolist()[0][:-1]
        ('Name the pet dog', [-100, -100, -100])
        >>> encoder.tokenizer.decode(encoder.prompts([record])["input_ids"][0])
        'Name the pet'
    """

    def __init__(self, tokenizer: Any, image_processor: Any, config: Any, processor: Any = None):
        self.tokenizer, self.image_processor, self.config = tokenizer, image_processor, config
        self.processor = processor
        self._expansions: dict[tuple[int, int], tuple[list[int], int]] = {}

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Encoder:
        """The encoder of a local folder or Hub id. Raises ModelError where it has no config or tokenizer."""
        from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, ProcessorMixin

        config, tokenizer = _loaded(AutoConfig, folder), _loaded(AutoTokenizer, folder)
        images = processor = None
        if hasattr(config, "vision_config"):
            images = _loaded_if_there(AutoImageProcessor, folder, "no pictures can be read")
        if images:
            missing = "no processor, so pictures go by the image processor"
            processor = _loaded_if_there(AutoProcessor, folder, missing)
        if isinstance(processor, ProcessorMixin):  # of a folder without its files it is the tokenizer
            return cls(processor.tokenizer, processor.image_processor, config, processor)
        return cls(tokenizer, images, config)

    def fingerprint(self) -> str:
        """A hash of what turns records into inputs, and of what the template makes of a prompt now: it may write the
        date."""
        parts = [
            repr(self.tokenizer(self._text("prompt", None))["input_ids"]),
            self.tokenizer.backend_tokenizer.to_str() if self.tokenizer.is_fast else repr(self.tokenizer.get_vocab()),
            repr(getattr(self._renderer, "chat_template", None)),
            self.image_processor.to_json_string() if self.image_processor else "",
            type(self.processor).__name__,
        ]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()

    def encode(self, record: Record, subject: bool = False) -> Encoded:
        """A record as token ids; of a picture only the size is read.

        Args:
            record: what is asked and answered.
            subject: find the tokens of the record's subject too, where it stands last in the question.

        Raises:
            InputError: for a picture that cannot be encoded here, a prompt with placeholders but no picture, an answer
                without tokens, more tokens than the model takes, or a subject that is asked for and not found; without
                the record's id.
        """
        picture, patches = _picture(record.image), 0
        if picture:
            self._check_sees()
        try:
            f"{record.prompt}{record.target}".encode()
        except UnicodeEncodeError as error:  # tokenizers raise a TypeError that names no text
            raise InputError(f"the text is no Unicode ({error}); mend its \\ud800 to \\udfff") from error
        text = self._text(record.prompt, picture)
        special = self._adds_bos(text)
        prompt = _opened(self.tokenizer, text, special)
        about = self._subject(record, text, special) if subject else []
        count = prompt.count(self._image_token) if self._image_token is not None else 0
        if count != bool(picture):
            raise InputError(f"the prompt has {count} image placeholders; expected {'one' if picture else 'none'}")
        if picture:
            at = prompt.index(self._image_token)
            tokens, patches = self._expansion(text, prompt, at, picture.size)
            prompt[at : at + 1] = tokens
            about = [i + (len(tokens) - 1) * (i > at) for i in about]
        answer = list(self.tokenizer(record.target, add_special_tokens=False)["input_ids"])
        _check_tokens(prompt, answer)
        longest = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and len(prompt) + len(answer) > longest:
            raise InputError(f"{len(prompt) + len(answer)} tokens; the model takes {longest}: shorten the sample")
        return Encoded(record.id, prompt, answer, picture, patches, about)

    def batch(
        self, records: Sequence[Record | Encoded], end: bool = False, subject: bool = False
    ) -> dict[str, torch.Tensor]:
        """What model(**batch) takes, padded on the right.

        Args:
            records: with and without pictures, if need be.
            end: every answer ends with the tokenizer's end token, labelled, as in training.
            subject: mark the records' subjects, for positions="subject"; a model itself refuses such a batch.

        Returns:
            input_ids, attention_mask and labels [n,S] int64 (-100 but for the answers), for a Qwen-VL also
            mm_token_type_ids [n,S], and with pictures the image processor's outputs: pixel_values [patches, ...] and
            image_grid_thw [pictures,3] for a Qwen-VL, pixel_values [pictures,3,height,width] for LLaVA. Where subjects
            were asked for, here or in `encode`, also subject [n,S] bool.

        Raises:
            InputError: for a record that `encode` refuses, with its id, or a tokenizer without an end token.
        """
        rows = self.encoded(records, subject)
        if end and self.tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no end token, so no model could learn to stop; set its eos_token")
        answers = [row.answer + [self.tokenizer.eos_token_id] * end for row in rows]
        batch = self._inputs(rows, [row.prompt + answer for row, answer in zip(rows, answers, strict=True)], "right")
        labels = torch.full_like(batch["input_ids"], -100)
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            labels[i, len(row.prompt) : len(row.prompt) + len(answer)] = torch.tensor(answer)
        batch["labels"] = labels
        if any(row.subject for row in rows):
            batch["subject"] = torch.zeros_like(labels, dtype=torch.bool)
            for i, row in enumerate(rows):
                batch["subject"][i, row.subject] = True
        return batch

    def prompts(self, records: Sequence[Record | Encoded]) -> dict[str, torch.Tensor]:
        """What model.generate(**prompts) takes: `batch` without answers and labels, padded on the left.

        Raises:
            InputError: for a record that `encode` refuses, with its id.
        """
        rows = self.encoded(records)
        return self._inputs(rows, [row.prompt for row in rows], "left")

    def encoded(self, records: Sequence[Record | Encoded], subject: bool = False) -> list[Encoded]:
        """Each of them encoded. Raises InputError with the record's id."""
        return [self._named(record, subject) if isinstance(record, Record) else record for record in records]

    def _named(self, record: Record, subject: bool) -> Encoded:
        try:
            return self.encode(record, subject)
        except InputError as error:
            raise InputError(f"record {record.id} of {record.group}: {error}") from error

    def _inputs(self, rows: list[Encoded], ids: list[list[int]], side: str) -> dict[str, torch.Tensor]:
        longest = max(map(len, ids))
        padding = next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)
        tokens = torch.full((len(ids), longest), padding)
        mask = torch.zeros_like(tokens)
        for i, row in enumerate(ids):
            start = longest - len(row) if side == "left" else 0
            tokens[i, start : start + len(row)], mask[i, start : start + len(row)] = torch.tensor(row), 1
        inputs = {"input_ids": tokens, "attention_mask": mask}
        if self._is_qwen_vl():
            inputs["mm_token_type_ids"] = (tokens == self.config.image_token_id).int()
        if pictures := [row for row in rows if row.image]:
            inputs |= self._pixels(pictures)
        return inputs

    @property
    def _renderer(self) -> Any:
        return self.processor if getattr(self.processor, "chat_template", None) else self.tokenizer

    @property
    def _template(self) -> bool:
        return bool(self._renderer.chat_template)

    @property
    def _image_token(self) -> int | None:
        return getattr(self.config, "image_token_id", None)

    def _check_sees(self) -> None:
        by_size = self._is_qwen_vl() and hasattr(self.image_processor, "get_number_of_image_patches")
        if not (self.processor or by_size):
            raise InputError(
                f"pictures for {self.config.model_type} cannot be encoded here; expected a folder with its processor, "
                "or a Qwen-VL (image_token_id, vision_start_token_id and vision_end_token_id in its config, an image "
                "processor in its folder). Call mipfast.locate on batches of the model's own processor instead"
            )

    def _adds_bos(self, text: str) -> bool:
        """As transformers does: a tokenizer's template writes all special tokens, a processor adds a BOS that its
        template has not written."""
        if self.processor is None and self._template:
            return False
        return not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))

    def _text(self, prompt: str, picture: Picture | None) -> str:
        """The prompt as the model is shown it, with one placeholder for a picture."""
        if not self._template:
            return self._placeholder(prompt) + prompt if picture else prompt
        text = {"type": "text", "text": prompt}
        contents: list[Any] = [[{"type": "image"}, text]] if picture else [prompt, [text]]
        for content in contents:
            turn = [{"role": "user", "content": content}]
            try:
                shown = self._renderer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # a template is a program
                raise InputError(f"the chat template raises {type(error).__name__} ({error}); mend it") from error
            if prompt.strip() in shown:  # a template made for parts shows nothing of a plain text
                return shown
        raise InputError("the chat template does not show the prompt; expected one with a user's turn")

    def _subject(self, record: Record, text: str, special: bool) -> list[int]:
        """Which tokens of a text that shows the record's prompt hold its subject, where it stands last in the
        question."""
        subject, prompt = record.subject.strip(), record.prompt.strip()
        if not subject:
            raise InputError("it has no subject; expected the words of the question that say whom or what it is about")
        if not self.tokenizer.is_fast:
            raise InputError(
                f"{type(self.tokenizer).__name__} does not tell which letters a token stands for; expected a fast "
                "tokenizer, or batches that mark the subject themselves"
            )
        question = record.question.strip() if record.task == "choice" else prompt  # options may name it too
        if subject not in question:
            raise InputError(f"its subject {subject!r} is not in {question!r}; expected words of the question, exactly")
        start = text.rindex(prompt) + question.rindex(subject)
        stop = start + len(subject)
        spans = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)["offset_mapping"]
        found = [i for i, (first, end) in enumerate(spans) if first < stop and end > start]
        if not found:
            raise InputError(f"its subject {subject!r} gives no token; expected at least one")
        return found

    def _placeholder(self, prompt: str) -> str:
        """What goes before a prompt without a template: nothing where the prompt has a placeholder itself."""
        config = self.config
        tokens = (
            [config.vision_start_token_id, self._image_token, config.vision_end_token_id]
            if self._is_qwen_vl()
            else [self._image_token]
        )
        names = self.tokenizer.convert_ids_to_tokens([token for token in tokens if token is not None])
        return "" if not names or any(name in prompt for name in names) else "".join(names)

    def _is_qwen_vl(self) -> bool:
        return all(getattr(self.config, name, None) is not None for name in families.QWEN_VL_TOKENS)

    def _expansion(self, text: str, prompt: list[int], at: int, size: tuple[int, int]) -> tuple[list[int], int]:
        """What the placeholder at a place of the prompt becomes for a picture of that (width, height), and the
        picture's patches. Depends on the size alone."""
        if size not in self._expansions:
            self._expansions[size] = (
                self._by_processor(text, prompt, at, size) if self.processor else self._by_size(size)
            )
        return self._expansions[size]

    def _by_processor(self, text: str, prompt: list[int], at: int, size: tuple[int, int]) -> tuple[list[int], int]:
        """The processor's own tokens for a blank picture, which must stand where the placeholder stood, all else
        unchanged."""
        from PIL import Image

        blank = Image.new("RGB", size)
        bos = {"add_special_tokens": self._adds_bos(text)}
        inputs = self.processor(text=[text], images=[blank], return_tensors="pt", **bos)
        whole, tail = inputs["input_ids"][0].tolist(), len(prompt) - at - 1
        stop = len(whole) - tail
        if whole[:at] != prompt[:at] or whole[stop:] != prompt[at + 1 :]:
            raise InputError(
                f"{type(self.processor).__name__} changes more of the prompt than its image placeholder; call "
                "mipfast.locate on batches of the processor instead"
            )
        if "image_grid_thw" in inputs:
            return whole[at:stop], int(inputs["image_grid_thw"].prod())
        patch = getattr(self.config.vision_config, "patch_size", 1)
        *_, height, width = inputs["pixel_values"].shape
        pictures = inputs["pixel_values"].shape[:-3].numel()
        return whole[at:stop], pictures * (height // patch) * (width // patch)

    def _by_size(self, size: tuple[int, int]) -> tuple[list[int], int]:
        width, height = size
        patches = int(self.image_processor.get_number_of_image_patches(height, width, {}))
        return [self.config.image_token_id] * (patches // self.image_processor.merge_size**2), patches

    def _pixels(self, rows: list[Encoded]) -> dict[str, torch.Tensor]:
        pictures = [row.image.open() for row in rows if row.image]
        pixels = self.image_processor(images=pictures, return_tensors="pt")
        if "image_grid_thw" in pixels:
            for row, patches in zip(rows, pixels["image_grid_thw"].prod(-1).tolist(), strict=True):
                if patches != row.patches:
                    where = row.image.where if row.image else row.id
                    raise InputError(f"{where} changed since the run began; start again into another folder")
        return {name: pixels[name] for name in self.image_processor.model_input_names if name in pixels}


def _loaded_if_there(auto: Any, folder: str | Path, missing: str) -> Any:
    """None where there is none: text alone needs none."""
    try:
        return _loaded(auto, folder)
    except ModelError as error:
        log.info("%s: %s", missing, _first_sentence(error.__cause__ or error))
        return None


def in_batches(rows: Sequence[Encoded], batch_size: int) -> list[list[int]]:
    """Batches of one kind, with pictures or without, and of similar length.

    Sorted by the prompts first, because a replay starts where the shortest prompt of its batch ends.

    Returns:
        Of every batch its indices into rows, at most batch_size.
    """
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].prompt), len(rows[i].answer)))
    kinds = [[i for i in order if bool(rows[i].image) == pictures] for pictures in (False, True)]
    return [kind[i : i + batch_size] for kind in kinds for i in range(0, len(kind), batch_size)]


class Batches(Sequence[dict[str, torch.Tensor]]):
    """The batches of `in_batches` on a device, each made anew when it is asked for: the pixels of a whole retain set
    are too many (1000 patches of a Qwen-VL are 4.7 MB, for every question about the picture)."""

    def __init__(
        self, encoder: Encoder, records: Sequence[Record], batch_size: int, device: Any, subject: bool = False
    ):
        self.encoder, self.device, self.rows = encoder, device, encoder.encoded(records, subject)
        self.order = in_batches(self.rows, batch_size)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: Any) -> Any:
        batch = self.encoder.batch([self.rows[i] for i in self.order[number]])
        return {name: value.to(self.device) for name, value in batch.items()}


def _picture(image: Any) -> Picture | None:
    return image if image is None or isinstance(image, Picture) else Picture(image)
