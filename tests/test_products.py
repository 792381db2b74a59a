"""Products with frozen weights: float64 is the gold, and a model is left as it was found."""

from unittest import mock

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from accuracy import assert_accurate
from tiny import text_batch, tiny_llama
from torch import nn

from mipfast import locate, ops
from mipfast.model.accelerated import frozen_linears
from mipfast.ops import frozen_linear
from mipfast.ops.frozen_linear import linear

pytestmark = pytest.mark.usefixtures("poison_empty")

SHAPES = [(1, 1, 1), (3, 63, 1000), (17, 80, 11), (123, 431, 17), (64, 512, 96), (300, 33, 210)]  # rows, K, N
by_ours = pytest.mark.skipif(not frozen_linear._faster(), reason="torch's own products are taken on this CPU")


def tensors(rows, inner, outer, layout="plain"):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(size, generator=generator) for size in ((2 * rows, 2 * inner), (2 * outer, 2 * inner), (2 * outer,))
    )
    if layout == "strided":
        return x[1::2, ::2], weight[::2, 1::2], bias[::2]
    x, weight, bias = x[:rows, :inner].contiguous(), weight[:outer, :inner].contiguous(), bias[:outer].contiguous()
    if layout == "transposed":
        return x.t().contiguous().t(), weight.t().contiguous().t(), bias
    if layout == "expanded":  # what a sum's gradient is
        return x[:1, :1].expand(rows, inner), weight[:1].expand(outer, inner), bias[:1].expand(outer)
    return x, weight, bias


def gold(x, weight, bias):
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("layout", ["plain", "strided", "transposed", "expanded"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_value_and_gradient(shape, layout, with_bias):
    x, weight, bias = tensors(*shape, layout)
    bias = bias if with_bias else None
    leaf = x.detach().requires_grad_()
    found = linear(leaf, weight, bias)
    assert_accurate(found, gold(x, weight, bias), F.linear(x, weight, bias))
    for d_out in torch.randn(found.shape), torch.randn(found.shape[-1]).expand_as(found):
        (gradient,) = torch.autograd.grad(found, leaf, d_out, retain_graph=True)
        assert_accurate(gradient, d_out.double() @ weight.double(), d_out @ weight)


@pytest.mark.parametrize("shape", [(20, 5000, 40), (20, 40, 5000)], ids=lambda s: "x".join(map(str, s)))
def test_long_sums_are_as_exact_as_torch_s(shape):
    test_value_and_gradient(shape, "plain", False)


def test_any_number_of_dimensions():
    x, weight, bias = tensors(24, 33, 5)
    assert linear(x.view(2, 3, 4, 33), weight, bias).equal(linear(x, weight, bias).view(2, 3, 4, 5))


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_nothing(shape):
    x, weight, bias = tensors(*shape)
    leaf = x.requires_grad_()
    found = linear(leaf, weight, bias)
    assert found.equal(F.linear(x, weight, bias))
    assert not torch.autograd.grad(found.sum(), leaf)[0].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_forward_mode(dtype, with_bias):
    x, weight, bias = (t.to(dtype) for t in tensors(6, 63, 17))
    bias = bias if with_bias else None
    moved = torch.randn_like(x)
    with torch.no_grad(), forward_ad.dual_level():
        found = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, moved), weight, bias))
    assert_accurate(found.primal, gold(x, weight, bias), F.linear(x, weight, bias))
    assert_accurate(found.tangent, gold(moved, weight, None), F.linear(moved, weight))


@by_ours
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[2] >= 12], ids=lambda s: "x".join(map(str, s)))
def test_rows_and_threads_change_no_bit(shape):
    x, weight, bias = tensors(*shape)
    d_out = torch.randn(shape[0], shape[2])

    def both(part):
        leaf = x[part].requires_grad_()
        found = linear(leaf, weight, bias)
        return found.detach(), torch.autograd.grad(found, leaf, d_out[part])[0]

    whole = both(slice(None))
    assert all(a[2:].equal(b) for a, b in zip(whole, both(slice(2, None)), strict=True))
    assert all(a[:1].equal(b) for a, b in zip(whole, both(slice(1)), strict=True))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(a.equal(b) for a, b in zip(whole, both(slice(None)), strict=True))
    finally:
        torch.set_num_threads(threads)


@by_ours
@pytest.mark.parametrize("transposed", [False, True])
def test_nothing_is_written_beside_the_result(transposed):
    x, weight, _ = tensors(69, 37, 29)
    room = torch.full((71, 29), 3.0)
    with mock.patch.object(torch, "empty", lambda *size, **kind: room[1:70]):
        linear(x, weight.t().contiguous().t() if transposed else weight)
    assert (room[0] == 3).all() and (room[70] == 3).all() and not (room[1:70] == 3).any()


@pytest.mark.parametrize("x, weight", [((6, 4), (12, 3)), ((4, 6), (12, 8)), ((), (12, 8))], ids=str)
def test_what_does_not_fit_is_refused(x, weight):
    with pytest.raises(RuntimeError):
        linear(torch.zeros(x), torch.zeros(weight))
    with pytest.raises(RuntimeError):
        linear(torch.zeros(4, 8), torch.zeros(16, 8), torch.zeros(15))


@by_ours
def test_defaults_of_torch_change_nothing():
    x, weight, bias = tensors(20, 63, 17)
    expected = linear(x, weight, bias)
    for dtype in torch.float64, torch.bfloat16:
        torch.set_default_dtype(dtype)
        try:
            found = linear(x, weight, bias)
        finally:
            torch.set_default_dtype(torch.float32)
        assert found.equal(expected)
    with torch.device("meta"):
        assert linear(x, weight, bias).equal(expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16


@pytest.mark.parametrize("ours", [False, pytest.param(True, marks=by_ours)])
def test_the_ops_keep_their_dtypes_under_autocast(ours):
    act, weight, grad = torch.randn(5, 48), torch.randn(24, 48), torch.randn(2, 5, 24)
    alphas, path = torch.tensor([0.25, 0.75]), torch.tensor([[3]] * 5)

    def run():
        return ops.riemann_project(act, weight, alphas, neurons=path), *ops.project_accumulate(grad, weight, alphas)

    expected = run()
    with mock.patch.object(frozen_linear, "_faster", lambda: ours), torch.autocast("cpu", torch.bfloat16):
        found = run()
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and (a - b).abs().max() <= 0.02 * b.abs().max()


@by_ours
def test_the_backend_decides():
    args = tensors(8, 63, 17)
    with ops.backend("reference"):
        assert linear(*args).equal(F.linear(*args))


def test_a_model_is_left_as_it_was():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.ModuleDict(dict(plain=nn.Linear(3, 4), own=nn.Linear(3, 4), other=Doubled(3, 4)))
    replaced = model["own"].forward = lambda input: input
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    x = torch.randn(5, 3)
    with pytest.raises(KeyError), frozen_linears(model):
        assert model["plain"](x).allclose(F.linear(x, model["plain"].weight, model["plain"].bias))
        assert "forward" in vars(model["plain"]) and "forward" not in vars(model["other"])
        assert model["own"].forward is replaced
        raise KeyError
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_locate_by_either():
    model = tiny_llama()
    batch = text_batch(model, [9, 7], [3, 2])
    found = locate(model, batch)
    with mock.patch.object(frozen_linear, "_faster", lambda: False):
        expected = locate(model, batch)
    scale = expected.scores.abs().amax(2, keepdim=True)
    assert ((found.scores - expected.scores).abs() / scale).max() < 1e-5
    assert found.path.equal(expected.path)
