"""The public ops: input checks, torch.library registration, the only door to the Triton kernels and to `_C`.

Shapes and formulas are in `mipfast.ops.reference`, whose signatures these functions share. Every function raises
InputError for tensors that do not fit together.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from mipfast.errors import InputError
from mipfast.ops import reference
from mipfast.ops.backends import KERNEL_DTYPES, backend, choose, load_extension
from mipfast.ops.frozen_linear import linear

__all__ = [
    "RiemannSums",
    "backend",
    "misdirection_loss",
    "project_accumulate",
    "riemann_accumulate",
    "riemann_interpolate",
    "riemann_project",
    "swiglu",
]


def _check(op: str, name: str, tensor: Tensor, shape: tuple[int | None, ...], like: Tensor | None = None):
    """Floating point, `shape` (None = any size) and, with `like`, on its device."""
    found = tensor.shape
    if len(found) != len(shape) or any([w not in (None, f) for w, f in zip(shape, found, strict=True)]):
        expected = ", ".join("any" if want is None else str(want) for want in shape)
        raise InputError(f"{op}: {name} has shape {list(found)}, expected [{expected}]")
    if not tensor.dtype.is_floating_point:
        raise InputError(f"{op}: {name} is {tensor.dtype}, expected a floating-point tensor")
    if like is not None and tensor.device != like.device:
        raise InputError(f"{op}: {name} is on {tensor.device}, expected {like.device}; move it there")


def _check_neurons(op: str, neurons: Tensor, act: Tensor) -> None:
    if neurons.dim() != 2 or neurons.shape[0] != act.shape[0]:
        raise InputError(f"{op}: neurons has shape {list(neurons.shape)}, expected [{act.shape[0]}, k]")
    if neurons.dtype != torch.int64 or neurons.device != act.device:
        found = f"{neurons.dtype} on {neurons.device}"
        raise InputError(f"{op}: neurons is {found}, expected torch.int64 on {act.device}; convert it")
    # a look at the values would stall a GPU's stream, and cannot be compiled: there an index too large names none
    if neurons.device.type != "cpu" or torch.compiler.is_compiling() or not neurons.numel():
        return
    if int(neurons.max()) >= act.shape[1]:
        raise InputError(f"{op}: neurons names {int(neurons.max())}, expected below {act.shape[1]}")


def _check_groups(op: str, groups: int | None, rows: int) -> None:
    if groups is not None and (groups < 1 or rows % groups):
        raise InputError(f"{op}: groups={groups} does not divide the {rows} rows into equal groups")


def _untraced(*tensors: Tensor | None, constant: bool = False) -> bool:
    """Whether a call may go past torch.library: plain tensors, nobody compiling and, with constant, nobody
    differentiating. Its dispatch costs 15 us, and more where the caches have been flushed: misdirection_loss of
    64 x 2048 was 1.3x eager with it and is 2.3x without."""
    if torch.compiler.is_compiling():
        return False
    traced = constant and torch.is_grad_enabled()
    for t in tensors:
        if t is not None and (type(t) not in (Tensor, Parameter) or (traced and t.requires_grad)):
            return False
    return True


def riemann_interpolate(act: Tensor, alphas: Tensor, neurons: Tensor | None = None) -> Tensor:
    """out[k, r, j] = alphas[k] * act[r, j]: act [R, F], alphas [m] -> [m, R, F] of act's dtype.

    With neurons [R, k] int64 only these entries of each row are multiplied (-1: none). Differentiable.
    """
    _check("riemann_interpolate", "act", act, (None, None))
    _check("riemann_interpolate", "alphas", alphas, (None,), like=act)
    if neurons is not None:
        _check_neurons("riemann_interpolate", neurons, act)
    if _untraced(act, alphas, neurons, constant=True):
        return _interpolate(act, alphas, neurons)
    return _riemann_interpolate(act, alphas, neurons)


def _interpolate(act, alphas, neurons):
    name = choose(act)
    if name == "cpp" and act.numel():
        return _riemann_interpolate_cpp(act, alphas, neurons)
    if name == "triton" and act.numel():
        from mipfast_kernels.riemann_interpolate import riemann_interpolate as launch

        return launch(act, alphas.to(torch.float32).contiguous(), neurons)
    return reference.riemann_interpolate(act, alphas, neurons)


_riemann_interpolate = torch.library.custom_op(
    "mipfast::riemann_interpolate",
    _interpolate,
    mutates_args=(),
    schema="(Tensor act, Tensor alphas, Tensor? neurons) -> Tensor",
)


def _riemann_interpolate_cpp(act, alphas, neurons):
    if neurons is None and act.dtype == torch.float32:  # torch has it in one pass: 1.06 ms, C++ 1.22 (2 x 1024 x 3420)
        return reference.riemann_interpolate(act, alphas)
    act, alphas = act.contiguous(), alphas.to(torch.float32).contiguous()
    neurons = None if neurons is None else neurons.contiguous()
    out = torch.empty(len(alphas), *act.shape, dtype=act.dtype, device=act.device)
    load_extension().riemann_interpolate(
        act=act.data_ptr(),
        dtype=_cpp_dtype(act.dtype),
        alphas=alphas.data_ptr(),
        names=0 if neurons is None else neurons.data_ptr(),
        out=out.data_ptr(),
        steps=len(alphas),
        rows=act.shape[0],
        neurons=act.shape[1],
        names_per_row=0 if neurons is None else neurons.shape[1],
    )
    return out


@_riemann_interpolate.register_fake
def _(act, alphas, neurons):
    return act.new_empty(alphas.shape[0], *act.shape)


def _interpolate_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _interpolate_backward(ctx, d_out):
    act, alphas, neurons = ctx.saved_tensors
    chosen = None if neurons is None else reference.named(neurons, act.shape[1])
    d_act = d_alphas = None
    if ctx.needs_input_grad[0]:
        # the gradient of an interpolation is an accumulation
        d_act, _ = _riemann_accumulate(d_out, alphas, None, None)
        if chosen is not None:
            d_act = torch.where(chosen, d_act, d_out.sum(0, dtype=d_act.dtype))
        d_act = d_act.to(act.dtype)
    if ctx.needs_input_grad[1]:
        moving = act if chosen is None else torch.where(chosen, act, 0)
        d_alphas = _per_step(d_out, moving).to(alphas.dtype)
    return d_act, d_alphas, None


def _per_step(d_out: Tensor, moving: Tensor) -> Tensor:
    """What alpha_k multiplies, along the gradient: [m]."""
    acc = reference.accumulator_dtype(d_out.dtype)
    return torch.stack([(d.to(acc) * moving.to(acc)).sum() for d in d_out])


_riemann_interpolate.register_autograd(_interpolate_backward, setup_context=_interpolate_context)


def riemann_accumulate(
    grad: Tensor, weights: Tensor, *, act: Tensor | None = None, groups: int | None = None
) -> tuple[Tensor, Tensor]:
    """s1 = sum_k w_k g_k (times act), s2 = sum_k w_k g_k^2, in one pass over the gradient.

    grad [m, R, F], any strides; weights [m]; act [R, F] or None; groups=G sums R = G * P rows within each
    group. Returns s1, s2 [G, F] (groups=None: [R, F]), float32 (float64 for a float64 grad). Differentiable
    once in grad and act. Backends: reference, triton, cpp, cuda. The same input gives the same bits on every run.
    """
    op = "riemann_accumulate"
    _check(op, "grad", grad, (None, None, None))
    steps, rows, neurons = grad.shape
    _check(op, "weights", weights, (steps,), like=grad)
    if act is not None:
        _check(op, "act", act, (rows, neurons), like=grad)
    _check_groups(op, groups, rows)
    return _riemann_accumulate(grad, weights, act, groups)


@torch.library.custom_op(
    "mipfast::riemann_accumulate",
    mutates_args=(),
    schema="(Tensor grad, Tensor weights, Tensor? act, int? groups) -> (Tensor, Tensor)",
)
def _riemann_accumulate(grad, weights, act, groups):
    name = choose(grad)
    if name == "reference" or grad.numel() == 0:
        return reference.riemann_accumulate(grad, weights, act=act, groups=groups)
    weights = weights.to(torch.float32).contiguous()
    if act is not None and act.dtype not in KERNEL_DTYPES:
        act = act.to(torch.float32)
    num_groups = grad.shape[1] if groups is None else groups
    if name == "triton":
        from mipfast_kernels.riemann_accumulate import riemann_accumulate as launch

        return launch(grad, weights, act, num_groups)
    return (_riemann_accumulate_cuda if name == "cuda" else _riemann_accumulate_cpp)(grad, weights, act, num_groups)


def _riemann_accumulate_cpp(grad, weights, act, groups):
    grad = grad.contiguous()
    act = None if act is None else act.contiguous()
    s1 = torch.empty(groups, grad.shape[2], dtype=torch.float32, device=grad.device)
    s2 = torch.empty_like(s1)
    load_extension().riemann_accumulate(**_accumulate_arguments(grad, weights, act, s1, s2))
    return s1, s2


def _riemann_accumulate_cuda(grad, weights, act, groups):
    grad = grad.contiguous()
    act = None if act is None else act.contiguous()
    rows_per_group = grad.shape[1] // groups
    rows_per_split = min(rows_per_group, 16)  # one picture's 1024 patches alone would fill a fortieth of an H100
    splits = -(-rows_per_group // rows_per_split)
    s1 = torch.empty(splits, groups, grad.shape[2], dtype=torch.float32, device=grad.device)
    s2 = torch.empty_like(s1)
    with torch.cuda.device(grad.device):
        load_extension().riemann_accumulate_cuda(
            **_accumulate_arguments(grad, weights, act, s1, s2),
            rows_per_split=rows_per_split,
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return (s1[0], s2[0]) if splits == 1 else (s1.sum(0), s2.sum(0))


def _accumulate_arguments(grad, weights, act, s1, s2):
    steps, rows, neurons = grad.shape
    groups = s1.shape[-2]
    return dict(
        grad=grad.data_ptr(),
        grad_dtype=_cpp_dtype(grad.dtype),
        weights=weights.data_ptr(),
        act=0 if act is None else act.data_ptr(),
        act_dtype=_cpp_dtype((grad if act is None else act).dtype),
        s1=s1.data_ptr(),
        s2=s2.data_ptr(),
        steps=steps,
        groups=groups,
        rows_per_group=rows // groups,
        neurons=neurons,
    )


@functools.cache
def _cpp_dtype(dtype):
    return getattr(load_extension().Dtype, str(dtype).removeprefix("torch."))


@_riemann_accumulate.register_fake
def _(grad, weights, act, groups):
    rows = grad.shape[1] if groups is None else groups
    s1 = grad.new_empty(rows, grad.shape[2], dtype=reference.accumulator_dtype(grad.dtype))
    return s1, torch.empty_like(s1)


def _setup_context(ctx, inputs, output):
    grad, weights, act, ctx.groups = inputs
    ctx.save_for_backward(grad, weights, act)


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


_riemann_accumulate.register_autograd(_backward, setup_context=_setup_context)


def project_accumulate(
    grad_out: Tensor, weight: Tensor, weights: Tensor, *, act: Tensor | None = None, groups: int | None = None
) -> tuple[Tensor, Tensor]:
    """`riemann_accumulate(grad_out @ weight, weights, ...)` without writing that [m, R, F] gradient. The reference
    holds one step of it at a time, triton none; cpp writes it in float32 and accumulates it in one pass.

    grad_out [m, R, H], weight [H, F], any strides; weights [m]; act [R, F] or None; groups and result as in
    `riemann_accumulate`. Not differentiable. The same input gives the same bits on every run.
    """
    op = "project_accumulate"
    _check(op, "grad_out", grad_out, (None, None, None))
    steps, rows, width = grad_out.shape
    _check(op, "weight", weight, (width, None), like=grad_out)
    _check(op, "weights", weights, (steps,), like=grad_out)
    if act is not None:
        _check(op, "act", act, (rows, weight.shape[1]), like=grad_out)
        act = act.detach()
    _check_groups(op, groups, rows)
    return _project_accumulate(grad_out.detach(), weight.detach(), weights.detach(), act, groups)


@torch.library.custom_op(
    "mipfast::project_accumulate",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor weight, Tensor weights, Tensor? act, int? groups) -> (Tensor, Tensor)",
)
def _project_accumulate(grad_out, weight, weights, act, groups):
    name = choose(grad_out)
    if name == "reference" or grad_out.numel() == 0:
        return reference.project_accumulate(grad_out, weight, weights, act=act, groups=groups)
    if act is not None and act.dtype not in KERNEL_DTYPES:
        act = act.to(torch.float32)
    if name == "triton":
        from mipfast_kernels.project_accumulate import project_accumulate as launch

        if weight.dtype != grad_out.dtype:
            grad_out, weight = grad_out.to(torch.float32), weight.to(torch.float32)
        num_groups = grad_out.shape[1] if groups is None else groups
        return launch(grad_out, weight, weights.to(torch.float32).contiguous(), act, num_groups)
    grad = linear(grad_out.to(torch.float32), weight.to(torch.float32).t()).to(torch.float32)  # not autocast's
    weights = weights.to(torch.float32).contiguous()
    num_groups = grad.shape[1] if groups is None else groups
    return (_riemann_accumulate_cuda if name == "cuda" else _riemann_accumulate_cpp)(grad, weights, act, num_groups)


@_project_accumulate.register_fake
def _(grad_out, weight, weights, act, groups):
    rows = grad_out.shape[1] if groups is None else groups
    s1 = grad_out.new_empty(rows, weight.shape[1], dtype=reference.accumulator_dtype(grad_out.dtype))
    return s1, torch.empty_like(s1)


@dataclass
class RiemannSums:
    """Where the backward pass of `riemann_project` leaves the sums of its rows' gradient.

    weights [m], groups as in `riemann_accumulate`; s1 (times act) and s2 of the last backward pass, None before it.
    """

    weights: Tensor
    groups: int | None = None
    s1: Tensor | None = None
    s2: Tensor | None = None


def riemann_project(
    act: Tensor, weight: Tensor, alphas: Tensor, neurons: Tensor | None = None, *, sums: RiemannSums | None = None
) -> Tensor:
    """`riemann_interpolate(act, alphas, neurons) @ weight.T`: act [R, F], weight [H, F], alphas [m] -> [m,
    R, H].

    weight has act's dtype. Differentiable. All backends but the reference use that it is linear: one product with
    weight at any m, alphas[k] times it (with neurons: it plus (alphas[k] - 1) times the named ones' share).

    With sums, a backward pass through the result also accumulates the gradient of the interpolated rows into it, by
    `project_accumulate`, in one read of the result's gradient; the result then requires gradient whatever act does.
    """
    op = "riemann_project"
    _check(op, "act", act, (None, None))
    _check(op, "weight", weight, (None, act.shape[1]), like=act)
    _check(op, "alphas", alphas, (None,), like=act)
    if weight.dtype != act.dtype:
        raise InputError(f"{op}: weight is {weight.dtype}, expected act's {act.dtype}; convert one of them")
    if neurons is not None:
        _check_neurons(op, neurons, act)
    direct = _untraced(act, weight, alphas, neurons, constant=True)
    out = (_project if direct else _riemann_project)(act, weight, alphas, neurons)
    if sums is not None:
        _check(op, "sums.weights", sums.weights, (len(alphas),), like=act)
        _check_groups(op, sums.groups, len(act))

        def accumulate(d_out):
            sums.s1, sums.s2 = project_accumulate(d_out, weight, sums.weights, act=act, groups=sums.groups)

        # a hook, as a gradient has one slot per input, and this is a second result of the same gradient
        (out if out.requires_grad else out.requires_grad_()).register_hook(accumulate)
    return out


def _project(act, weight, alphas, neurons):
    name = choose(act)
    if name == "reference" or act.numel() == 0 or weight.numel() == 0:
        return reference.riemann_project(act, weight, alphas, neurons)
    if neurons is not None:
        neurons = _deduplicated(neurons)
    if name == "triton":
        from mipfast_kernels.riemann_project import riemann_project as launch

        return launch(act, weight, alphas.to(torch.float32).contiguous(), neurons)
    base = linear(act, weight).to(act.dtype)  # which autocast may have made another
    if neurons is None:
        return (_riemann_interpolate_cpp if name == "cpp" else reference.riemann_interpolate)(base, alphas, None)
    if name == "cpp":
        return _riemann_project_cpp(base, act, weight, alphas, neurons)
    values = act.gather(1, neurons.clamp(min=0)).masked_fill(neurons < 0, 0)
    moving = (values[:, None] @ weight.t()[neurons.clamp(min=0)])[:, 0]
    steps = (alphas.to(torch.float32) - 1)[:, None, None]
    return (base + steps * moving).to(act.dtype)


def _riemann_project_cpp(base, act, weight, alphas, neurons):
    base, act, weight, neurons = base.contiguous(), act.contiguous(), weight.contiguous(), neurons.contiguous()
    alphas = alphas.to(torch.float32).contiguous()
    out = torch.empty(len(alphas), *base.shape, dtype=base.dtype, device=base.device)
    load_extension().riemann_project(
        base=base.data_ptr(),
        act=act.data_ptr(),
        weight=weight.data_ptr(),
        dtype=_cpp_dtype(base.dtype),
        alphas=alphas.data_ptr(),
        names=neurons.data_ptr(),
        out=out.data_ptr(),
        steps=len(alphas),
        rows=len(base),
        hidden=base.shape[1],
        neurons=act.shape[1],
        names_per_row=neurons.shape[1],
    )
    return out


_riemann_project = torch.library.custom_op(
    "mipfast::riemann_project",
    _project,
    mutates_args=(),
    schema="(Tensor act, Tensor weight, Tensor alphas, Tensor? neurons) -> Tensor",
)


def _deduplicated(neurons: Tensor) -> Tensor:
    """Each row's neurons, sorted, -1 where one is named again."""
    ordered = neurons.sort(1).values
    return torch.cat([ordered[:, :1], ordered[:, 1:].masked_fill(ordered[:, 1:] == ordered[:, :-1], -1)], 1)


@_riemann_project.register_fake
def _(act, weight, alphas, neurons):
    return act.new_empty(alphas.shape[0], act.shape[0], weight.shape[0])


def _project_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _project_backward(ctx, d_out):
    act, weight, alphas, neurons = ctx.saved_tensors
    chosen = None if neurons is None else reference.named(neurons, act.shape[1])
    moving = act if chosen is None else torch.where(chosen, act, 0)
    d_act = d_weight = d_alphas = None
    # collapsed over the steps first, so that each product is one and not m
    scaled = _riemann_accumulate(d_out, alphas, None, None)[0].to(weight.dtype)
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
        d_alphas = _per_step(d_out, moving @ weight.t()).to(alphas.dtype)
    return d_act, d_weight, d_alphas, None


_riemann_project.register_autograd(_project_backward, setup_context=_project_context)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, the activation of a gated FFN: gate, up of one shape and dtype -> the same.

    Differentiable once. Nothing but gate and up is kept for the backward pass; torch keeps silu(gate) too.
    """
    if up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device or not gate.is_floating_point():
        found, expected = (f"{list(t.shape)} {t.dtype} on {t.device}" for t in (up, gate))
        raise InputError(f"swiglu: up is {found}, expected gate's {expected}, of floating point; convert one of them")
    if _untraced(gate, up, constant=True):
        return _activate(gate, up)
    return (_Swiglu.apply if _untraced(gate, up) else _swiglu)(gate, up)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _activate(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        return _activation_gradients(d_out, *ctx.saved_tensors)


def _activate(gate, up):
    name = choose(gate)
    if name not in ("cpp", "triton") or not gate.numel():
        return reference.swiglu(gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    if name == "triton":
        from mipfast_kernels.swiglu import swiglu as launch

        return launch(gate, up)
    out = torch.empty_like(gate)
    load_extension().swiglu(
        gate=gate.data_ptr(), up=up.data_ptr(), dtype=_cpp_dtype(gate.dtype), out=out.data_ptr(), size=gate.numel()
    )
    return out


def _activation_gradients(d_out, gate, up):
    name = choose(gate)
    if name not in ("cpp", "triton") or not gate.numel():
        return reference.swiglu_gradients(d_out, gate, up)
    d_out, gate, up = d_out.contiguous(), gate.contiguous(), up.contiguous()
    if name == "triton":
        from mipfast_kernels.swiglu import swiglu_gradients as launch

        return launch(d_out, gate, up)
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(gate)
    load_extension().swiglu_gradients(
        d_out=d_out.data_ptr(),
        gate=gate.data_ptr(),
        up=up.data_ptr(),
        dtype=_cpp_dtype(gate.dtype),
        d_gate=d_gate.data_ptr(),
        d_up=d_up.data_ptr(),
        size=gate.numel(),
    )
    return d_gate, d_up


_swiglu = torch.library.custom_op(
    "mipfast::swiglu", _activate, mutates_args=(), schema="(Tensor gate, Tensor up) -> Tensor"
)
_swiglu_gradients = torch.library.custom_op(
    "mipfast::swiglu_gradients",
    _activation_gradients,
    mutates_args=(),
    schema="(Tensor d_out, Tensor gate, Tensor up) -> (Tensor, Tensor)",
)


@_swiglu.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@_swiglu_gradients.register_fake
def _(d_out, gate, up):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _swiglu_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx, d_out):
    return _swiglu_gradients(d_out, *ctx.saved_tensors)


_swiglu.register_autograd(_swiglu_backward, setup_context=_swiglu_context)


def misdirection_loss(hidden: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the rows that count of ||hidden - target||^2 / D: hidden [T, D], target [D] or [T, D] ->
    scalar.

    mask [T] is true (non-zero) where a row counts; with none the loss is 0. Differentiable in hidden and
    target.
    """
    op = "misdirection_loss"
    _check(op, "hidden", hidden, (None, None))
    _check(op, "target", target, tuple(hidden.shape[1:] if target.dim() == 1 else hidden.shape), like=hidden)
    if mask is not None and mask.shape != hidden.shape[:1]:
        raise InputError(f"{op}: mask has shape {list(mask.shape)}, expected [{hidden.shape[0]}]")
    if _untraced(hidden, target, mask) and hidden.numel() and choose(hidden) == "cpp":
        return _MisdirectionLossCpp.apply(hidden, target, mask)
    return _misdirection_loss(hidden, target, mask)


class _MisdirectionLossCpp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, target, mask):
        ctx.save_for_backward(hidden, target, mask)
        return _misdirection_loss_cpp(hidden, target, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        return _loss_gradients(ctx, d_loss, _misdirection_gradient_cpp)


@torch.library.custom_op(
    "mipfast::misdirection_loss", mutates_args=(), schema="(Tensor hidden, Tensor target, Tensor? mask) -> Tensor"
)
def _misdirection_loss(hidden, target, mask):
    name = choose(hidden)
    if name == "cpp" and hidden.numel():
        return _misdirection_loss_cpp(hidden, target, mask)
    if name == "triton" and hidden.numel():
        from mipfast_kernels.misdirection_loss import misdirection_loss as launch

        target, kept = _loss_inputs(target, mask)
        return launch(hidden, target, kept) / _loss_terms(hidden, mask)
    return reference.misdirection_loss(hidden, target, mask)


def _misdirection_loss_cpp(hidden, target, mask):
    tensors = _loss_inputs_cpp(hidden, target, mask)
    return torch.tensor(load_extension().misdirection_loss(**_loss_arguments_cpp(*tensors)), dtype=torch.float32)


def _misdirection_gradient_cpp(d_loss, hidden, target, mask):
    tensors = _loss_inputs_cpp(hidden, target, mask)
    gradient = torch.empty_like(tensors[0])
    arguments = _loss_arguments_cpp(*tensors)
    load_extension().misdirection_gradient(**arguments, d_loss=d_loss.item(), gradient=gradient.data_ptr())
    return gradient


def _loss_inputs_cpp(hidden, target, mask):
    target = target if target.dtype == hidden.dtype else target.to(torch.float32)
    return hidden.contiguous(), target.contiguous(), None if mask is None else mask.bool().contiguous()


def _loss_arguments_cpp(hidden, target, kept):
    return dict(
        hidden=hidden.data_ptr(),
        hidden_dtype=_cpp_dtype(hidden.dtype),
        target=target.data_ptr(),
        target_dtype=_cpp_dtype(target.dtype),
        one_target=target.dim() == 1,
        kept=0 if kept is None else kept.data_ptr(),
        rows=hidden.shape[0],
        width=hidden.shape[1],
    )


def _loss_inputs(target, mask):
    target = target if target.dtype in KERNEL_DTYPES else target.to(torch.float32)
    return target, None if mask is None else mask.bool().to(torch.int8)


def _loss_terms(hidden, mask):
    """How many squares the loss is the mean of; at least one row's."""
    rows = hidden.shape[0] if mask is None else mask.bool().sum().clamp(min=1)
    return rows * hidden.shape[1]


@_misdirection_loss.register_fake
def _(hidden, target, mask):
    return hidden.new_empty((), dtype=reference.accumulator_dtype(hidden.dtype))


@torch.library.custom_op(
    "mipfast::misdirection_gradient",
    mutates_args=(),
    schema="(Tensor d_loss, Tensor hidden, Tensor target, Tensor? mask) -> Tensor",
)
def _misdirection_gradient(d_loss, hidden, target, mask):
    name = choose(hidden)
    if name == "cpp" and hidden.numel():
        return _misdirection_gradient_cpp(d_loss, hidden, target, mask)
    if name == "triton" and hidden.numel():
        from mipfast_kernels.misdirection_loss import misdirection_gradient as launch

        target, kept = _loss_inputs(target, mask)
        return launch(hidden, target, kept, 2 * d_loss / _loss_terms(hidden, mask))
    return reference.misdirection_gradient(d_loss, hidden, target, mask).to(hidden.dtype)


@_misdirection_gradient.register_fake
def _(d_loss, hidden, target, mask):
    return hidden.new_empty(hidden.shape)


def _loss_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _loss_backward(ctx, d_loss):
    return _loss_gradients(ctx, d_loss, _misdirection_gradient)


def _loss_gradients(ctx, d_loss, gradient_of):
    hidden, target, mask = ctx.saved_tensors
    d_hidden = d_target = None
    if ctx.needs_input_grad[0]:
        d_hidden = gradient_of(d_loss, hidden, target, mask)
    if ctx.needs_input_grad[1]:
        gradient = reference.misdirection_gradient(d_loss, hidden, target, mask)
        d_target = -gradient.sum_to_size(target.shape).to(target.dtype)
    return d_hidden, d_target, None


_misdirection_loss.register_autograd(_loss_backward, setup_context=_loss_context)
