"""riemann_accumulate: every usable backend against a float64 gold, by the accuracy rule of the design."""

import math
import re

import pytest
import torch
from accuracy import BACKENDS, DEVICE, DTYPES, assert_accurate

from mipfast import ops
from mipfast.errors import BackendError, InputError
from mipfast.ops import backends

pytestmark = pytest.mark.usefixtures("poison_empty")

# (steps, rows, neurons): 1 and 63 are a lone lane and a ragged tile, 1000 nearly a full one, 1025 one lane of
# a second; 5 and 20 steps take the C++ loop's unrolled part with and without a remainder.
SHAPES = [(1, 1, 1), (2, 3, 63), (5, 2, 1000), (3, 123, 431), (20, 4, 1025)]


def inputs(shape, dtype, seed=0, device=DEVICE):
    steps, rows, neurons = shape
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(steps, rows, neurons, generator=generator).to(dtype)
    weights = torch.rand(steps, generator=generator)
    act = torch.randn(rows, neurons, generator=generator).to(dtype)
    return grad.to(device), weights.to(device), act.to(device)


def eager(grad, weights, act, groups, dtype):
    """The formula as one writes it first: all steps at once, accumulators of `dtype`."""
    grad, weights = grad.to(dtype), weights.to(dtype)[:, None, None]
    s1, s2 = (weights * grad).sum(0), (weights * grad**2).sum(0)
    if act is not None:
        s1 = s1 * act.to(dtype)
    if groups is not None:
        s1, s2 = (s.unflatten(0, (groups, -1)).sum(1) for s in (s1, s2))
    return s1, s2


def assert_sums(found, grad, weights, act, groups):
    gold = eager(grad, weights, act, groups, torch.float64)
    eager32 = eager(grad, weights, act, groups, torch.float32)
    for name, *values in zip(("s1", "s2"), found, gold, eager32, strict=True):
        assert values[0].dtype == torch.float32
        assert_accurate(*values, name)


