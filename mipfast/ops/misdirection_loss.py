"""How far hidden states are from where they are to go."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mipfast.errors import InputError
from mipfast.ops import reference
from mipfast.ops.backends import KERNEL_DTYPES, call_extension, choose
from mipfast.ops.checks import check_tensor, untraced


def misdirection_loss(hidden: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the rows that count of ||hidden - target||^2 / D.

    The loss of representation misdirection (RMU, arXiv 2403.03218; RMisU, arXiv 2511.06793), for both of its halves:
    the forget set's target is one direction, the retain set's the states as they were. What a masked row holds, NaN
    too, reaches neither the loss nor a gradient.

    Args:
        hidden: hidden states [T, D], floating point, any strides.
        target: [D] for all rows, or [T, D]; floating point.
        mask: [T] of any dtype, non-zero where a row counts. None: all do.

    Returns:
        A float32 (float64 for a float64 hidden) scalar, 0 where no row counts. Differentiable once in hidden and
        target.

    Raises:
        InputError: shapes, dtypes or devices do not fit together.
        BackendError: the backend asked for by `ops.backend` cannot take hidden.

    Example:
        >>> import torch
        >>> from mipfast import ops
        >>> hidden = torch.tensor([[1.0, 3.0], [9.0, 9.0]])
        >>> ops.misdirection_loss(hidden, torch.zeros(2), mask=torch.tensor([True, False]))
        tensor(5.)
    """
    op = "misdirection_loss"
    check_tensor(op, "hidden", hidden, (None, None))
    check_tensor(op, "target", target, tuple(hidden.shape[1:] if target.dim() == 1 else hidden.shape), like=hidden)
    if mask is not None and mask.shape != hidden.shape[:1]:
        raise InputError(f"{op}: mask has shape {list(mask.shape)}, expected [{hidden.shape[0]}]")
    if untraced(hidden, target, mask) and hidden.numel() and choose(hidden) == "cpp":
        return _Direct.apply(hidden, target, mask)
    return _op(hidden, target, mask)


@torch.library.custom_op(
    "mipfast::misdirection_loss", mutates_args=(), schema="(Tensor hidden, Tensor target, Tensor? mask) -> Tensor"
)
def _op(hidden, target, mask):
    name = choose(hidden)
    if name == "cpp" and hidden.numel():
        return _loss_cpp(hidden, target, mask)
    if name == "triton" and hidden.numel():
        from mipfast_kernels.misdirection_loss import misdirection_loss as launch

        target, kept = _kernel_inputs(target, mask)
        return launch(hidden, target, kept) / _terms(hidden, mask)
    return reference.misdirection_loss(hidden, target, mask)


@torch.library.custom_op(
    "mipfast::misdirection_gradient",
    mutates_args=(),
    schema="(Tensor d_loss, Tensor hidden, Tensor target, Tensor? mask) -> Tensor",
)
def _gradient_op(d_loss, hidden, target, mask):
    name = choose(hidden)
    if name == "cpp" and hidden.numel():
        return _gradient_cpp(d_loss, hidden, target, mask)
    if name == "triton" and hidden.numel():
        from mipfast_kernels.misdirection_loss import misdirection_gradient as launch

        target, kept = _kernel_inputs(target, mask)
        return launch(hidden, target, kept, 2 * d_loss / _terms(hidden, mask))
    return reference.misdirection_gradient(d_loss, hidden, target, mask).to(hidden.dtype)


def _kernel_inputs(target, mask):
    target = target if target.dtype in KERNEL_DTYPES else target.to(torch.float32)
    return target, None if mask is None else mask.bool().to(torch.int8)


def _terms(hidden, mask):
    """How many squares the loss is the mean of; at least one row's."""
    rows = hidden.shape[0] if mask is None else mask.bool().sum().clamp(min=1)
    return rows * hidden.shape[1]


def _loss_cpp(hidden, target, mask):
    return torch.tensor(_call_cpp("misdirection_loss", hidden, target, mask), dtype=torch.float32)


def _gradient_cpp(d_loss, hidden, target, mask):
    gradient = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    _call_cpp("misdirection_gradient", hidden, target, mask, d_loss=d_loss.item(), gradient=gradient)
    return gradient


def _call_cpp(function, hidden, target, mask, **more):
    target = target if target.dtype == hidden.dtype else target.to(torch.float32)
    return call_extension(
        function,
        hidden=hidden.contiguous(), hidden_dtype=hidden.dtype, target=target.contiguous(), target_dtype=target.dtype,
        one_target=target.dim() == 1, kept=None if mask is None else mask.bool().contiguous(),
        rows=hidden.shape[0], width=hidden.shape[1], **more,
    )  # fmt: skip


@_op.register_fake
def _(hidden, target, mask):
    return hidden.new_empty((), dtype=reference.accumulator_dtype(hidden.dtype))


@_gradient_op.register_fake
def _(d_loss, hidden, target, mask):
    return hidden.new_empty(hidden.shape)


def _backward(ctx, d_loss, gradient_of=_gradient_op):
    hidden, target, mask = ctx.saved_tensors
    d_hidden = d_target = None
    if ctx.needs_input_grad[0]:
        d_hidden = gradient_of(d_loss, hidden, target, mask)
    if ctx.needs_input_grad[1]:
        gradient = reference.misdirection_gradient(d_loss, hidden, target, mask)
        d_target = -gradient.sum_to_size(target.shape).to(target.dtype)
    return d_hidden, d_target, None


_op.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


class _Direct(torch.autograd.Function):
    """The op for plain CPU tensors, past torch.library: see checks.untraced."""

    @staticmethod
    def forward(ctx, hidden, target, mask):
        ctx.save_for_backward(hidden, target, mask)
        return _loss_cpp(hidden, target, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        return _backward(ctx, d_loss, _gradient_cpp)
