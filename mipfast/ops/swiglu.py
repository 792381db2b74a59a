"""The activation of a gated FFN."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mipfast.errors import InputError
from mipfast.ops import reference
from mipfast.ops.backends import call_extension, choose
from mipfast.ops.checks import untraced


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The activation of a gated FFN: silu(gate) * up = gate * sigmoid(gate) * up (Shazeer, arXiv 2002.05202).

    Nothing but gate and up is kept for the backward pass; torch keeps silu(gate) too.

    Args:
        gate: any shape, floating point.
        up: gate's shape, dtype and device.

    Returns:
        gate's shape and dtype; arithmetic in float32 (float64 for float64), rounded once. Differentiable once.

    Raises:
        InputError: up's shape, dtype or device is not gate's, or they are not floating point.
        BackendError: the backend asked for by `ops.backend` cannot take gate.

    Example:
        >>> import torch
        >>> from mipfast import ops
        >>> ops.swiglu(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 2.0]))
        tensor([0.0000, 1.4621])
    """
    if up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device or not gate.is_floating_point():
        found, expected = (f"{list(t.shape)} {t.dtype} on {t.device}" for t in (up, gate))
        raise InputError(f"swiglu: up is {found}, expected gate's {expected}, of floating point; convert one of them")
    if untraced(gate, up, constant=True):
        return _activate(gate, up)
    return (_Direct.apply if untraced(gate, up) else _op)(gate, up)


def _activate(gate, up):
    name = choose(gate)
    if name not in ("cpp", "triton") or not gate.numel():
        return reference.swiglu(gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    if name == "triton":
        from mipfast_kernels.swiglu import swiglu as launch

        return launch(gate, up)
    out = torch.empty_like(gate)
    call_extension("swiglu", gate=gate, up=up, dtype=gate.dtype, out=out, size=gate.numel())
    return out


def _gradients(d_out, gate, up):
    name = choose(gate)
    if name not in ("cpp", "triton") or not gate.numel():
        return reference.swiglu_gradients(d_out, gate, up)
    d_out, gate, up = d_out.contiguous(), gate.contiguous(), up.contiguous()
    if name == "triton":
        from mipfast_kernels.swiglu import swiglu_gradients as launch

        return launch(d_out, gate, up)
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(gate)
    size = gate.numel()
    call_extension(
        "swiglu_gradients", d_out=d_out, gate=gate, up=up, dtype=gate.dtype, d_gate=d_gate, d_up=d_up, size=size
    )
    return d_gate, d_up


_op = torch.library.custom_op(
    "mipfast::swiglu", _activate, mutates_args=(), schema="(Tensor gate, Tensor up) -> Tensor"
)
_gradients_op = torch.library.custom_op(
    "mipfast::swiglu_gradients",
    _gradients,
    mutates_args=(),
    schema="(Tensor d_out, Tensor gate, Tensor up) -> (Tensor, Tensor)",
)


@_op.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@_gradients_op.register_fake
def _(d_out, gate, up):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _backward(ctx, d_out):
    return _gradients_op(d_out, *ctx.saved_tensors)


_op.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


class _Direct(torch.autograd.Function):
    """The op for plain tensors, past torch.library: see checks.untraced."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _activate(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        return _gradients(d_out, *ctx.saved_tensors)
