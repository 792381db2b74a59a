"""Quadrature sums of a gradient and of its square."""

import torch
from torch import Tensor

from mipfast.ops import reference
from mipfast.ops.backends import KERNEL_DTYPES, call_extension, choose
from mipfast.ops.checks import check_groups, check_tensor


def riemann_accumulate(
    grad: Tensor, weights: Tensor, *, act: Tensor | None = None, groups: int | None = None
) -> tuple[Tensor, Tensor]:
    """Quadrature sums of a gradient: s1 = sum_k w_k g_k (times act if given), s2 = sum_k w_k g_k^2.

    One pass over the gradient, read once. s1 with act is the integrated gradient, s2 the integrated squared gradient
    (MIP-Editor, arXiv 2511.06793; the Fisher attribution without its z-score). Backends: reference, triton, cpp, cuda.
    The same input gives the same bits on every run.

    Args:
        grad: gradients [m, R, F] at m quadrature nodes, floating point, any strides.
        weights: the nodes' weights [m], floating point.
        act: activations [R, F], or None.
        groups: G groups of R / G neighbouring rows, each summed; None keeps every row.

    Returns:
        s1, s2 [G, F], or [R, F] with groups=None; float32 (float64 for a float64 grad). Differentiable once in grad
        and act.

    Raises:
        InputError: shapes, dtypes or devices do not fit together, or groups does not divide the rows.
        BackendError: the backend asked for by `ops.backend` cannot take grad.

    Example:
        >>> import torch
        >>> from mipfast import ops
        >>> grad = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])  # 2 nodes, 1 row, 2 neurons
        >>> s1, s2 = ops.riemann_accumulate(grad, torch.tensor([0.5, 0.5]))
        >>> s1.tolist(), s2.tolist()
        ([[2.0, 3.0]], [[5.0, 10.0]])
    """
    op = "riemann_accumulate"
    check_tensor(op, "grad", grad, (None, None, None))
    steps, rows, neurons = grad.shape
    check_tensor(op, "weights", weights, (steps,), like=grad)
    if act is not None:
        check_tensor(op, "act", act, (rows, neurons), like=grad)
    check_groups(op, groups, rows)
    return _op(grad, weights, act, groups)


@torch.library.custom_op(
    "mipfast::riemann_accumulate",
    mutates_args=(),
    schema="(Tensor grad, Tensor weights, Tensor? act, int? groups) -> (Tensor, Tensor)",
)
def _op(grad, weights, act, groups):
    name = choose(grad)
    if name == "reference" or grad.numel() == 0:
        return reference.riemann_accumulate(grad, weights, act=act, groups=groups)
    return accumulate_by(name, grad, weights, act, groups)


def accumulate_by(name, grad, weights, act, groups):
    """The sums by the kernel of the backend `name`: "triton", "cpp" or "cuda"."""
    weights = weights.to(torch.float32).contiguous()
    if act is not None and act.dtype not in KERNEL_DTYPES:
        act = act.to(torch.float32)
    groups = grad.shape[1] if groups is None else groups
    if name == "triton":
        from mipfast_kernels.riemann_accumulate import riemann_accumulate as launch

        return launch(grad, weights, act, groups)
    return (_cuda if name == "cuda" else _cpp)(grad, weights, act, groups)


def _cpp(grad, weights, act, groups):
    s1 = torch.empty(groups, grad.shape[2], dtype=torch.float32, device=grad.device)
    s2 = torch.empty_like(s1)
    call_extension("riemann_accumulate", **_arguments(grad, weights, act, s1, s2))
    return s1, s2


def _cuda(grad, weights, act, groups):
    rows_per_group = grad.shape[1] // groups
    rows_per_split = min(rows_per_group, 16)  # one picture's 1024 patches alone would fill a fortieth of an H100
    splits = -(-rows_per_group // rows_per_split)
    s1 = torch.empty(splits, groups, grad.shape[2], dtype=torch.float32, device=grad.device)
    s2 = torch.empty_like(s1)
    with torch.cuda.device(grad.device):
        stream = torch.cuda.current_stream().cuda_stream
        arguments = _arguments(grad, weights, act, s1, s2)
        call_extension("riemann_accumulate_cuda", **arguments, rows_per_split=rows_per_split, stream=stream)
    return (s1[0], s2[0]) if splits == 1 else (s1.sum(0), s2.sum(0))


def _arguments(grad, weights, act, s1, s2):
    steps, rows, neurons = grad.shape
    groups = s1.shape[-2]
    return dict(
        grad=grad.contiguous(), grad_dtype=grad.dtype, weights=weights,
        act=None if act is None else act.contiguous(), act_dtype=(grad if act is None else act).dtype,
        s1=s1, s2=s2, steps=steps, groups=groups, rows_per_group=rows // groups, neurons=neurons,
    )  # fmt: skip


@_op.register_fake
def _(grad, weights, act, groups):
    rows = grad.shape[1] if groups is None else groups
    s1 = grad.new_empty(rows, grad.shape[2], dtype=reference.accumulator_dtype(grad.dtype))
    return s1, torch.empty_like(s1)


def _save(ctx, inputs, output):
    *tensors, ctx.groups = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, d_s1, d_s2):
    grad, weights, act = ctx.saved_tensors
    if ctx.groups is not None:
        rows_per_group = grad.shape[1] // ctx.groups
        d_s1 = d_s1.repeat_interleave(rows_per_group, 0)
        d_s2 = d_s2.repeat_interleave(rows_per_group, 0)
    w = weights.to(d_s1.dtype)[:, None, None]
    g = grad.to(d_s1.dtype)
    d_grad = w * ((d_s1 if act is None else d_s1 * act) + 2 * g * d_s2)
    d_act = None
    if act is not None and ctx.needs_input_grad[2]:
        d_act = (d_s1 * (w * g).sum(0)).to(act.dtype)
    return d_grad.to(grad.dtype), None, d_act, None


_op.register_autograd(_backward, setup_context=_save)
