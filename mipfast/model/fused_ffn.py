"""Gated FFNs by one fused op: down(silu(gate x) * up x), silu(gate x) neither written nor kept for the backward."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from mipfast import ops
from mipfast.model import families
from mipfast.model.patching import replaced_forward
from mipfast.model.sites import Stack


@contextmanager
def fused_ffns(stacks: Iterable[Stack], known: dict[Hashable, Any] | None = None) -> Iterator[None]:
    """The stacks' gated FFNs by `ops.swiglu`; hooks and wrappers of their projections stay in place. known: what is
    `remembered` of the model."""
    known = {} if known is None else known
    with ExitStack() as patches:
        for stack in stacks:
            for layer, ffn in enumerate(stack.ffns):
                if "forward" in vars(ffn):
                    continue
                if (key := ("gated", stack.name, layer)) not in known:
                    known[key] = _is_gated(ffn)
                if known[key]:
                    patches.enter_context(replaced_forward(ffn, partial(_forward, ffn)))
        yield


def _is_gated(ffn: Any) -> bool:
    """Whether this is what the FFN computes, and for any weights: others with parts of these names scale or gate
    differently, and an activation that learns need not stay SiLU."""
    if not all(hasattr(ffn, part) for part in families.GATED_PARTS) or getattr(ffn.act_fn, "state_dict", dict)():
        return False
    weight = next(ffn.gate_proj.parameters())
    if weight.is_meta or not weight.is_floating_point() or weight.itemsize < 2:  # elsewhere, or quantised
        return False
    gate = torch.linspace(-8, 8, 1001, device=weight.device)  # by itself: GELU of a small gate is SiLU in bfloat16
    width = getattr(ffn.gate_proj, "in_features", weight.shape[-1])
    x = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        with torch.no_grad():
            same = (ffn.act_fn(gate) - F.silu(gate)).abs().max() <= 1e-6
            found, expected = _forward(ffn, x), ffn(x)
            off, norm = (t.double().norm() for t in (found - expected, expected))
    except Exception:  # it wants more than the state, or returns more
        return False
    # in 16 bits torch rounds once more than the op
    return bool(same and off <= (64 if found.itemsize > 2 else 2) * torch.finfo(found.dtype).eps * norm and norm > 0)


def _forward(ffn: Any, hidden: Tensor) -> Tensor:
    return ffn.down_proj(_swiglu(ffn.gate_proj(hidden), ffn.up_proj(hidden)))


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    if forward_ad.unpack_dual(gate).tangent is not None:  # the op has no forward-mode derivative
        return F.silu(gate) * up
    return ops.swiglu(gate, up)
