"""What a batch is: tensors by name as model(**batch) takes them, with labels, and perhaps `subject` [n,S], bool or int:
true on the tokens of what a question is about (model/positions.py)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mipfast.errors import InputError
from mipfast.model import families
from mipfast.model.sites import find_decoder

log = logging.getLogger("mipfast")

Batch = Mapping[str, torch.Tensor]
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


def without_labels(batch: Batch) -> dict[str, Any]:
    """The batch as the model's inputs: with labels, transformers would compute a loss nobody reads, and a subject it
    refuses."""
    return {name: value for name, value in batch.items() if name not in ("labels", "subject")}


def check_many(name: str, batches: Any) -> None:
    """Raises InputError for one batch in the place of many."""
    if isinstance(batches, Mapping | str):
        raise InputError(f"{name} is a {type(batches).__name__}, as one batch is; {BATCH}")


def attended(batch: Batch) -> torch.Tensor | None:
    """[n,S] bool: which tokens are no padding. None where the batch does not say, or says it in a mask of its own."""
    mask = batch.get("attention_mask")
    return mask != 0 if mask is not None and mask.ndim == 2 else None


def find_labels(batch: Batch) -> Labels:
    """The scored tokens of batch["labels"] [n,S]; -100 is not scored, and neither is a sample's first token, which
    nothing predicts.

    Raises InputError for what is no batch, without labels, for labels that are no token or whose token the
    attention_mask hides, and for samples in which all are -100."""
    if not isinstance(batch, Mapping):
        raise InputError(f"found a {type(batch).__name__} in the place of a batch; {BATCH}")
    labels, ids, seen = batch.get("labels"), batch.get("input_ids"), attended(batch)
    if labels is None:
        raise InputError(
            f"the batch has no labels (it has {', '.join(batch)}); expected labels [n,S] with -100 on unscored tokens"
        )
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        raise InputError(f"labels are {_kind(labels)}; {BATCH}")
    for name, other in (("input_ids", ids), ("attention_mask", seen)):
        if labels.ndim != 2 or not labels.numel() or (other is not None and other.shape != labels.shape):
            beside = "" if other is None else f" beside {name} {tuple(other.shape)}"
            raise InputError(f"labels have shape {tuple(labels.shape)}{beside}; expected [n,S], as many as tokens")
    if bool((odd := (labels < 0) & (labels != -100)).any()):
        raise InputError(f"labels hold {labels[odd][0]}; expected tokens, and -100 alone where nothing is scored")
    scored = labels[:, 1:] != -100
    if seen is not None:
        if hidden := (scored & ~seen[:, 1:]).any(1).nonzero().flatten().tolist():
            raise InputError(
                f"samples {hidden} have labels where their attention_mask is 0; expected -100 there: labels that are a "
                "copy of input_ids label the padding too"
            )
        scored = scored & (seen[:, :-1].cumsum(1) > 0)
    empty = (~scored.any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"labels of samples {empty} are all -100: nothing to score; label the answer tokens")
    q = int(scored.sum(1).max())
    index = scored.int().sort(dim=1, descending=True, stable=True).indices[:, :q]  # scored positions first, in order
    mask = scored.gather(1, index)
    target = labels[:, 1:].long().gather(1, index).where(mask, 0)
    return Labels(index, target, mask)


def read_batch(model: Any, batch: Batch) -> tuple[dict[str, Any], Labels]:
    """The batch as the model is to be given it, with labels, and its scored tokens: the way in for all that runs a
    model on a batch. Where the model has a table of positions, padding on the left gets position_ids: some models
    count it. Raises InputError for what the model cannot use."""
    labels, seen, limit = find_labels(batch), attended(batch), _num_positions(model)
    for name, value in batch.items():
        if name in families.NOT_OF_A_BATCH or not isinstance(value, torch.Tensor | None):
            raise InputError(f"the batch has {name}, {_kind(value)}: no part of a batch, leave it out; {BATCH}")
    _check_inputs(model, batch)
    _warn_of_shift(batch, labels)
    given = dict(batch)
    if limit is not None:
        if "position_ids" not in batch and seen is not None and not bool(seen[:, 0].all()):
            given["position_ids"] = (seen.cumsum(1) - 1).clamp_min(0)
        last = int(given["position_ids"].max()) if "position_ids" in given else batch["labels"].shape[1] - 1
        if last >= limit:
            raise InputError(f"the batch reaches position {last}; the model has 0..{limit - 1}: shorten the samples")
    return given, labels


def _kind(value: Any) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def _warn_of_shift(batch: Batch, labels: Labels) -> None:
    if (ids := batch.get("input_ids")) is None:
        return
    tokens, target = F.pad(ids.long(), (0, 1), value=-1), labels.target[labels.mask]
    own, following = (tokens.gather(1, labels.index + i)[labels.mask] for i in (1, 2))
    if torch.equal(target, following) and not torch.equal(target, own):
        log.warning("every label is the token after its place: shifted by hand? Expected each token at its own place")


def _num_positions(model: Any) -> int | None:
    """Length of the model's table of learned positions; None where it has none."""
    decoder = find_decoder(model)
    table = next((getattr(decoder, name) for name in families.LEARNED_POSITIONS if hasattr(decoder, name)), None)
    # OPT's begins at its offset
    return table.num_embeddings - getattr(table, "offset", 0) if isinstance(table, nn.Embedding) else None


def image_token(config: Any) -> int | None:
    """Id of the placeholder that stands for a picture's tokens."""
    return next((getattr(config, name) for name in families.IMAGE_TOKEN if hasattr(config, name)), None)


def merge_size(config: Any) -> int | None:
    """How many patches in a row and in a column Qwen-VL merges into one image token; None elsewhere."""
    return getattr(getattr(config, "vision_config", None), families.MERGE_SIZE, None)


def _check_inputs(model: Any, batch: Batch) -> None:
    """Tokens must be words of the model, and Qwen-VL's three ways of counting pictures must agree; transformers says
    less clearly what is wrong. Raises InputError."""
    pixels, grid, ids = (batch.get(name) for name in (families.PATCHES, families.GRID, "input_ids"))
    token, merge = image_token(model.config), merge_size(model.config)
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    for name, found in (("input_ids", ids), ("labels", batch["labels"].clamp_min(0))):
        if size is None or found is None:
            continue
        if bool((outside := (found >= size) & (found != token) | (found < 0)).any()):
            raise InputError(
                f"{name} hold token {found[outside][0]}; the model has the tokens 0..{size - 1}: make batches with "
                "the model's own tokenizer"
            )
    if pixels is None or grid is None or ids is None or merge is None or token is None:
        return
    patches, placeholders = int(grid.prod(1).sum()), int((ids == token).sum())
    if len(pixels) != patches or placeholders * merge**2 != patches:
        raise InputError(
            f"image_grid_thw says {patches} patches, {patches // merge**2} placeholders after merging {merge}x{merge}; "
            f"found {len(pixels)} rows of pixel_values and {placeholders} image placeholders in input_ids: make all "
            "three with the model's own processor"
        )
