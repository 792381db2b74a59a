"""Rows on the straight line from zero to an activation."""

import torch
from torch import Tensor

from mipfast.ops import reference
from mipfast.ops.backends import call_extension, choose
from mipfast.ops.checks import check_neurons, check_tensor, untraced
from mipfast.ops.riemann_accumulate import riemann_accumulate


def riemann_interpolate(act: Tensor, alphas: Tensor, neurons: Tensor | None = None) -> Tensor:
    """Rows on the straight line from zero to the activation: out[k, r, j] = alphas[k] * act[r, j].

    The path of integrated gradients (MIP-Editor, arXiv 2511.06793), for all quadrature nodes at once. With `neurons`
    only those entries of a row move; the others are copied, to the bit.

    Args:
        act: activations [R, F], floating point, any strides: R rows (sample, position), F neurons.
        alphas: the nodes [m], floating point.
        neurons: the neurons that move in each row, [R, k] int64; -1 names none, one named twice moves once. None: all.

    Returns:
        [m, R, F] of act's dtype, contiguous; products in float32 (float64 for float64), rounded once. Differentiable
        in act and alphas.

    Raises:
        InputError: shapes, dtypes or devices do not fit together, or (on a CPU) neurons names one that is not there.
        BackendError: the backend asked for by `ops.backend` cannot take act.

    Example:
        >>> import torch
        >>> from mipfast import ops
        >>> act, alphas = torch.tensor([[1.0, 2.0]]), torch.tensor([0.0, 0.5])
        >>> ops.riemann_interpolate(act, alphas).tolist()
        [[[0.0, 0.0]], [[0.5, 1.0]]]
        >>> ops.riemann_interpolate(act, alphas, neurons=torch.tensor([[1]])).tolist()
        [[[1.0, 0.0]], [[1.0, 1.0]]]
    """
    check_tensor("riemann_interpolate", "act", act, (None, None))
    check_tensor("riemann_interpolate", "alphas", alphas, (None,), like=act)
    if neurons is not None:
        check_neurons("riemann_interpolate", neurons, act)
    return (interpolate if untraced(act, alphas, neurons, constant=True) else _op)(act, alphas, neurons)


def interpolate(act, alphas, neurons):
    name = choose(act)
    # every neuron in float32: torch has it in one pass, 1.06 ms where C++ takes 1.22 (2 x 1024 x 3420)
    plain = name == "cpp" and neurons is None and act.dtype == torch.float32
    if name not in ("cpp", "triton") or plain or not act.numel():
        return reference.riemann_interpolate(act, alphas, neurons)
    alphas = alphas.to(torch.float32).contiguous()
    if name == "triton":
        from mipfast_kernels.riemann_interpolate import riemann_interpolate as launch

        return launch(act, alphas, neurons)
    out = torch.empty(len(alphas), *act.shape, dtype=act.dtype, device=act.device)
    call_extension(
        "riemann_interpolate",
        act=act.contiguous(), dtype=act.dtype, alphas=alphas, out=out,
        names=None if neurons is None else neurons.contiguous(),
        names_per_row=0 if neurons is None else neurons.shape[1],
        steps=len(alphas), rows=act.shape[0], neurons=act.shape[1],
    )  # fmt: skip
    return out


_op = torch.library.custom_op(
    "mipfast::riemann_interpolate",
    interpolate,
    mutates_args=(),
    schema="(Tensor act, Tensor alphas, Tensor? neurons) -> Tensor",
)


@_op.register_fake
def _(act, alphas, neurons):
    return act.new_empty(alphas.shape[0], *act.shape)


def _backward(ctx, d_out):
    act, alphas, neurons = ctx.saved_tensors
    chosen = None if neurons is None else reference.named(neurons, act.shape[1])
    d_act = d_alphas = None
    if ctx.needs_input_grad[0]:
        d_act, _ = riemann_accumulate(d_out, alphas)  # the gradient of an interpolation is an accumulation
        if chosen is not None:
            d_act = torch.where(chosen, d_act, d_out.sum(0, dtype=d_act.dtype))
        d_act = d_act.to(act.dtype)
    if ctx.needs_input_grad[1]:
        d_alphas = alphas_gradient(d_out, act if chosen is None else torch.where(chosen, act, 0), alphas.dtype)
    return d_act, d_alphas, None


def alphas_gradient(d_out: Tensor, moving: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient at alphas [m] of out[k] = alphas[k] * moving + what does not depend on them."""
    acc = reference.accumulator_dtype(d_out.dtype)
    return torch.stack([(d.to(acc) * moving.to(acc)).sum() for d in d_out]).to(dtype)


_op.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
