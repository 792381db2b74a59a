"""riemann_project: every usable backend against a float64 gold, by the accuracy rule of the design."""

import pytest
import torch
from accuracy import DEVICE, DTYPES, assert_accurate

from mipfast import ops
from mipfast.ops import reference

pytestmark = pytest.mark.usefixtures("poison_empty")

SHAPES = [(1, 1, 1, 1), (2, 3, 63, 65), (5, 2, 1000, 17), (3, 123, 431, 130)]  # steps, rows, F, H
NEURONS = {"all": 0, "named": 5}


def inputs(shape, dtype, k, device=DEVICE):
    steps, rows, neurons, width = shape
    generator = torch.Generator().manual_seed(0)
    act = torch.randn(rows, neurons, generator=generator).to(dtype)
    weight = torch.randn(width, neurons, generator=generator).to(dtype)
    alphas = torch.rand(steps, generator=generator)
    named = torch.randint(-1, neurons, (rows, k), generator=generator) if k else None
    if k:
        named[0, :3] = torch.tensor([-1, 0, 0])  # none, and one twice
        named = named.to(device)
    return act.to(device), weight.to(device), alphas.to(device), named


def assert_rows(found, act, weight, alphas, neurons):
    gold = reference.riemann_project(act.double(), weight.double(), alphas.double(), neurons)
    eager32 = reference.riemann_project(act.float(), weight.float(), alphas, neurons)
    assert found.dtype == act.dtype
    assert_accurate(found, gold, eager32)


@pytest.mark.parametrize("k", NEURONS.values(), ids=NEURONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_riemann_project(backend, device, shape, dtype, k):
    args = inputs(shape, dtype, k, device)
    assert_rows(ops.riemann_project(*args), *args)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strides(backend, device, layout):
    act, weight, alphas, neurons = inputs((4, 10, 66, 34), torch.float32, 4, device)
    if layout == "transposed":  # GPT-2's Conv1D keeps its weight [F, H]
        act, weight, neurons = (t.t().contiguous().t() for t in (act, weight, neurons))
    elif layout == "sliced":
        act, weight, neurons = act[1::2, 3:], weight[::2, 3:], neurons[1::2, ::2].clamp(max=60)
        alphas = alphas[::2].double()
    else:  # a path is one for all rows of a sample
        act, neurons = act[:1].expand(10, -1), neurons[:1].expand(10, -1)
    assert_rows(ops.riemann_project(act, weight, alphas, neurons), act, weight, alphas, neurons)


@pytest.mark.parametrize("k", NEURONS.values(), ids=NEURONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradient(backend, device, dtype, k):
    act, weight, alphas, neurons = inputs((3, 4, 65, 33), dtype, k, device)
    d_out = torch.randn(3, 4, 33).to(dtype).to(device)

    def gradients(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (act, weight, alphas)]
        return torch.autograd.grad(function(*leaves, neurons), leaves, d_out.to(dtype))

    gold, eager32 = (gradients(reference.riemann_project, t) for t in (torch.float64, torch.float32))
    found = gradients(ops.riemann_project, dtype)
    for name, *values in zip(("act", "weight", "alphas"), found, gold, eager32, strict=True):
        assert values[0].dtype == dtype
        assert_accurate(*values, name)


@pytest.mark.parametrize("k", NEURONS.values(), ids=NEURONS)
def test_opcheck(backend, device, k, monkeypatch):
    monkeypatch.undo()  # opcheck itself compares uninitialised memory
    act, weight, alphas, neurons = inputs((3, 4, 63, 17), torch.float32, k, device)
    args = (act.requires_grad_(), weight.requires_grad_(), alphas.requires_grad_(), neurons)
    torch.library.opcheck(torch.ops.mipfast.riemann_project.default, args)


def test_compiles(monkeypatch):
    monkeypatch.undo()  # inductor allocates what autograd may not write into
    act, weight, alphas, neurons = inputs((3, 4, 63, 17), torch.float32, 5)

    def loss(act):
        return ops.riemann_project(2 * act, weight, alphas, neurons).square().sum()

    (want,) = torch.autograd.grad(loss(act.requires_grad_()), act)
    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(act), act)
    torch.testing.assert_close(found, want)
