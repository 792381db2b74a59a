"""Products with frozen weights: the share of `locate` that no op of ours replaces (docs/profile.md)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mipfast.modes import replaced_forward


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x [..., K], weight [N, K] of any strides, bias [N] -> [..., N]. Differentiable in x alone, in reverse
    and in forward mode.

    On a CPU with AVX-512 that is not Intel's, float32 products are oneDNN's: torch leaves them to MKL, which takes AVX2
    there (512 -> 1536 at 32 rows, GFLOP/s: 97 and oneDNN 186 on an AMD EPYC with AVX-512 of full width, 86 and 92 on a
    Zen 4). oneDNN compiles for each shape (.3 ms) and keeps .5 to 1 MB for each of the last 1024."""
    primal, tangent = forward_ad.unpack_dual(x)
    if tangent is not None:  # one product, not two of half the rows
        both = linear(torch.stack([primal, tangent]), weight)
        return forward_ad.make_dual(both[0] if bias is None else both[0] + bias, both[1])
    if not (x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and _onednn()):
        return F.linear(x, weight, bias)
    if x.requires_grad and torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


@contextmanager
def frozen_linears(model: nn.Module) -> Iterator[None]:
    """The model's nn.Linear layers by `linear`; their weights get no gradient within."""
    with ExitStack() as patches:
        for module in model.modules():
            if type(module) is nn.Linear and "forward" not in vars(module):
                patches.enter_context(replaced_forward(module, partial(_forward, module)))
        yield


def _forward(module: nn.Linear, input: Tensor) -> Tensor:
    return linear(input, module.weight, module.bias)


def _onednn() -> bool:
    return _faster() and torch._C._get_mkldnn_enabled()  # torch.backends.mkldnn.flags(enabled=False) is a user's no


@functools.cache
def _faster() -> bool:
    """Whether this torch has oneDNN's product, and on a CPU where it is the faster one. (On Intel's own MKL takes
    AVX-512 too, and nobody has measured which is.)"""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and "GenuineIntel" not in cpu.read_text()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not x.numel() or not weight.numel():
        return F.linear(x, weight, bias)
    # a bias that is not contiguous would be read as if it were
    return torch.ops.mkldnn._linear_pointwise(x, weight, None if bias is None else bias.contiguous(), "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _product(d_out, weight.t(), None), None, None
