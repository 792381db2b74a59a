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
BATCH = "expected what model(**batch) takes, tensors by name, with labels [n,S]; where many are taken, a list of such"


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


def check_many(name: str, batches: Any) -> None:
    """Raises InputError for one batch in the place of many."""
    if isinstance(batches, Mapping | str):
        raise InputError(f"{name} is a {type(batches).__name__}, as one batch is; {BATCH}")


def find_labels(batch: Batch) -> Labels:
    """The scored tokens of batch["labels"] [n,S]; -100 is not scored, and neither is position 0, which nothing
    predicts.

    Raises InputError for what is no batch, without labels, and for samples in which all are -100."""
    if not isinstance(batch, Mapping):
        raise InputError(f"found a {type(batch).__name__} in the place of a batch; {BATCH}")
    labels, ids = batch.get("labels"), batch.get("input_ids")
    if labels is None:
        raise InputError(
            f"the batch has no labels (it has {', '.join(batch)}); expected labels [n,S] with -100 on unscored tokens"
        )
    if not isinstance(labels, torch.Tensor):
        raise InputError(f"labels are a {type(labels).__name__}; {BATCH}")
    if labels.ndim != 2 or (ids is not None and labels.shape != ids.shape):
        beside = "" if ids is None else f" beside input_ids {tuple(ids.shape)}"
        raise InputError(f"labels have shape {tuple(labels.shape)}{beside}; expected [n,S], as many as tokens")
    scored = labels[:, 1:] != -100
    empty = (~scored.any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"labels of samples {empty} are all -100: nothing to score; label the answer tokens")
    q = int(scored.sum(1).max())
    index = scored.int().sort(dim=1, descending=True, stable=True).indices[:, :q]  # scored positions first, in order
    mask = scored.gather(1, index)
    target = labels[:, 1:].gather(1, index).where(mask, 0)
    return Labels(index, target, mask)


def image_token(config: Any) -> int | None:
    """Id of the placeholder that stands for a picture's tokens."""
    return getattr(config, "image_token_id", getattr(config, "image_token_index", None))


def check_inputs(model: Any, batch: Batch) -> None:
    """Tokens must be words of the model, and Qwen-VL's three ways of counting pictures must agree; transformers says
    less clearly what is wrong. Raises InputError."""
    pixels, grid, ids = (batch.get(name) for name in ("pixel_values", "image_grid_thw", "input_ids"))
    token = image_token(model.config)
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    for name, found in (("input_ids", ids), ("labels", batch.get("labels"))):
        if size is not None and found is not None and bool((outside := (found >= size) & (found != token)).any()):
            raise InputError(
                f"{name} hold token {found[outside].max()}; the model has the tokens 0..{size - 1}: make batches with "
                "the model's own tokenizer"
            )
    merge = getattr(getattr(model.config, "vision_config", None), "spatial_merge_size", None)
    if pixels is None or grid is None or ids is None or merge is None or token is None:
        return
    patches, placeholders = int(grid.prod(1).sum()), int((ids == token).sum())
    if len(pixels) != patches or placeholders * merge**2 != patches:
        raise InputError(
            f"image_grid_thw says {patches} patches, {patches // merge**2} placeholders after merging {merge}x{merge}; "
            f"found {len(pixels)} rows of pixel_values and {placeholders} image placeholders in input_ids: make all "
            "three with the model's own processor"
        )


def check_name(positions: Any, names: tuple[str, ...]) -> None:
    """Raises InputError for a name that is none of a modality's; indices are checked where they meet a batch."""
    if isinstance(positions, str) and positions not in names:
        raise InputError(f"positions={positions!r}; expected {', '.join(names)}, or indices")


def text_rows(batch: Batch, positions: Positions) -> Rows:
    """Rows of the flattened [n·S] token dimension.

    last_prompt: the first position whose logits predict a label. answer: all positions whose logits predict a label,
    first label span. first: position 0. prompt: attended positions up to last_prompt. all: attended positions.
    Otherwise indices [P] for every sample, or [n,P]."""
    check_name(positions, TEXT_POSITIONS)
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
    else:
        chosen = attended
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
