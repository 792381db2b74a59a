"""Every op in plain torch: the paper on one page, and the truth the kernels are held to.

Notation: m quadrature steps, R rows (sample, position), F neurons of one FFN, H its output width. float64 in
gives float64 out; from lower precisions, sums are kept and returned in float32. Nothing is checked here:
`mipfast.ops` does. Source: MIP-Editor, arXiv 2511.06793; the squared-gradient form is the Fisher attribution
without its z-score.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over inputs of `dtype` are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def riemann_interpolate(act: Tensor, alphas: Tensor, neurons: Tensor | None = None) -> Tensor:
    """Rows on the straight line from zero to the activation: out[k, r, j] = alphas[k] * act[r, j].

    act [R, F] floating; alphas [m]; neurons [R, k] int64 or None. With `neurons`, only those k entries of
    each row are multiplied and the others are copied; an entry of -1 names no neuron, one named twice is
    multiplied once. Returns [m, R, F] of act's dtype (products in float32 or float64, rounded once).
    Differentiable in act and alphas.
    """
    acc = accumulator_dtype(act.dtype)
    scaled = (alphas.to(acc)[:, None, None] * act.to(acc)).to(act.dtype)
    if neurons is None:
        return scaled
    return torch.where(named(neurons, act.shape[-1]), scaled, act)


def named(neurons: Tensor, num_neurons: int) -> Tensor:
    """Whether a row names a neuron: neurons [R, k] -> bool [R, num_neurons]."""
    # one column more than there are neurons, so that -1 has somewhere to go
    chosen = torch.zeros(neurons.shape[0], num_neurons + 1, dtype=torch.bool, device=neurons.device)
    chosen.scatter_(1, torch.where(neurons < 0, num_neurons, neurons), True)
    return chosen[:, :num_neurons]


def riemann_accumulate(
    grad: Tensor, weights: Tensor, *, act: Tensor | None = None, groups: int | None = None
) -> tuple[Tensor, Tensor]:
    """Quadrature sums of a gradient: s1 = sum_k w_k g_k (times act if given), s2 = sum_k w_k g_k^2.

    grad [m, R, F] floating; weights [m]; act [R, F] or None; groups = G splits the rows into G runs of R / G
    neighbours and sums within each, None keeps every row. Returns s1, s2 [G, F] or [R, F], float32 (float64
    for float64). s1 with act is the integrated gradient, s2 the integrated squared gradient.
    """
    acc = accumulator_dtype(grad.dtype)
    s1 = torch.zeros(grad.shape[1:], dtype=acc, device=grad.device)
    s2 = torch.zeros_like(s1)
    for g, w in zip(grad, weights.tolist(), strict=True):
        g = g.to(acc)
        s1.add_(g, alpha=w)
        s2.addcmul_(g, g, value=w)
    return _finish(s1, s2, act, groups)


def project_accumulate(
    grad_out: Tensor, weight: Tensor, weights: Tensor, *, act: Tensor | None = None, groups: int | None = None
) -> tuple[Tensor, Tensor]:
    """`riemann_accumulate(grad_out @ weight, weights)` without ever writing the [m, R, F] gradient.

    grad_out [m, R, H] floating, the gradient at the FFN's output; weight [H, F] of its output projection
    (the layout of torch.nn.Linear); weights [m]; act, groups and the result as in `riemann_accumulate`. s1
    is linear in grad_out, so it takes one product and not m; s2 needs each step's gradient, held one step at
    a time.
    """
    acc = accumulator_dtype(grad_out.dtype)
    weight = weight.to(acc)
    w_acc = weights.to(acc)
    s1 = torch.tensordot(w_acc, grad_out.to(acc), 1) @ weight
    s2 = torch.zeros_like(s1)
    for dy, w in zip(grad_out, weights.tolist(), strict=True):
        g = dy.to(acc) @ weight
        s2.addcmul_(g, g, value=w)
    return _finish(s1, s2, act, groups)


def _finish(s1: Tensor, s2: Tensor, act: Tensor | None, groups: int | None) -> tuple[Tensor, Tensor]:
    if act is not None:
        s1 = s1 * act.to(s1.dtype)
    if groups is not None:
        rows, neurons = s1.shape
        s1 = s1.view(groups, rows // groups, neurons).sum(1)
        s2 = s2.view(groups, rows // groups, neurons).sum(1)
    return s1, s2


def riemann_project(act: Tensor, weight: Tensor, alphas: Tensor, neurons: Tensor | None = None) -> Tensor:
    """The FFN's output at every step: out[k] = riemann_interpolate(act, alphas, neurons)[k] @ weight.T.

    act [R, F] floating; weight [H, F] of act's dtype; alphas [m]; neurons [R, k] int64 or None, as in
    `riemann_interpolate`. Returns [m, R, H] of act's dtype. Differentiable in act, weight and alphas.
    """
    return F.linear(riemann_interpolate(act, alphas, neurons), weight)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """A gated FFN's activation: silu(gate) * up = gate * sigmoid(gate) * up.

    gate, up of one shape and dtype, floating. Returns the same (arithmetic in float32 or float64, rounded once).
    Differentiable.
    """
    acc = accumulator_dtype(gate.dtype)
    return (F.silu(gate.to(acc)) * up.to(acc)).to(gate.dtype)


def swiglu_gradients(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu` at gate and at up, where d_out is its result's; all of one shape and dtype."""
    acc = accumulator_dtype(gate.dtype)
    d, g, sigmoid = d_out.to(acc), gate.to(acc), gate.to(acc).sigmoid()
    d_gate = d * up.to(acc) * (sigmoid * (1 + g * (1 - sigmoid)))
    return d_gate.to(gate.dtype), (d * (g * sigmoid)).to(gate.dtype)


def misdirection_loss(hidden: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the rows that count of ||hidden - target||^2 / D.

    hidden [T, D] floating; target [D] or [T, D]; mask [T], true (non-zero) where a row counts, None for all.
    Returns a float32 (float64 for float64) scalar; 0 where no row counts, whatever the masked rows hold.
    Differentiable in hidden and target.
    """
    acc = accumulator_dtype(hidden.dtype)
    diff = hidden.to(acc) - target.to(acc)
    if mask is None:
        return diff.square().mean()
    # where, not a product: a masked row may hold NaN, and 0 * NaN would reach the loss and the gradient
    diff = torch.where(mask.bool()[:, None], diff, 0)
    count = mask.bool().sum().clamp(min=1)
    return diff.square().sum() / (count * hidden.shape[-1])


def misdirection_gradient(d_loss: Tensor, hidden: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """d misdirection_loss / d hidden, times d_loss (a scalar), in float32 (float64 for float64); 0 in masked rows."""
    acc = accumulator_dtype(hidden.dtype)
    diff = hidden.to(acc) - target.to(acc)
    count = hidden.shape[0] if mask is None else mask.bool().sum().clamp(min=1)
    gradient = diff * (2 * d_loss / (count * hidden.shape[-1]))
    return gradient if mask is None else torch.where(mask.bool()[:, None], gradient, 0)
