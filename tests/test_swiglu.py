"""swiglu: every usable backend against a float64 gold, by the accuracy rule of the design."""

import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import BACKENDS, DEVICE, DTYPES, assert_accurate

from mipfast import ops
from mipfast.errors import InputError
from mipfast.ops import reference

pytestmark = pytest.mark.usefixtures("poison_empty")

SHAPES = [(1,), (3, 63), (2, 1000), (123, 431), (2, 3, 1025), (4, 3420)]


def inputs(shape, dtype, device=DEVICE):
    """(gate, up, the result's gradient)"""
    generator = torch.Generator().manual_seed(0)
    return tuple((3 * torch.randn(shape, generator=generator)).to(dtype).to(device) for _ in range(3))


def value_and_gradients(function, gate, up, d_out, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (gate, up)]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))


def assert_swiglu(gate, up, d_out):
    found = value_and_gradients(ops.swiglu, gate, up, d_out)
    gold = value_and_gradients(reference.swiglu, gate, up, d_out, torch.float64)
    eager32 = value_and_gradients(reference.swiglu, gate, up, d_out, torch.float32)
    assert all(t.dtype == gate.dtype for t in found)
    for name, *values in zip(("value", "d_gate", "d_up"), found, gold, eager32, strict=True):
        assert_accurate(*values, name)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_swiglu(backend, device, shape, dtype):
    assert_swiglu(*inputs(shape, dtype, device))


def test_strides(backend, device):
    gate, up, d_out = inputs((10, 66), torch.float32, device)
    both = torch.cat([gate, up], 1)  # one projection that computes both
    assert_swiglu(*both.chunk(2, 1), d_out)
    assert_swiglu(gate[::2, 3:], up[::2, 3:], d_out[1::2, 3:])
    assert_swiglu(gate.t(), up.t(), d_out[:1].expand(10, -1).t())


def test_reference_gradients_are_the_formula_s():
    gate, up, d_out = (t.double() for t in inputs((5, 7), torch.float32, "cpu"))
    expected = value_and_gradients(reference.swiglu, gate, up, d_out)[1:]
    for found, want in zip(reference.swiglu_gradients(d_out, gate, up), expected, strict=True):
        torch.testing.assert_close(found, want)
    leaves = gate.requires_grad_(), up.requires_grad_()
    torch.autograd.gradcheck(ops.swiglu, leaves)


def test_far_out(backend, device):
    """Where e^-gate overflows, and what is no number stays none. silu(-inf) is -inf / inf, as torch has it."""
    gate = torch.tensor([1e4, -1e4, -88.3, -90.0, 0.0, -0.0, math.inf, -math.inf, math.nan], device=device)
    up, d_out = torch.full_like(gate, 2), torch.ones_like(gate)
    found = value_and_gradients(ops.swiglu, gate, up, d_out)
    expected = value_and_gradients(lambda g, u: F.silu(g) * u, gate, up, d_out)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-6, atol=1e-35, equal_nan=True)


@pytest.mark.parametrize("low", [-89.0, -10.0, -1.0])
def test_relative_error(backend, device, low):
    """The accuracy rule is about the largest value; small ones are to be good too: the FFN's weights amplify them."""
    gate = torch.linspace(low, -low, 100001, device=device)
    found, exact = ops.swiglu(gate, torch.ones_like(gate)), F.silu(gate.double())
    normal = exact.abs() > 1e-36
    assert ((found - exact)[normal].abs() <= 6e-7 * exact[normal].abs()).all()


def test_nothing_else_is_kept(backend, device):
    gate, up, _ = (t.requires_grad_() for t in inputs((4, 63), torch.float32, device))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        ops.swiglu(gate, up)
    assert sorted(kept) == sorted([gate.data_ptr(), up.data_ptr()])


def test_same_bits_for_any_number_of_threads():
    if "cpp" not in BACKENDS:
        pytest.skip("mipfast._C was not built")
    args = inputs((50, 1000), torch.float32, "cpu")
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with ops.backend("cpp"):
                found.append(value_and_gradients(ops.swiglu, *args))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(others, found[0], strict=True))


def test_nothing_to_do(backend, device):
    gate = torch.zeros(0, 5, device=device, requires_grad=True)
    out = ops.swiglu(gate, gate)
    out.sum().backward()
    assert out.shape == gate.grad.shape == (0, 5)


def test_what_does_not_fit():
    gate = torch.ones(2, 3)
    for up in (torch.ones(2, 4), torch.ones(2, 3, dtype=torch.float64)):
        with pytest.raises(InputError, match="swiglu: up is"):
            ops.swiglu(gate, up)
    with pytest.raises(InputError, match="floating point"):
        ops.swiglu(gate.int(), gate.int())


def test_opcheck(backend, device, monkeypatch):
    monkeypatch.undo()  # opcheck itself compares uninitialised memory
    gate, up, d_out = inputs((5, 63), torch.float32, device)
    torch.library.opcheck(torch.ops.mipfast.swiglu.default, (gate.requires_grad_(), up.requires_grad_()))
    torch.library.opcheck(torch.ops.mipfast.swiglu_gradients.default, (d_out, gate.detach(), up.detach()))


def test_compiles(monkeypatch):
    monkeypatch.undo()  # inductor allocates what autograd may not write into
    args = inputs((5, 63), torch.float32)
    compiled = torch.compile(ops.swiglu, fullgraph=True)
    torch.testing.assert_close(value_and_gradients(compiled, *args), value_and_gradients(ops.swiglu, *args))
