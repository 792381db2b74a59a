"""An FFN's output at every row of an interpolation, by linearity."""

import torch
from torch import Tensor

from mipfast.errors import InputError
from mipfast.ops import reference
from mipfast.ops.autocast import without_autocast
from mipfast.ops.backends import call_extension, choose
from mipfast.ops.checks import check_neurons, check_tensor, untraced
from mipfast.ops.frozen_linear import linear
from mipfast.ops.riemann_accumulate import riemann_accumulate
from mipfast.ops.riemann_interpolate import alphas_gradient, interpolate


def riemann_project(act: Tensor, weight: Tensor, alphas: Tensor, neurons: Tensor | None = None) -> Tensor:
    """An FFN's output at every quadrature node: out[k] = riemann_interpolate(act, alphas, neurons)[k] @ weight.T.

    All backends but the reference use that it is linear: one product with weight at any m, alphas[k] times it (with
    neurons: it plus (alphas[k] - 1) times the named ones' share).

    Args:
        act: activations [R, F], floating point, any strides.
        weight: the output projection's weight [H, F], as torch.nn.Linear keeps it, of act's dtype, any strides.
        alphas: the nodes [m], floating point.
        neurons: the neurons that move in each row, [R, k] int64, as in `riemann_interpolate`. None: all.

    Returns:
        [m, R, H] of act's dtype. Differentiable in act, weight and alphas.

    Raises:
        InputError: shapes, dtypes or devices do not fit together, or (on a CPU) neurons names one that is not there.
        BackendError: the backend asked for by `ops.backend` cannot take act.

    Example:
        >>> import torch
        >>> from mipfast import ops
        >>> act, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
        >>> ops.riemann_project(act, weight, torch.tensor([0.0, 0.5, 1.0])).tolist()
        [[[0.0]], [[5.5]], [[11.0]]]
    """
    op = "riemann_project"
    check_tensor(op, "act", act, (None, None))
    check_tensor(op, "weight", weight, (None, act.shape[1]), like=act)
    check_tensor(op, "alphas", alphas, (None,), like=act)
    if weight.dtype != act.dtype:
        raise InputError(f"{op}: weight is {weight.dtype}, expected act's {act.dtype}; convert one of them")
    if neurons is not None:
        check_neurons(op, neurons, act)
    return (_project if untraced(act, weight, alphas, neurons, constant=True) else _op)(act, weight, alphas, neurons)


@without_autocast
def _project(act, weight, alphas, neurons):
    name = choose(act)
    if name == "reference" or act.numel() == 0 or weight.numel() == 0:
        return reference.riemann_project(act, weight, alphas, neurons)
    base = linear(act, weight).contiguous()
    if neurons is None:
        return interpolate(base, alphas, None)
    neurons = _deduplicated(neurons)
    if name == "triton":
        from mipfast_kernels.riemann_project import riemann_project as launch

        return launch(base, act, weight, alphas.to(torch.float32).contiguous(), neurons)
    if name == "cpp":
        return _cpp(base, act, weight, alphas.to(torch.float32).contiguous(), neurons)
    values = act.gather(1, neurons.clamp(min=0)).masked_fill(neurons < 0, 0)
    moving = (values[:, None] @ weight.t()[neurons.clamp(min=0)])[:, 0]
    steps = (alphas.to(torch.float32) - 1)[:, None, None]
    return (base + steps * moving).to(act.dtype)


def _deduplicated(neurons: Tensor) -> Tensor:
    """Each row's neurons, sorted, -1 where one is named again."""
    ordered = neurons.sort(1).values
    return torch.cat([ordered[:, :1], ordered[:, 1:].masked_fill(ordered[:, 1:] == ordered[:, :-1], -1)], 1)


def _cpp(base, act, weight, alphas, neurons):
    out = torch.empty(len(alphas), *base.shape, dtype=base.dtype, device=base.device)
    call_extension(
        "riemann_project",
        base=base, act=act.contiguous(), weight=weight.contiguous(), dtype=base.dtype, alphas=alphas,
        names=neurons.contiguous(), out=out, steps=len(alphas), rows=len(base), hidden=base.shape[1],
        neurons=act.shape[1], names_per_row=neurons.shape[1],
    )  # fmt: skip
    return out


_op = torch.library.custom_op(
    "mipfast::riemann_project",
    _project,
    mutates_args=(),
    schema="(Tensor act, Tensor weight, Tensor alphas, Tensor? neurons) -> Tensor",
)


@_op.register_fake
def _(act, weight, alphas, neurons):
    return act.new_empty(alphas.shape[0], act.shape[0], weight.shape[0])


@without_autocast
def _backward(ctx, d_out):
    act, weight, alphas, neurons = ctx.saved_tensors
    chosen = None if neurons is None else reference.named(neurons, act.shape[1])
    moving = act if chosen is None else torch.where(chosen, act, 0)
    d_act = d_weight = d_alphas = None
    # summed over the nodes first, so that each product is one and not m
    scaled = riemann_accumulate(d_out, alphas)[0].to(weight.dtype)
    plain = None if chosen is None else d_out.sum(0, dtype=reference.accumulator_dtype(d_out.dtype)).to(weight.dtype)
    if ctx.needs_input_grad[0]:
        d_act = scaled @ weight
        if chosen is not None:
            d_act = torch.where(chosen, d_act, plain @ weight)
    if ctx.needs_input_grad[1]:
        d_weight = scaled.t() @ moving
        if plain is not None:
            d_weight = d_weight + plain.t() @ (act - moving)
    if ctx.needs_input_grad[2]:
        d_alphas = alphas_gradient(d_out, moving @ weight.t(), alphas.dtype)
    return d_act, d_weight, d_alphas, None


_op.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
