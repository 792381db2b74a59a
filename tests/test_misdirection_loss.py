"""misdirection_loss: every usable backend against a float64 gold, by the accuracy rule of the design."""

import math

import pytest
import torch
from accuracy import BACKENDS, DEVICE, DTYPES, assert_accurate

from mipfast import ops
from mipfast.ops import backends, reference

pytestmark = pytest.mark.usefixtures("poison_empty")

SHAPES = [(1, 1), (3, 63), (2, 1000), (123, 431), (5, 2050)]


def inputs(shape, dtype, masked, one_target, device=DEVICE):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape, generator=generator).to(dtype)
    target = torch.randn(shape[1:] if one_target else shape, generator=generator).to(dtype)
    mask = torch.arange(shape[0]) % 3 != 1 if masked else None
    if masked:
        hidden[1::3] = math.nan
        mask = mask.to(device)
    return hidden.to(device), target.to(device), mask


def value_and_gradients(function, hidden, target, mask, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (hidden, target)]
    loss = function(*leaves, mask)
    return loss, *torch.autograd.grad(loss * 3, leaves)  # 3: the loss is one term of several


def assert_loss(hidden, target, mask):
    found = value_and_gradients(ops.misdirection_loss, hidden, target, mask)
    gold = value_and_gradients(reference.misdirection_loss, hidden, target, mask, torch.float64)
    eager32 = value_and_gradients(reference.misdirection_loss, hidden, target, mask, torch.float32)
    assert found[0].dtype == torch.float32 and found[1].dtype == hidden.dtype and found[2].dtype == target.dtype
    for name, *values in zip(("loss", "d_hidden", "d_target"), found, gold, eager32, strict=True):
        assert_accurate(*values, name)


@pytest.mark.parametrize(("masked", "one_target"), [(True, True), (False, False)], ids=["masked-direction", "all-rows"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_misdirection_loss(backend, device, shape, dtype, masked, one_target):
    assert_loss(*inputs(shape, dtype, masked, one_target, device))


def test_strides_and_mixed_dtypes(backend, device):
    hidden, target, mask = inputs((10, 66), torch.bfloat16, True, False, device)
    assert_loss(hidden[::2, 3:], target.float()[::2, 3:], mask[::2])
    assert_loss(hidden.t().contiguous().t(), target.double(), mask.long() * 2)


def test_no_row_counts(backend, device):
    hidden = torch.full((4, 63), math.nan, device=device, requires_grad=True)
    loss = ops.misdirection_loss(hidden, torch.zeros(63, device=device), torch.zeros(4, device=device))
    loss.backward()
    assert loss.item() == 0 and torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_scaled_gradients_do_not_underflow(backend, device):
    """2 (h - t) / (T D) is 6e-9 here, below float16's smallest; a loss scaler's factor has to come before rounding."""
    hidden = torch.full((8, 4096), 1e-4, dtype=torch.float16, device=device, requires_grad=True)
    (65536 * ops.misdirection_loss(hidden, hidden.new_zeros(4096))).backward()
    assert (hidden.grad > 1e-4).all()


@pytest.mark.parametrize("scale", [1.0, 1 / 3, 2.0**-14, 1e-6, 100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_gradients_round_as_torch_rounds(backend, device, dtype, scale):
    """All 65536 values, NaN and infinities among them."""
    if backend == "triton" and backends.interpreting():
        pytest.skip("the interpreter rounds to bfloat16 toward zero")
    values = torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(dtype)
    hidden = values[None].clone().requires_grad_()
    (ops.misdirection_loss(hidden, torch.zeros_like(values)) * (scale * 2**15)).backward()
    torch.testing.assert_close(hidden.grad[0], (values.float() * scale).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_same_bits_for_any_number_of_threads():
    if "cpp" not in BACKENDS:
        pytest.skip("mipfast._C was not built")
    hidden, target, mask = inputs((50, 1000), torch.float32, True, True, "cpu")
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with ops.backend("cpp"):
                found.append(value_and_gradients(ops.misdirection_loss, hidden, target, mask)[:2])
    finally:
        torch.set_num_threads(threads)
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0]) and torch.equal(gradient, found[0][1])


def test_same_bits_every_run(backend, device):
    hidden, target, mask = inputs((40, 431), torch.bfloat16, True, True, device)
    first = ops.misdirection_loss(hidden, target, mask)
    assert all(torch.equal(first, ops.misdirection_loss(hidden, target, mask)) for _ in range(3))


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all"])
def test_opcheck(backend, device, masked, monkeypatch):
    monkeypatch.undo()  # opcheck itself compares uninitialised memory
    hidden, target, mask = inputs((5, 63), torch.float32, masked, True, device)
    hidden = hidden.nan_to_num()
    args = (hidden.requires_grad_(), target.requires_grad_(), mask)
    torch.library.opcheck(torch.ops.mipfast.misdirection_loss.default, args)
    args = (torch.ones((), device=device), hidden.detach(), target.detach(), mask)
    torch.library.opcheck(torch.ops.mipfast.misdirection_gradient.default, args)


def test_compiles(monkeypatch):
    monkeypatch.undo()  # inductor allocates what autograd may not write into
    hidden, target, mask = inputs((5, 63), torch.float32, True, True)
    want = value_and_gradients(ops.misdirection_loss, hidden, target, mask)
    compiled = torch.compile(ops.misdirection_loss, fullgraph=True)
    torch.testing.assert_close(value_and_gradients(compiled, hidden, target, mask), want)
