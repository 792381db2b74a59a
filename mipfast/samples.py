"""Samples of a JSONL data file, and a folder's model, tokenizer and image processor that turn them into batches."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mipfast.cost import auto_class
from mipfast.errors import InputError, ModelError

log = logging.getLogger("mipfast")

KEYS = {"prompt": str, "answer": str, "image": str}
EXPECTED = 'expected one object a line, {"prompt": text, "answer": text} and optionally "image": path'


@dataclass(frozen=True)
class Sample:
    """One line of a data file. line: its number, from 1; image: resolved against the file's folder."""

    line: int
    prompt: str
    answer: str
    image: Path | None


@dataclass(frozen=True)
class Encoded:
    """A sample as token ids, image placeholders among the prompt's. patches: of its image in the vision tower."""

    line: int
    prompt: list[int]
    answer: list[int]
    image: Path | None
    patches: int

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.answer)


def read_samples(data: str | Path, limit: int | None = None) -> Iterator[Sample]:
    """The lines of a JSONL file, at most limit of them. Raises InputError, with the line's number, for one that is not
    {"prompt": str, "answer": str, "image": optional path of a file}."""
    data = Path(data)
    try:
        with data.open("rb") as lines:
            for number, line in enumerate(islice(lines, limit), 1):
                try:
                    yield _sample(number, line, data.parent)
                except ValueError as error:
                    raise InputError(f"{data}, line {number}: {error}; {EXPECTED}") from error
    except OSError as error:
        raise InputError(f"cannot read {data} ({error.strerror}); expected a JSONL file") from error


def _sample(number: int, line: bytes, folder: Path) -> Sample:
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
    image = folder / found["image"] if "image" in found else None
    if image is not None and not image.is_file():
        raise ValueError(f"there is no image {image}")
    return Sample(number, found["prompt"], found["answer"], image)


