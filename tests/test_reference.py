"""The reference ops: hand-worked numbers, float64 gradients, and the identities that tie them together."""

import math

import pytest
import torch

from mipfast import ops
from mipfast.errors import InputError
from mipfast.ops import backends, reference


def double(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_two_neurons_by_hand():
    """F(a) = a0^2 + 3 a1 at a = (2, 1): IG = (4, 3); the integrated squared gradient = (16/3, 9)."""
    act = torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    # Gauss-Legendre with two nodes on [0, 1] is exact up to degree 3
    alphas = torch.tensor([0.5 - math.sqrt(3) / 6, 0.5 + math.sqrt(3) / 6], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    rows = ops.riemann_interpolate(act, alphas).requires_grad_()
    (grad,) = torch.autograd.grad((rows[..., 0] ** 2 + 3 * rows[..., 1]).sum(), rows)
    s1, s2 = ops.riemann_accumulate(grad, weights, act=act)
    torch.testing.assert_close(s1, torch.tensor([[4.0, 3.0]], dtype=torch.float64))
    torch.testing.assert_close(s2, torch.tensor([[16 / 3, 9.0]], dtype=torch.float64))
    assert s1.sum().item() == pytest.approx(4 + 3)  # completeness: F(a) - F(0)


def test_interpolate_only_named_neurons():
    act = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    neurons = torch.tensor([[2, -1], [0, 0]])
    out = ops.riemann_interpolate(act, torch.tensor([0.0, 0.5]), neurons)
    expected = torch.tensor([[[1.0, 2.0, 0.0], [0.0, 5.0, 6.0]], [[1.0, 2.0, 1.5], [2.0, 5.0, 6.0]]])
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpolate_rounds_once(dtype):
    act = double(5, 7).to(dtype)
    alphas = torch.tensor([0.1, 0.9])
    out = ops.riemann_interpolate(act, alphas)
    assert out.dtype == dtype
    exact = alphas.double()[:, None, None] * act.double()
    assert ((out - exact).abs() <= torch.finfo(dtype).eps * exact.abs()).all()


@pytest.mark.parametrize("neurons", [None, torch.tensor([[0, 3], [2, -1]])], ids=["all", "named"])
def test_interpolate_and_project_gradients(neurons):
    act, weight, alphas = double(2, 4), double(3, 4, seed=1), double(3, seed=2)
    for tensor in (act, weight, alphas):
        tensor.requires_grad_()
    torch.autograd.gradcheck(lambda a, k: ops.riemann_interpolate(a, k, neurons), (act, alphas))
    torch.autograd.gradcheck(lambda a, w, k: ops.riemann_project(a, w, k, neurons), (act, weight, alphas))


def test_project_is_interpolate_then_the_projection():
    act, weight, alphas = double(2, 4), double(3, 4, seed=1), double(3, seed=2)
    torch.testing.assert_close(
        ops.riemann_project(act, weight, alphas), ops.riemann_interpolate(act, alphas) @ weight.T
    )


@pytest.mark.parametrize("groups", [None, 1, 3])
@pytest.mark.parametrize("with_act", [True, False], ids=["act", "no-act"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_project_accumulate_is_accumulate_of_the_product(dtype, with_act, groups):
    grad_out, weight, weights = double(4, 6, 5).to(dtype), double(5, 7, seed=1).to(dtype), double(4, seed=2)
    act = double(6, 7, seed=3).to(dtype) if with_act else None
    found = ops.project_accumulate(grad_out, weight, weights, act=act, groups=groups)
    gold = reference.riemann_accumulate(
        grad_out.double() @ weight.double(),
        weights,
        act=None if act is None else act.double(),
        groups=groups,
    )
    for name, value, exact in zip(("s1", "s2"), found, gold, strict=True):
        assert value.dtype == reference.accumulator_dtype(dtype), name
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        assert (value - exact).abs().max() <= tolerance * exact.abs().max(), name


@pytest.mark.parametrize("shape", [(3,), (4, 3)], ids=["direction", "rows"])
@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, True, False])], ids=["all", "masked"])
def test_misdirection_loss(shape, mask):
    hidden, target = double(4, 3).requires_grad_(), double(*shape, seed=1).requires_grad_()
    rows = [((h - target[(i, ...) if len(shape) == 2 else ...]) ** 2).sum() / 3 for i, h in enumerate(hidden)]
    kept = [row for i, row in enumerate(rows) if mask is None or mask[i]]
    torch.testing.assert_close(ops.misdirection_loss(hidden, target, mask), sum(kept) / len(kept))
    torch.autograd.gradcheck(lambda h, t: ops.misdirection_loss(h, t, mask), (hidden, target))


