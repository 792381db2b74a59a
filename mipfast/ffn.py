"""Gated FFNs by one fused op: down(silu(gate x) * up x), silu(gate x) neither written nor kept for the backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

from mipfast import ops
from mipfast.sites import Stack

PARTS = ("gate_proj", "up_proj", "down_proj")  # what transformers calls them in every gated FFN that is not fused

_gated: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def fused_ffns(stacks: Iterable[Stack]) -> Iterator[None]:
    """The stacks' gated FFNs by `ops.swiglu`; hooks and wrappers of their projections stay in place."""
    patched = [ffn for stack in stacks for ffn in stack.ffns if "forward" not in vars(ffn) and _is_gated(ffn)]
    try:
        for ffn in patched:
            ffn.forward = partial(_forward, ffn)  # type: ignore[method-assign]
        yield
    finally:
        for ffn in patched:
            vars(ffn).pop("forward", None)


def _is_gated(ffn: nn.Module) -> bool:
    """Whether this is what the FFN computes. Asked once: others with parts of these names scale or gate differently."""
    if ffn not in _gated:
        _gated[ffn] = all(hasattr(ffn, part) for part in PARTS) and _agrees(ffn)
    return _gated[ffn]


def _agrees(ffn: Any) -> bool:
    weight = next(ffn.gate_proj.parameters())
    if weight.is_meta or not weight.is_floating_point() or weight.itemsize < 2:  # elsewhere, or quantised
        return False
    width = getattr(ffn.gate_proj, "in_features", weight.shape[-1])
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        found, expected = _forward(ffn, x[None]), ffn(x[None])
    # 64 roundings: another activation or a factor is off by far more
    close = (found - expected).abs().max() <= 64 * torch.finfo(found.dtype).eps * expected.abs().max()
    return bool(close)


def _forward(ffn: Any, hidden: Tensor) -> Tensor:
    return ffn.down_proj(_swiglu(ffn.gate_proj(hidden), ffn.up_proj(hidden)))


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    if forward_ad.unpack_dual(gate).tangent is not None:  # the op has no forward-mode derivative
        return F.silu(gate) * up
    return ops.swiglu(gate, up)