class Encoder:
    """Samples to model inputs.

    With a chat template the prompt is the user's turn and the answer begins the assistant's; without one the answer's
    tokens follow the prompt's. Both are tokenised on their own: begin an answer with the space that separates it where
    the tokenizer wants one. Only the answer is labelled, without an end token. A picture stands where the prompt has
    one placeholder token, else before the prompt. tokenizer, image_processor (None: text only) and config are the
    model folder's."""

    def __init__(self, tokenizer: Any, image_processor: Any, config: Any):
        self.tokenizer, self.image_processor, self.config = tokenizer, image_processor, config

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Encoder:
        """Raises ModelError where there is no config or tokenizer."""
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

        config = _loaded(AutoConfig, folder)
        tokenizer = _loaded(AutoTokenizer, folder)
        # not the processor of the whole family: that one asks for torchvision because of its videos
        try:
            images = _loaded(AutoImageProcessor, folder) if hasattr(config, "vision_config") else None
        except (ModelError, ImportError) as error:  # text alone needs neither
            log.info("no pictures can be read: %s", error)
            images = None
        return cls(tokenizer, images, config)

    def fingerprint(self) -> str:
        """A hash of what turns samples into inputs."""
        parts = [
            self.tokenizer.backend_tokenizer.to_str() if self.tokenizer.is_fast else repr(self.tokenizer.get_vocab()),
            repr(self.tokenizer.chat_template),
            self.image_processor.to_json_string() if self.image_processor else "",
        ]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()

    def encode(self, sample: Sample) -> Encoded:
        """Of an image only the size is read. Raises InputError, without the line's number."""
        prompt, patches = self._prompt(sample), 0
        if sample.image is not None:
            patches = self._patches(sample.image)
            prompt = self._with_placeholders(prompt, patches)
        answer = self.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
        if not prompt or not answer:
            raise InputError(f"the {'answer' if prompt else 'prompt'} gives no token; expected at least one")
        longest = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and len(prompt) + len(answer) > longest:
            raise InputError(f"{len(prompt) + len(answer)} tokens; the model takes {longest}: shorten the sample")
        return Encoded(sample.line, prompt, answer, sample.image, patches)

    def batch(self, samples: list[Encoded]) -> dict[str, torch.Tensor]:
        """What model(**batch) takes, padded on the right: input_ids, attention_mask and labels [n,S], for a Qwen-VL
        also mm_token_type_ids, and with pictures pixel_values [patches, ...] and image_grid_thw [n,3]."""
        shape = len(samples), max(s.tokens for s in samples)
        ids, labels = torch.full(shape, self._padding()), torch.full(shape, -100)
        mask = torch.zeros(shape, dtype=torch.int64)
        for i, sample in enumerate(samples):
            start, stop = len(sample.prompt), sample.tokens
            ids[i, :stop], mask[i, :stop] = torch.tensor(sample.prompt + sample.answer), 1
            labels[i, start:stop] = ids[i, start:stop]
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self._is_qwen_vl():
            batch["mm_token_type_ids"] = (ids == self.config.image_token_id).int()
        if pictures := [sample for sample in samples if sample.image]:
            parts = [self._pixels(sample) for sample in pictures]
            batch |= {name: torch.cat([part[name] for part in parts]) for name in ("pixel_values", "image_grid_thw")}
        return batch

    def _prompt(self, sample: Sample) -> list[int]:
        if not self.tokenizer.chat_template:
            return list(self.tokenizer(sample.prompt)["input_ids"])
        text = {"type": "text", "text": sample.prompt}
        contents: list[Any] = [[{"type": "image"}, text]] if sample.image else [sample.prompt, [text]]
        for content in contents:
            turn = [{"role": "user", "content": content}]
            shown = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            if sample.prompt.strip() in shown:  # a template made for parts shows nothing of a plain text
                return list(self.tokenizer(shown, add_special_tokens=False)["input_ids"])
        raise InputError("the tokenizer's chat template does not show the prompt; expected one with a user's turn")

    def _is_qwen_vl(self) -> bool:
        names = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
        return all(getattr(self.config, name, None) is not None for name in names)

    def _patches(self, image: Path) -> int:
        if find_spec("PIL") is None:
            raise InputError("pictures need Pillow, which is not installed; run: pip install 'mipfast[data]'")
        from PIL import Image

        if not (self._is_qwen_vl() and hasattr(self.image_processor, "get_number_of_image_patches")):
            raise InputError(
                f"pictures for {self.config.model_type} cannot be encoded here; expected a Qwen-VL (image_token_id, "
                "vision_start_token_id and vision_end_token_id in its config, an image processor in its folder). "
                "Call mipfast.locate on batches of the model's own processor instead"
            )
        try:
            with Image.open(image) as opened:
                width, height = opened.size
        except OSError as error:
            raise InputError(f"{image} cannot be read as a picture ({error})") from error
        return int(self.image_processor.get_number_of_image_patches(height, width, {}))

    def _with_placeholders(self, prompt: list[int], patches: int) -> list[int]:
        one, config = self.config.image_token_id, self.config
        tokens = [one] * (patches // self.image_processor.merge_size**2)
        if prompt.count(one) == 1:
            at = prompt.index(one)
            return [*prompt[:at], *tokens, *prompt[at + 1 :]]
        if prompt.count(one) or self.tokenizer.chat_template:
            raise InputError(f"the prompt has {prompt.count(one)} image placeholders; expected one for its image")
        return [config.vision_start_token_id, *tokens, config.vision_end_token_id, *prompt]

    def _pixels(self, sample: Encoded) -> dict[str, torch.Tensor]:
        from PIL import Image

        assert sample.image is not None  # the caller saw to it
        try:
            with Image.open(sample.image) as opened:
                pixels = self.image_processor([opened.convert("RGB")], return_tensors="pt")
        except OSError as error:
            raise InputError(f"{sample.image} cannot be read as a picture ({error})") from error
        if int(pixels["image_grid_thw"].prod()) != sample.patches:
            raise InputError(f"{sample.image} changed since the run began; start again into another folder")
        return dict(pixels)

    def _padding(self) -> int:
        return next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)


def load_model(folder: str | Path, device: str = "cpu", dtype: str = "auto") -> nn.Module:
    """The model of a local folder or Hub id in eval mode, with its vision tower where it has one. No code from the
    folder runs. Raises ModelError where there is none."""
    from transformers import AutoConfig

    model = _loaded(auto_class(_loaded(AutoConfig, folder)), folder, dtype=dtype)
    return model.eval().to(device)


def _loaded(auto: Any, folder: str | Path, **options: Any) -> Any:
    """Raises ModelError in place of transformers' errors for a folder that lacks something."""
    try:
        return auto.from_pretrained(folder, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{folder} gives no {auto.__name__} ({first}); expected a transformers folder or Hub id"
        ) from error