@pytest.mark.parametrize("with_act", [True, False], ids=["act", "no-act"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_rows_kept(backend, device, shape, dtype, with_act):
    grad, weights, act = inputs(shape, dtype, device=device)
    act = act if with_act else None
    assert_sums(ops.riemann_accumulate(grad, weights, act=act), grad, weights, act, None)


@pytest.mark.parametrize("with_act", [True, False], ids=["act", "no-act"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("shape", "groups"), [((3, 123, 431), 3), ((2, 63, 65), 1), ((5, 6, 1000), 6)])
def test_groups_summed(backend, device, shape, groups, dtype, with_act):
    grad, weights, act = inputs(shape, dtype, device=device)
    act = act if with_act else None
    found = ops.riemann_accumulate(grad, weights, act=act, groups=groups)
    assert_sums(found, grad, weights, act, groups)


def test_long_groups_keep_their_accuracy(backend, device):
    if backend == "triton" and backends.interpreting():
        pytest.skip("the interpreter takes 0.1 ms per program and operation")
    grad, weights, act = inputs((2, 6000, 64), torch.float32, device=device)
    found = ops.riemann_accumulate(grad, weights, act=act, groups=2)
    assert_sums(found, grad, weights, act, 2)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strides(backend, device, layout):
    grad, weights, act = inputs((4, 10, 66), torch.float32, device=device)
    if layout == "transposed":
        grad, act = grad.permute(2, 1, 0).contiguous().permute(2, 1, 0), act.t().contiguous().t()
    elif layout == "sliced":
        grad, act, weights = grad[::2, 1::2, 3:], act[1::2, 3:], weights.repeat_interleave(2)[::4]
    else:
        grad = grad[:, :1].expand(-1, 10, -1)
    assert_sums(ops.riemann_accumulate(grad, weights, act=act, groups=5), grad, weights, act, 5)


def test_mixed_dtypes(backend, device):
    grad, weights, act = inputs((3, 4, 65), torch.bfloat16, device=device)
    for other in (act.float(), act.double()):
        found = ops.riemann_accumulate(grad, weights.double(), act=other)
        assert_sums(found, grad, weights, other, None)


def test_same_bits_every_run(backend, device):
    grad, weights, act = inputs((3, 50, 431), torch.bfloat16, device=device)
    first = ops.riemann_accumulate(grad, weights, act=act, groups=2)
    for _ in range(3):
        again = ops.riemann_accumulate(grad, weights, act=act, groups=2)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_same_bits_for_any_number_of_threads():
    if not dict((name, usable) for name, usable, _ in backends.status())["cpp"]:
        pytest.skip("mipfast._C was not built")
    grad, weights, act = inputs((3, 50, 431), torch.float32, device="cpu")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with ops.backend("cpp"):
                results.append(ops.riemann_accumulate(grad, weights, act=act, groups=2))
    finally:
        torch.set_num_threads(threads)
    for s1, s2 in results[1:]:
        assert torch.equal(s1, results[0][0]) and torch.equal(s2, results[0][1])


def test_special_half_values(backend, device):
    values = torch.tensor([0.0, 6e-8, 6.1e-5, 65504.0, math.inf, math.nan], dtype=torch.float16, device=device)
    for grad in (values, -values):
        s1, _ = ops.riemann_accumulate(grad[None, None], torch.ones(1, device=device))
        torch.testing.assert_close(s1[0], grad.float(), rtol=0, atol=0, equal_nan=True)


def test_no_rows(backend, device):
    grad, weights, _ = inputs((3, 4, 8), torch.float32, device=device)
    s1, s2 = ops.riemann_accumulate(grad[:, :0], weights)
    assert s1.shape == s2.shape == (0, 8)


def test_float64_keeps_float64():
    grad, weights, act = inputs((3, 4, 8), torch.float64)
    s1, s2 = ops.riemann_accumulate(grad, weights.double(), act=act)
    assert s1.dtype == s2.dtype == torch.float64


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("with_act", [True, False], ids=["act", "no-act"])
def test_opcheck(backend, device, with_act, groups, monkeypatch):
    monkeypatch.undo()  # opcheck itself compares uninitialised memory
    grad, weights, act = inputs((3, 4, 63), torch.float32, device=device)
    args = (grad.requires_grad_(), weights, act.requires_grad_() if with_act else None, groups)
    torch.library.opcheck(torch.ops.mipfast.riemann_accumulate.default, args)


@pytest.mark.parametrize("groups", [None, 2])
def test_gradient(groups):
    grad, weights, act = (t.double() for t in inputs((3, 4, 5), torch.float64))
    grad.requires_grad_(), act.requires_grad_()
    torch.autograd.gradcheck(lambda g, a: ops.riemann_accumulate(g, weights, act=a, groups=groups), (grad, act))


def test_bad_inputs_are_named():
    grad, weights, act = inputs((3, 4, 8), torch.float32)
    cases = [
        ((grad[0], weights), {}, r"grad has shape \[4, 8\], expected \[any, any, any\]"),
        ((grad, weights[:2]), {}, r"weights has shape \[2\], expected \[3\]"),
        ((grad, weights), {"act": act[:, :7]}, r"act has shape \[4, 7\], expected \[4, 8\]"),
        ((grad, weights), {"groups": 3}, "groups=3 does not divide the 4 rows"),
        ((grad, weights), {"groups": 0}, "groups=0"),
        ((grad.long(), weights), {}, "grad is torch.int64, expected a floating-point"),
        ((grad, weights.to("meta")), {}, "weights is on meta"),
    ]
    for args, kwargs, message in cases:
        with pytest.raises(InputError, match=message):
            ops.riemann_accumulate(*args, **kwargs)


def test_unusable_backends_are_refused():
    with pytest.raises(BackendError, match="expected one of reference, triton, cpp, cuda"):
        ops.backend("tpu").__enter__()
    for name, usable, reason in backends.status():
        if not usable:
            with pytest.raises(BackendError, match=re.escape(f"backend {name!r} is not usable here: {reason}")):
                ops.backend(name).__enter__()


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_kernels_refuse_a_dtype_they_lack(name):
    grad, weights, _ = inputs((3, 4, 8), torch.float64)
    with ops.backend(name), pytest.raises(BackendError, match="found torch.float64"):
        ops.riemann_accumulate(grad, weights)
