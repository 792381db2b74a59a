"""Quadrature sums of the gradient behind an output projection, never written where a kernel can help it."""

import torch
from torch import Tensor

from mipfast.errors import InputError
from mipfast.ops import reference
from mipfast.ops.autocast import without_autocast
from mipfast.ops.backends import KERNEL_DTYPES, choose
from mipfast.ops.checks import check_groups, check_tensor
from mipfast.ops.frozen_linear import linear
from mipfast.ops.riemann_accumulate import accumulate_by


def project_accumulate(
    grad_out: Tensor, weight: Tensor, weights: Tensor, *, act: Tensor | None = None, groups: int | None = None
) -> tuple[Tensor, Tensor]:
    """`riemann_accumulate(grad_out @ weight, weights, ...)` without keeping that [m, R, F] gradient.

    With g_k = grad_out[k] @ weight, the gradient at the input of an FFN's output projection: s1 = sum_k w_k g_k (times
    act if given), s2 = sum_k w_k g_k^2. The reference holds one node's gradient at a time, triton none; cpp writes them
    all in float32 and accumulates them in one pass. The same input gives the same bits on every run.

    Args:
        grad_out: gradients [m, R, H] at the FFN's output at m quadrature nodes, floating point, any strides.
        weight: the output projection's weight [H, F], as torch.nn.Linear keeps it, any strides.
        weights: the nodes' weights [m], floating point.
        act: activations [R, F], or None.
        groups: G groups of R / G neighbouring rows, each summed; None keeps every row.

    Returns:
        s1, s2 [G, F], or [R, F] with groups=None; float32 (float64 for a float64 grad_out). Not differentiable.

    Raises:
        InputError: shapes, dtypes or devices do not fit together, groups does not divide the rows, or (triton) m R
            passes 2^30.
        BackendError: the backend asked for by `ops.backend` cannot take grad_out.

    Example:
        >>> import torch
        >>> from mipfast import ops
        >>> grad_out, weight, weights = torch.randn(2, 6, 8), torch.randn(8, 32), torch.tensor([0.5, 0.5])
        >>> s1, s2 = ops.project_accumulate(grad_out, weight, weights, groups=3)
        >>> expected, _ = ops.riemann_accumulate(grad_out @ weight, weights, groups=3)
        >>> s1.shape, torch.allclose(s1, expected, atol=1e-4)
        (torch.Size([3, 32]), True)
    """
    op = "project_accumulate"
    check_tensor(op, "grad_out", grad_out, (None, None, None))
    steps, rows, width = grad_out.shape
    check_tensor(op, "weight", weight, (width, None), like=grad_out)
    check_tensor(op, "weights", weights, (steps,), like=grad_out)
    if act is not None:
        check_tensor(op, "act", act, (rows, weight.shape[1]), like=grad_out)
        act = act.detach()
    check_groups(op, groups, rows)
    return _op(grad_out.detach(), weight.detach(), weights.detach(), act, groups)


@torch.library.custom_op(
    "mipfast::project_accumulate",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor weight, Tensor weights, Tensor? act, int? groups) -> (Tensor, Tensor)",
)
@without_autocast
def _op(grad_out, weight, weights, act, groups):
    name = choose(grad_out)
    if name == "reference" or grad_out.numel() == 0:
        return reference.project_accumulate(grad_out, weight, weights, act=act, groups=groups)
    if name != "triton":
        grad = linear(grad_out.to(torch.float32), weight.to(torch.float32).t())
        return accumulate_by(name, grad, weights, act, groups)
    from mipfast_kernels.project_accumulate import project_accumulate as launch

    steps, rows, _ = grad_out.shape
    if steps * rows > 2**30:  # the kernel counts them in 32 bits: a 64-bit division would slow every call
        raise InputError(f"project_accumulate: {steps} x {rows} rows, triton takes at most 2^30 in all; split them")
    if act is not None and act.dtype not in KERNEL_DTYPES:
        act = act.to(torch.float32)
    if weight.dtype != grad_out.dtype:
        grad_out, weight = grad_out.to(torch.float32), weight.to(torch.float32)
    groups = rows if groups is None else groups
    return launch(grad_out, weight, weights.to(torch.float32).contiguous(), act, groups)


@_op.register_fake
def _(grad_out, weight, weights, act, groups):
    rows = grad_out.shape[1] if groups is None else groups
    s1 = grad_out.new_empty(rows, weight.shape[1], dtype=reference.accumulator_dtype(grad_out.dtype))
    return s1, torch.empty_like(s1)
