"""Products with frozen weights: the share of `locate` that no op of ours replaces (docs/profile.md)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mipfast.ops.backends import call_extension, choose, load_extension


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear for weights that nobody trains.

    On a CPU with AVX-512 that is not Intel's, float32 products are csrc/linear.cpp's, which reads weights where they
    lie: torch gives them to MKL, which takes AVX2 there and first copies the weight into another order
    (docs/kernels.md). There no row's result depends on the others, nor on the number of threads.

    Args:
        x: [..., K].
        weight: [N, K] of any strides.
        bias: [N], or None.

    Returns:
        [..., N]. Differentiable in x alone, in reverse and in forward mode.

    Raises:
        RuntimeError: torch's own, for what does not fit together.

    Example:
        >>> import torch
        >>> linear(torch.ones(1, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[3., 7.]])
    """
    primal, tangent = forward_ad.unpack_dual(x)
    if tangent is not None:  # one product, not two of half the rows
        both = linear(torch.stack([primal, tangent]), weight)
        return forward_ad.make_dual(both[0] if bias is None else both[0] + bias, both[1])
    if not _supported(x, weight, bias):
        return F.linear(x, weight, bias)
    if x.requires_grad and torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def _supported(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether csrc/linear.cpp takes these; what does not fit together is torch's to refuse."""
    given = (x, weight) if bias is None else (x, weight, bias)
    return (
        all(type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.device.type == "cpu" for t in given)
        and x.shape[-1:] == weight.shape[1:]
        and (bias is None or bias.shape == weight.shape[:1])
        and _faster()
        and not torch.is_autocast_enabled("cpu")
        and choose(x) == "cpp"
    )


@functools.cache
def _faster() -> bool:
    """Whether mipfast._C has the products, on a CPU where they are the faster ones. (On Intel's own, MKL takes AVX-512
    too, and nobody has measured which are.)"""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(load_extension(), "linear"):
        return False
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and "GenuineIntel" not in cpu.read_text()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    outer, inner = weight.shape
    rows = x.numel() // inner if inner else 0
    transposed = weight.stride(0) == 1 and weight.stride(1) != 1
    if not rows * outer or not (transposed or weight.stride(1) == 1 and outer >= load_extension().LEAST_OUTER):
        return F.linear(x, weight, bias)
    flat = x.reshape(rows, inner)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    out = torch.empty(*x.shape[:-1], outer, dtype=x.dtype, device=x.device)
    if transposed:
        call_extension(
            "linear_input_gradient",
            d_out=flat, d_out_stride=flat.stride(0), weight=weight, weight_stride=weight.stride(1), d_x=out,
            rows=rows, inner=outer, outer=inner,
        )  # fmt: skip
        return out if bias is None else out.add_(bias)
    call_extension(
        "linear",
        x=flat, x_stride=flat.stride(0), weight=weight, weight_stride=weight.stride(0),
        bias=None if bias is None else bias.contiguous(), out=out, rows=rows, inner=inner, outer=outer,
    )  # fmt: skip
    return out


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
