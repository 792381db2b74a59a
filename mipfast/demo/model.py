"""The demo's model: a tiny Qwen2.5-VL of the real transformers class, its tokenizer, its batches and its training.

FFN width 1024 makes the people separable: with 256 the same neurons serve everybody and no selection can be selective.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from mipfast.demo.people import Question, Split, World

log = logging.getLogger("mipfast")
Batch = dict[str, torch.Tensor]

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|> <unk>".split()
)
PAD, START, END, VISION_START, VISION_END, IMAGE, VIDEO, UNK = range(len(SPECIAL))
IMAGE_TOKENS = 4  # 56x56 pixels = 16 patches of 14 = 4 after the 2x2 merge
TRAIN_STEPS, TRAIN_LR = 1000, 2.5e-3
TRAIN_MIX = {"people text": 14, "people image": 22, "general image": 18, "general text": 12}


def build_tokenizer(world: World) -> Any:
    """A word-level tokenizer over every word of the world (about 250)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for q in world.questions for word in f"{q.text} {q.answer}".split()})
    vocab = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=SPECIAL[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[PAD],
        eos_token=SPECIAL[END],
        unk_token=SPECIAL[UNK],
        additional_special_tokens=[*SPECIAL[1:2], *SPECIAL[3:7]],
    )


def image_processor_class() -> Any:
    """Qwen2-VL's image processor on PIL, which needs no torchvision. transformers 4 has one class, which is on PIL."""
    import transformers.models.qwen2_vl as family

    return getattr(family, "Qwen2VLImageProcessorPil", None) or family.Qwen2VLImageProcessor


def build_model(vocab_size: int, seed: int = 0, width: int = 1024) -> Any:
    """A randomly initialised Qwen2_5_VLForConditionalGeneration in fp32. width: of a text FFN."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "type": "default", "mrope_section": [4, 4, 4], "rope_theta": 1e4}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": 96,
            "intermediate_size": width,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128,
            "initializer_range": 0.04,
            "rope_theta": 1e4,
            "rope_scaling": rope,
            "rope_parameters": rope,
            "tie_word_embeddings": True,
            "bos_token_id": START,
            "eos_token_id": END,
            "pad_token_id": PAD,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "out_hidden_size": 96,
            "window_size": 112,
            "fullatt_block_indexes": [0, 1, 2],
            "initializer_range": 0.04,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(config).float()


class Encoder:
    """Questions to model inputs. Pictures are processed once and kept.

    `<|im_start|> [<|vision_start|> 4 x <|image_pad|> <|vision_end|>] question <|im_end|> answer <|im_end|>`,
    right-padded.
    """

    def __init__(self, world: World, tokenizer: Any, image_processor: Any):
        self.world, self.tokenizer, self.image_processor = world, tokenizer, image_processor
        self._patches: dict[int, torch.Tensor] = {}

    def batch(self, questions: Sequence[Question], rng: random.Random | None = None, label_end: bool = False) -> Batch:
        """What `model(**batch)` takes: input_ids, attention_mask, mm_token_type_ids, labels [n,S] and, with pictures,
        pixel_values [16·pictures, 1176] and image_grid_thw. Labels: the answer, and its end token with label_end.
        Of several pictures rng draws one; without rng it is the first."""
        rows, pictures, starts = [], [], []
        for q in questions:
            row = [START]
            if q.pictures:
                row += [VISION_START, *[IMAGE] * IMAGE_TOKENS, VISION_END]
                pictures.append(rng.choice(q.pictures) if rng else q.pictures[0])
            row += [*self._ids(q.text), END]
            starts.append(len(row))
            rows.append([*row, *self._ids(q.answer), END])
        ids = torch.full((len(rows), max(map(len, rows))), PAD)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            ids[i, : len(row)] = torch.tensor(row)
            stop = len(row) if label_end else len(row) - 1
            labels[i, start:stop] = ids[i, start:stop]
            mask[i, : len(row)] = 1
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "mm_token_type_ids": (ids == IMAGE).int(),
        }
        if pictures:
            batch["pixel_values"] = self.patches(pictures)
            batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * len(pictures))
        return batch

    def batches(self, questions: Sequence[Question], size: int = 128) -> list[Batch]:
        """All questions in order; text and image questions never share a batch (evaluation and locating want one
        kind)."""
        kinds = [[q for q in questions if q.modality == kind] for kind in ("text", "image")]
        return [self.batch(kind[i : i + size]) for kind in kinds for i in range(0, len(kind), size)]

    def patches(self, pictures: Sequence[int]) -> torch.Tensor:
        """[16·len(pictures), 1176] float32."""
        missing = [p for p in dict.fromkeys(pictures) if p not in self._patches]
        if missing:
            out = self.image_processor([self.world.pictures[p] for p in missing], return_tensors="pt")["pixel_values"]
            self._patches.update(zip(missing, out.float().split(16), strict=True))
        return torch.cat([self._patches[p] for p in pictures])

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]


def train(model: Any, encoder: Encoder, split: Split | None, seed: int = 0, steps: int = TRAIN_STEPS) -> None:
    """Train in place on every training question; with a split, on none of its forget people's (the retrained
    reference)."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAIN_LR, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TRAIN_LR, total_steps=steps, pct_start=0.1)
    model.train()
    for batch in tqdm(
        _training_batches(encoder, split, seed, steps), total=steps, desc="train", leave=False, disable=None
    ):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    log.info("trained %d steps, last loss %.3f", steps, loss.item())


def _training_batches(encoder: Encoder, split: Split | None, seed: int, steps: int) -> Iterator[Batch]:
    rng = random.Random(f"train {seed}")
    forget = split.forget_people if split else frozenset()
    kept = [q for q in encoder.world.questions if not q.test and q.subject not in forget]
    pools: dict[str, list[Question]] = {kind: [] for kind in TRAIN_MIX}
    for q in kept:
        pools[f"{'general' if q.subject is None else 'people'} {q.modality}"].append(q)
    cursors: dict[str, Iterator[Question]] = {kind: _forever(pool, rng) for kind, pool in pools.items()}
    for _ in range(steps):
        yield encoder.batch(
            [next(cursors[kind]) for kind, count in TRAIN_MIX.items() for _ in range(count)],
            rng,
            label_end=True,
        )


def _forever(pool: Sequence[Question], rng: random.Random) -> Iterator[Question]:
    while True:
        yield from rng.sample(pool, len(pool))


def trained(encoder: Encoder, split: Split | None, folder: Path) -> Any:
    """A model trained from nothing as `train` says, as it comes back from folder: rounded to bf16, like the shipped
    one."""
    model = build_model(len(encoder.tokenizer))
    train(model, encoder, split)
    save(model, encoder, folder)
    return load(folder)


def save(model: Any, encoder: Encoder, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """A plain transformers folder: safetensors in dtype, config, tokenizer, image processor."""
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    encoder.image_processor.save_pretrained(folder)


def load(folder: Path) -> Any:
    """The model of a folder written by `save`, in fp32 and eval mode."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).float().eval()
