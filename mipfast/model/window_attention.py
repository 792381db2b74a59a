"""A vision tower's attention within windows and pictures, by one call per length of theirs and not one per window."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from mipfast.model import families
from mipfast.model.patching import replaced_attention

# In transformers' registry. "flash" in a name is what makes its towers hand over the bounds of the windows and not cut
# at them; transformers 4 asks for names of its own, cuts, and calls `_attend` without bounds.
NAME = "mipfast_flash_windows"


# of every length of window its tokens (None: all), and where these are in the result
Groups = tuple[list[tuple[int, Tensor | None]], Tensor | None]


@contextmanager
def grouped_windows(model: nn.Module) -> Iterator[None]:
    """Every attention whose modules take cu_seqlens and run by sdpa. transformers runs it window by window: 16 windows
    in a picture of 1024 patches, times pictures and copies, are as many launches in every block."""
    configs = {
        id(module.config): cast(Any, module.config)
        for module in model.modules()
        if getattr(getattr(module, "config", None), "_attn_implementation", None) == families.WINDOWED_ATTENTION
        and _takes_bounds(type(module))
    }
    with replaced_attention(configs.values(), NAME, partial(_attend, WeakTensorKeyDictionary())):
        yield


def _takes_bounds(kind: Any) -> bool:
    return families.WINDOW_BOUNDS in inspect.signature(kind.forward).parameters


def _attend(
    known: WeakTensorKeyDictionary,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query, key, value [1,heads,tokens,d] -> [1,tokens,heads,d], every token seeing its window's. known: the windows
    of bounds that an earlier block was given."""
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    if cu_seq_lens_q not in known:
        known[cu_seq_lens_q] = _grouped(cu_seq_lens_q)
    groups, back = known[cu_seq_lens_q]
    outputs = []
    for length, tokens in groups:
        own = (x if tokens is None else x.index_select(2, tokens) for x in (query, key, value))
        q, k, v = (x[0].unflatten(1, (-1, length)).transpose(0, 1) for x in own)  # [windows,heads,length,d]
        outputs.append(F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2).flatten(0, 1))
    return (outputs[0] if back is None else torch.cat(outputs).index_select(0, back))[None], None


def _grouped(bounds: Tensor) -> Groups:
    starts = defaultdict(list)
    edges = bounds.tolist()
    for start, stop in zip(edges, edges[1:], strict=False):
        starts[stop - start].append(start)
    if len(starts) == 1:
        return [(next(iter(starts)), None)], None
    tokens = [torch.tensor(first)[:, None] + torch.arange(length) for length, first in starts.items()]
    flat = [t.flatten().to(bounds.device) for t in tokens]
    return list(zip(starts, flat, strict=True)), torch.cat(flat).argsort()
