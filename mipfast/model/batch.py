"""What a batch is: tensors by name as model(**batch) takes them, with labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mipfast.errors import InputError
from mipfast.model import families

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
    return next((getattr(config, name) for name in families.IMAGE_TOKEN if hasattr(config, name)), None)


def merge_size(config: Any) -> int | None:
    """How many patches in a row and in a column Qwen-VL merges into one image token; None elsewhere."""
    return getattr(getattr(config, "vision_config", None), families.MERGE_SIZE, None)


def check_inputs(model: Any, batch: Batch) -> None:
    """Tokens must be words of the model, and Qwen-VL's three ways of counting pictures must agree; transformers says
    less clearly what is wrong. Raises InputError."""
    pixels, grid, ids = (batch.get(name) for name in (families.PATCHES, families.GRID, "input_ids"))
    token, merge = image_token(model.config), merge_size(model.config)
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    for name, found in (("input_ids", ids), ("labels", batch.get("labels"))):
        if size is not None and found is not None and bool((outside := (found >= size) & (found != token)).any()):
            raise InputError(
                f"{name} hold token {found[outside].max()}; the model has the tokens 0..{size - 1}: make batches with "
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
