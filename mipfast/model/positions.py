"""Which token rows of a batch are meant: by name ("last_prompt", "prompt", ...) or by index."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from mipfast.errors import InputError
from mipfast.model.batch import Batch, Labels, attended, find_labels

log = logging.getLogger("mipfast")
Positions = str | torch.Tensor | list


TEXT_POSITIONS = ("last_prompt", "answer", "first", "prompt", "all", "subject")
VISION_POSITIONS = ("all", "first")


@dataclass(frozen=True, eq=False)
class Rows:
    """Chosen rows of a flattened token dimension: row r is index[r] and belongs to sample[r]. Sorted by sample."""

    sample: torch.Tensor
    index: torch.Tensor

    def groups(self, num_samples: int) -> int | None:
        """num_samples where every sample has the same number of rows, else None."""
        counts = torch.bincount(self.sample, minlength=num_samples)
        return num_samples if bool((counts == counts[0]).all()) else None


def check_name(positions: Any, names: tuple[str, ...]) -> None:
    """Raises InputError for a name that is none of a modality's; indices are checked where they meet a batch."""
    if isinstance(positions, str) and positions not in names:
        raise InputError(f"positions={positions!r}; expected {', '.join(names)}, or indices")


def text_rows(batch: Batch, positions: Positions, labels: Labels | None = None) -> Rows:
    """Rows of the flattened [n·S] token dimension.

    last_prompt: the first position whose logits predict a label. answer: all positions whose logits predict a label,
    first label span. first: the first attended one. prompt: attended ones up to last_prompt. all: attended ones.
    subject: where batch["subject"] [n,S] is true. Otherwise indices [P] for every sample, or [n,P]. labels:
    find_labels(batch), where it is there already.

    Raises InputError for what are no positions, and for a subject that is missing, of another shape or dtype, empty, on
    padding, or behind all that predicts a label."""
    check_name(positions, TEXT_POSITIONS)
    labels = labels or find_labels(batch)
    n, length = batch["labels"].shape
    found = attended(batch)
    seen = torch.ones_like(batch["labels"], dtype=torch.bool) if found is None else found
    steps = torch.arange(length, device=seen.device).expand(n, length)
    last_prompt = labels.index[:, :1]
    if not isinstance(positions, str):
        chosen = torch.zeros_like(seen).scatter(1, _indices(positions, n, length).to(seen.device), True)
    elif positions == "last_prompt":
        chosen = steps == last_prompt
    elif positions == "answer":
        predicts = torch.zeros_like(seen).scatter(1, labels.index, labels.mask)
        ended = (~predicts & (steps > last_prompt)).cumsum(1) > 0
        chosen = predicts & ~ended
    elif positions == "first":
        log.warning(
            "positions='first': in a causal language model the first token's activations are the same for every sample"
        )
        chosen = steps == seen.int().argmax(1, keepdim=True)
    elif positions == "prompt":
        chosen = seen & (steps <= last_prompt)
    elif positions == "subject":
        chosen = _subject(batch, labels, seen, steps)
    else:
        chosen = seen
    sample, position = chosen.nonzero(as_tuple=True)
    return Rows(sample, sample * length + position)


def vision_rows(counts: torch.Tensor, positions: Positions) -> Rows:
    """Rows of a vision tower's flattened tokens; counts [n] of them belong to each sample, in order.

    all, first, or indices [P] or [n,P] within each sample's tokens."""
    check_name(positions, VISION_POSITIONS)
    starts = counts.cumsum(0) - counts
    if isinstance(positions, str) and positions == "all":
        index = torch.arange(int(counts.sum()), device=counts.device)
        return Rows(torch.arange(len(counts), device=counts.device).repeat_interleave(counts), index)
    inside = _indices([0] if isinstance(positions, str) else positions, len(counts), int(counts.min())).to(
        counts.device
    )
    sample = torch.arange(len(counts), device=counts.device).repeat_interleave(inside.shape[1])
    return Rows(sample, (starts[:, None] + inside).flatten())


def _subject(batch: Batch, labels: Labels, seen: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """[n,S] bool: the tokens of every sample's subject."""
    given = batch.get("subject")
    expected = f"expected a bool or int tensor {list(seen.shape)} that is true on the tokens of every sample's subject"
    if not isinstance(given, torch.Tensor) or given.is_floating_point() or given.shape != seen.shape:
        found = f"a {given.dtype} one {list(given.shape)}" if isinstance(given, torch.Tensor) else "none"
        raise InputError(
            f"positions='subject' asks for the batch's subject, found {found}; {expected}: of records that have a "
            "subject, Encoder.batch(records, subject=True) makes it"
        )
    subject, last = (given != 0).to(seen.device), labels.index.where(labels.mask, 0).amax(1, keepdim=True)
    wrong = {
        "is empty": ~subject.any(1, keepdim=True),
        "lies where their attention_mask is 0": subject & ~seen,
        "lies behind the position that predicts their last label, which it cannot influence": subject & (steps > last),
    }
    for what, where in wrong.items():
        if samples := where.any(1).nonzero().flatten().tolist():
            raise InputError(f"positions='subject': the subject of samples {samples} {what}; {expected}")
    return subject


def _indices(positions: torch.Tensor | list, n: int, length: int) -> torch.Tensor:
    """[n,P] int64, ascending and distinct."""
    indices = torch.as_tensor(positions)
    if indices.is_floating_point() or indices.ndim not in (1, 2) or indices.shape[-1] == 0:
        raise InputError(f"positions {positions!r} are not indices; expected integers of shape [P] or [n,P]")
    if indices.ndim == 2 and len(indices) not in (1, n):
        raise InputError(f"positions have rows for {len(indices)} samples; expected {n}, as many as the batch has")
    indices = indices.long().expand(n, -1)
    if not bool(((indices >= 0) & (indices < length)).all()):
        raise InputError(f"positions {indices.min()}..{indices.max()} fall outside this batch's 0..{length - 1}")
    ordered = indices.sort(1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise InputError(f"positions {positions!r} name a token twice; expected distinct indices")
    return ordered
