"""riemann_interpolate: every usable backend against a float64 gold, by the accuracy rule of the design."""

import pytest
import torch
from accuracy import DEVICE, DTYPES, assert_accurate

from mipfast import ops
from mipfast.ops import reference

pytestmark = pytest.mark.usefixtures("poison_empty")

SHAPES = [(1, 1, 1), (2, 3, 63), (5, 2, 1000), (3, 123, 431), (4, 4, 1025)]  # steps, rows, neurons
NEURONS = {"all": 0, "named": 5}


def inputs(shape, dtype, k, device=DEVICE):
    steps, rows, neurons = shape
    generator = torch.Generator().manual_seed(0)
    act = torch.randn(rows, neurons, generator=generator).to(dtype)
    alphas = torch.rand(steps, generator=generator)
    named = torch.randint(-1, neurons, (rows, k), generator=generator) if k else None
    if k:
        named[0, :3] = torch.tensor([-1, 0, 0])  # none, and one twice
        named = named.to(device)
    return act.to(device), alphas.to(device), named


def assert_rows(found, act, alphas, neurons):
    gold = reference.riemann_interpolate(act.double(), alphas.double(), neurons)
    eager32 = reference.riemann_interpolate(act.float(), alphas, neurons)
    assert found.dtype == act.dtype
    assert_accurate(found, gold, eager32)
    if neurons is not None:  # what is not named is copied
        other = ~reference.named(neurons, act.shape[1])
        assert all(torch.equal(rows[other], act[other]) for rows in found)


@pytest.mark.parametrize("k", NEURONS.values(), ids=NEURONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_riemann_interpolate(backend, device, shape, dtype, k):
    args = inputs(shape, dtype, k, device)
    assert_rows(ops.riemann_interpolate(*args), *args)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strides(backend, device, layout):
    act, alphas, neurons = inputs((4, 10, 66), torch.float32, 4, device)
    if layout == "transposed":
        act, neurons = act.t().contiguous().t(), neurons.t().contiguous().t()
    elif layout == "sliced":
        act, neurons, alphas = act[1::2, 3:], neurons[1::2, ::2].clamp(max=60), alphas[::2].double()
    else:  # a path is one for all rows of a sample
        act, neurons = act[:1].expand(10, -1), neurons[:1].expand(10, -1)
    assert_rows(ops.riemann_interpolate(act, alphas, neurons), act, alphas, neurons)


@pytest.mark.parametrize("k", NEURONS.values(), ids=NEURONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradient(backend, device, dtype, k):
    act, alphas, neurons = inputs((3, 4, 65), dtype, k, device)
    d_out = torch.randn(3, 4, 65).to(dtype).to(device)

    def gradients(function, dtype):
        leaves = [act.to(dtype).requires_grad_(), alphas.to(dtype).requires_grad_()]
        return torch.autograd.grad(function(*leaves, neurons), leaves, d_out.to(dtype))

    gold, eager32 = (gradients(reference.riemann_interpolate, t) for t in (torch.float64, torch.float32))
    for name, *values in zip(("act", "alphas"), gradients(ops.riemann_interpolate, dtype), gold, eager32, strict=True):
        assert values[0].dtype == dtype
        assert_accurate(*values, name)


@pytest.mark.parametrize("k", NEURONS.values(), ids=NEURONS)
def test_opcheck(backend, device, k, monkeypatch):
    monkeypatch.undo()  # opcheck itself compares uninitialised memory
    act, alphas, neurons = inputs((3, 4, 63), torch.float32, k, device)
    args = (act.requires_grad_(), alphas.requires_grad_(), neurons)
    torch.library.opcheck(torch.ops.mipfast.riemann_interpolate.default, args)


def test_no_rows(backend, device):
    act, alphas, _ = inputs((3, 4, 8), torch.float32, 0, device)
    assert ops.riemann_interpolate(act[:0], alphas).shape == (3, 0, 8)


@pytest.mark.slow
def test_compiles(monkeypatch):
    monkeypatch.undo()  # inductor allocates what autograd may not write into
    act, alphas, neurons = inputs((3, 4, 63), torch.float32, 5)

    def loss(act, alphas):
        return ops.riemann_interpolate(2 * act, alphas, neurons).square().sum()

    leaves = act.requires_grad_(), alphas.requires_grad_()
    want = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    torch.testing.assert_close(found, want)
