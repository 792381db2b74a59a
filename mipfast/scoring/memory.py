"""What one replay may hold: a model of its bytes, corrected by a measurement, and the halves of a batch too large."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from mipfast.errors import InputError
from mipfast.model import families
from mipfast.model.batch import Batch, image_token, merge_size
from mipfast.scoring.capture import Capture

USED = 0.8  # of the free memory; the rest is for gradients on their way, and for what the model of bytes leaves out


# By model and tower: measured / modelled. A model that was changed since may get too many or too few copies into one
# replay; its scores do not depend on how many.
_corrections: WeakKeyDictionary[nn.Module, dict[str, float]] = WeakKeyDictionary()


def copies_that_fit(captured: Capture, budget: Any) -> int:
    """How many copies of the batch one replay may hold in `budget` bytes, "auto" for most of what is free; 0 where not
    even one does."""
    return int(min(room(captured, budget) / kept(captured), 2**31))


def room(captured: Capture, budget: Any) -> float:
    """Bytes that a replay may keep."""
    return USED * _free(captured.rows.index.device) if budget == "auto" else budget


def kept(captured: Capture, first: int = 0) -> float:
    """Bytes that a replay keeps of one copy that runs from block `first` on."""
    correction = _corrections.get(captured.model, {}).get(captured.stack.name, 1.0)
    return correction * _modelled(captured, first) + _logits(captured)


@contextmanager
def measured(captured: Capture, copies: Iterable[int], share: float = 1.0) -> Iterator[None]:
    """Correct the model of bytes by what autograd keeps in here of copies, or of this share of each, that run from
    these blocks on; once per model and tower."""
    known = _corrections.setdefault(captured.model, {})
    if captured.stack.name in known:
        yield
        return
    weights = {p.untyped_storage().data_ptr() for p in captured.model.parameters()}
    stored: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        stored[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    total = sum(size for address, size in stored.items() if address not in weights)
    modelled = share * sum(_modelled(captured, first) for first in copies)
    if total and modelled:  # 0 at alpha = 1, which reuses the clean run's gradient and saves no tensors
        known[captured.stack.name] = total / modelled


def halves(batch: Batch, config: Any) -> list[Batch]:
    """The first and the last samples of a batch of several. Raises InputError for a tensor of which it is not known
    whose rows are whose."""
    n = len(batch["labels"])
    pictures = _pictures_before(batch, config, n // 2)
    parts: list[Batch] = []
    for first in (True, False):
        part: dict[str, torch.Tensor] = {}
        for name, value in batch.items():
            cut, dim = pictures.get(name, n // 2), families.BATCH_DIM.get(name, 0) % value.ndim
            if name not in pictures and value.shape[dim] != n:
                raise InputError(
                    f"{n} samples do not fit into memory at once, and how to divide {name} {list(value.shape)} among "
                    "them is not known; give smaller batches"
                )
            half = value.narrow(dim, 0, cut) if first else value.narrow(dim, cut, value.shape[dim] - cut)
            if half.numel():
                part[name] = half
        parts.append(part)
    return parts


def _pictures_before(batch: Batch, config: Any, samples: int) -> dict[str, int]:
    """Rows of Qwen-VL's picture tensors that belong to the first samples."""
    pixels, grid, ids = (batch.get(name) for name in (families.PATCHES, families.GRID, "input_ids"))
    token, merge = image_token(config), merge_size(config)
    if pixels is None or grid is None or ids is None or token is None or merge is None:
        return {}
    patches = grid.prod(1).cumsum(0)
    mine = int((ids[:samples] == token).sum()) * merge**2
    return {families.PATCHES: mine, families.GRID: int((patches <= mine).sum())}


def _free(device: torch.device) -> float:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return float("inf")
    return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable"))


def _modelled(captured: Capture, first: int = 0) -> int:
    """What autograd keeps of one copy from block `first` on: about 8 hidden-wide and 3 FFN-wide tensors per token and
    block (2 of a gated FFN by `ffn`), of the stack and, behind a vision tower, of the language model."""

    def tensors(blocks: int, tokens: int, hidden: int, neurons: int) -> int:
        return blocks * tokens * (8 * hidden + 3 * neurons) * captured.outputs[0].element_size()

    stack, language = captured.stack, cast(Any, captured.decoder.config)
    suffix = captured.num_samples * captured.width
    if captured.entry is captured.decoder:
        return tensors(stack.num_layers - first, suffix, captured.outputs[0].shape[-1], stack.num_neurons)
    own = tensors(stack.num_layers - first, captured.tokens, captured.outputs[0].shape[-1], stack.num_neurons)
    neurons = getattr(language, "intermediate_size", 4 * language.hidden_size)
    return own + tensors(language.num_hidden_layers, suffix, language.hidden_size, neurons)


def _logits(captured: Capture) -> int:
    """One copy's logits at the labels, what the objective makes of them in float32, and that one's gradient: at 24
    labels of 150000 words two fifths of what a 3B model's blocks keep."""
    return captured.logits.numel() * (captured.logits.element_size() + 8)
