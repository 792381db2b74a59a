"""Which token rows of a batch are meant: by name ("last_prompt", "prompt", ...) or by index."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mipfast.errors import InputError

log = logging.getLogger("mipfast")
Batch = Mapping[str, torch.Tensor]
Positions = str | torch.Tensor | list

TEXT_POSITIONS = ("last_prompt", "answer", "first", "prompt", "all")
VISION_POSITIONS = ("all", "first")


@dataclass(frozen=True, eq=False)
class Labels:
    """The scored tokens of n samples, padded to q: index [n,q] is the position whose logits predict target [n,q]; mask
    [n,q] is False on padding."""

    index: torch.Tensor
    target: torch.Tensor
    mask: torch.Tensor

    @property
    def num_samples(self) -> int:
        return len(self.mask)


@dataclass(frozen=True, eq=False)
class Rows:
    """Chosen rows of a flattened token dimension: row r is index[r] and belongs to sample[r]. Sorted by sample."""

    sample: torch.Tensor
    index: torch.Tensor

    def groups(self, num_samples: int) -> int | None:
        """num_samples where every sample has the same number of rows, else None."""
        counts = torch.bincount(self.sample, minlength=num_samples)
        return num_samples if bool((counts == counts[0]).all()) else None


def without_labels(batch: Batch) -> dict[str, Any]:
    """The batch as the model's inputs: with labels, transformers would compute a loss nobody reads."""
    return {name: value for name, value in batch.items() if name != "labels"}


def find_labels(batch: Batch) -> Labels:
    """The scored tokens of batch["labels"] [n,S]; -100 is not scored, and neither is position 0, which nothing
    predicts.

    Raises InputError without labels, and for samples in which all are -100."""
    labels = batch.get("labels")
    if labels is None:
        raise InputError(
            f"the batch has no labels (it has {', '.join(batch)}); expected labels [n,S] with -100 on unscored tokens"
        )
    if labels.ndim != 2:
        raise InputError(f"labels have shape {tuple(labels.shape)}; expected [n,S]")
    scored = labels[:, 1:] != -100
    empty = (~scored.any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"labels of samples {empty} are all -100: nothing to score; label the answer tokens")
    q = int(scored.sum(1).max())
    index = scored.int().sort(dim=1, descending=True, stable=True).indices[:, :q]  # scored positions first, in order
    mask = scored.gather(1, index)
    target = labels[:, 1:].gather(1, index).where(mask, 0)
    return Labels(index, target, mask)


def text_rows(batch: Batch, positions: Positions) -> Rows:
    """Rows of the flattened [n·S] token dimension.

    last_prompt: the first position whose logits predict a label. answer: all positions whose logits predict a label,
    first label span. first: position 0. prompt: attended positions up to last_prompt. all: attended positions.
    Otherwise indices [P] for every sample, or [n,P]."""
    labels = find_labels(batch)
    n, length = batch["labels"].shape
    mask = batch.get("attention_mask")
    attended = (
        mask.bool() if mask is not None and mask.ndim == 2 else torch.ones_like(batch["labels"], dtype=torch.bool)
    )
    steps = torch.arange(length, device=attended.device).expand(n, length)
    last_prompt = labels.index[:, :1]
    if not isinstance(positions, str):
        chosen = torch.zeros_like(attended).scatter(1, _indices(positions, n, length).to(attended.device), True)
    elif positions == "last_prompt":
        chosen = steps == last_prompt
    elif positions == "answer":
        predicts = torch.zeros_like(attended)
        predicts[:, :-1] = batch["labels"][:, 1:] != -100
        ended = (~predicts & (steps > last_prompt)).cumsum(1) > 0
        chosen = predicts & ~ended
    elif positions == "first":
        log.warning(
            "positions='first': in a causal language model the first token's activations are the same for every sample"
        )
        chosen = steps == 0
    elif positions == "prompt":
        chosen = attended & (steps <= last_prompt)
    elif positions == "all":
        chosen = attended
    else:
        raise InputError(f"unknown text positions {positions!r}; expected {', '.join(TEXT_POSITIONS)}, or indices")
    sample, position = chosen.nonzero(as_tuple=True)
    return Rows(sample, sample * length + position)


def vision_rows(counts: torch.Tensor, positions: Positions) -> Rows:
    """Rows of a vision tower's flattened tokens; counts [n] of them belong to each sample, in order.

    all, first, or indices [P] or [n,P] within each sample's tokens."""
    starts = counts.cumsum(0) - counts
    if isinstance(positions, str) and positions == "all":
        index = torch.arange(int(counts.sum()), device=counts.device)
        return Rows(torch.arange(len(counts), device=counts.device).repeat_interleave(counts), index)
    if isinstance(positions, str) and positions != "first":
        raise InputError(f"unknown vision positions {positions!r}; expected {', '.join(VISION_POSITIONS)}, or indices")
    inside = _indices([0] if isinstance(positions, str) else positions, len(counts), int(counts.min())).to(
        counts.device
    )
    sample = torch.arange(len(counts), device=counts.device).repeat_interleave(inside.shape[1])
    return Rows(sample, (starts[:, None] + inside).flatten())


def _indices(positions: torch.Tensor | list, n: int, length: int) -> torch.Tensor:
    """[n,P] int64, ascending and distinct."""
    indices = torch.as_tensor(positions)
    if indices.is_floating_point() or indices.ndim not in (1, 2) or indices.shape[-1] == 0:
        raise InputError(f"positions {positions!r} are not indices; expected integers of shape [P] or [n,P]")
    indices = indices.long().expand(n, -1)
    if not bool(((indices >= 0) & (indices < length)).all()):
        raise InputError(f"positions {indices.min()}..{indices.max()} fall outside this batch's 0..{length - 1}")
    ordered = indices.sort(1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise InputError(f"positions {positions!r} name a token twice; expected distinct indices")
    return ordered