def test_misdirection_loss_ignores_what_is_masked():
    hidden = torch.tensor([[1.0, 1.0], [math.nan, math.inf]], requires_grad=True)
    loss = ops.misdirection_loss(hidden, torch.zeros(2), torch.tensor([1, 0]))
    loss.backward()
    assert loss.item() == 1 and torch.equal(hidden.grad, torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert ops.misdirection_loss(hidden, torch.zeros(2), torch.tensor([0, 0])).item() == 0


def test_misdirection_loss_of_low_precision_is_float32():
    hidden = torch.full((300, 300), 300.0, dtype=torch.float16)  # its square overflows float16
    loss = ops.misdirection_loss(hidden, torch.zeros(300, dtype=torch.float16))
    assert loss.dtype == torch.float32 and loss.item() == 90000


def test_bad_inputs_are_named():
    act, alphas, weight = torch.randn(2, 4), torch.rand(3), torch.randn(5, 4)
    cases = [
        (ops.riemann_interpolate, (act[0], alphas), r"act has shape \[4\], expected \[any, any\]"),
        (ops.riemann_interpolate, (act, alphas, torch.tensor([[0]])), r"neurons has shape \[1, 1\]"),
        (
            ops.riemann_interpolate,
            (act, alphas, torch.tensor([[4], [0]])),
            "neurons names 4, expected below 4",
        ),
        (ops.riemann_interpolate, (act, alphas, torch.zeros(2, 1)), "neurons is torch.float32"),
        (ops.riemann_project, (act, weight.T, alphas), r"weight has shape \[4, 5\], expected \[any, 4\]"),
        (ops.riemann_project, (act, weight.double(), alphas), "weight is torch.float64"),
        (ops.project_accumulate, (torch.randn(3, 2, 6), weight, alphas), r"weight .* expected \[6, any\]"),
        (ops.misdirection_loss, (act, torch.randn(3)), r"target has shape \[3\], expected \[4\]"),
        (
            ops.misdirection_loss,
            (act, torch.randn(4), torch.ones(3)),
            r"mask has shape \[3\], expected \[2\]",
        ),
    ]
    for op, args, message in cases:
        with pytest.raises(InputError, match=message):
            op(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [None, 3])
def test_project_accumulate_is_the_reference_on_every_backend(dtype, groups):
    steps, rows, hidden, neurons = 4, 6, 17, 63
    grad_out, weight = torch.randn(steps, rows, hidden).to(dtype), torch.randn(hidden, neurons).to(dtype)
    act, weights = torch.randn(rows, neurons).to(dtype), torch.rand(steps)
    gold = reference.project_accumulate(
        grad_out.double(), weight.double(), weights.double(), act=act.double(), groups=groups
    )
    for name, usable, _ in backends.status():
        if usable and (name != "triton" or torch.cuda.is_available()):
            with ops.backend(name):
                found = ops.project_accumulate(grad_out, weight, weights, act=act, groups=groups)
            for one, want in zip(found, gold, strict=True):
                assert one.dtype == torch.float32 and one.shape == want.shape
                assert (one - want).abs().max() <= 1e-5 * want.abs().max(), name
