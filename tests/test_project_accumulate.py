"""project_accumulate: every usable backend against a float64 gold, by the accuracy rule of the design."""

import math

import pytest
import torch
from accuracy import BACKENDS, DEVICE, DTYPES, assert_accurate

from mipfast import ops
from mipfast.ops import reference

pytestmark = pytest.mark.usefixtures("poison_empty")

# (steps, rows, H, F, groups): a lone element; ragged tiles with rows kept, with more steps than any tile has room to
# pad, and summed; whole tiles
SHAPES = [
    (1, 1, 1, 1, None),
    (2, 3, 63, 65, None),
    (3, 123, 64, 431, None),
    (20, 5, 16, 1000, None),
    (4, 6, 17, 63, 3),
    (3, 123, 65, 431, 1),
    (2, 128, 512, 256, 2),
]


def inputs(shape, dtype, device=DEVICE):
    steps, rows, width, neurons, groups = shape
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(steps, rows, width, generator=generator).to(dtype)
    weight = torch.randn(width, neurons, generator=generator).to(dtype)
    act = torch.randn(rows, neurons, generator=generator).to(dtype)
    return grad.to(device), weight.to(device), torch.rand(steps, generator=generator).to(device), act.to(device), groups


def eager(grad, weight, weights, act, groups, dtype):
    """The formula as one writes it first: the whole gradient, accumulators of `dtype`."""
    g, w = grad.to(dtype) @ weight.to(dtype), weights.to(dtype)[:, None, None]
    s1, s2 = (w * g).sum(0), (w * g**2).sum(0)
    if act is not None:
        s1 = s1 * act.to(dtype)
    if groups is not None:
        s1, s2 = (s.unflatten(0, (groups, -1)).sum(1) for s in (s1, s2))
    return s1, s2


def assert_sums(found, grad, weight, weights, act, groups):
    gold = eager(grad, weight, weights, act, groups, torch.float64)
    eager32 = eager(grad, weight, weights, act, groups, torch.float32)
    for name, *values in zip(("s1", "s2"), found, gold, eager32, strict=True):
        assert values[0].dtype == torch.float32
        assert_accurate(*values, name)


@pytest.mark.parametrize("with_act", [True, False], ids=["act", "no-act"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_project_accumulate(backend, device, shape, dtype, with_act):
    grad, weight, weights, act, groups = inputs(shape, dtype, device)
    act = act if with_act else None
    found = ops.project_accumulate(grad, weight, weights, act=act, groups=groups)
    assert_sums(found, grad, weight, weights, act, groups)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strides(backend, device, layout):
    grad, weight, weights, act, _ = inputs((4, 10, 34, 66, 5), torch.float32, device)
    if layout == "transposed":  # GPT-2's Conv1D keeps its weight [F, H]
        grad, weight, act = grad.permute(2, 1, 0).contiguous().permute(2, 1, 0), weight.t().contiguous().t(), act
    elif layout == "sliced":
        grad, weight, act, weights = grad[::2, 1::2, 3:], weight[3:, ::2], act[1::2, ::2], weights[::2]
    else:
        grad, act = grad[:, :1].expand(-1, 10, -1), act[:1].expand(10, -1)
    found = ops.project_accumulate(grad, weight, weights, act=act, groups=5)
    assert_sums(found, grad, weight, weights, act, 5)


def test_mixed_dtypes(backend, device):
    grad, weight, weights, act, _ = inputs((3, 4, 33, 65, None), torch.bfloat16, device)
    for args in ((grad, weight, weights.double(), act.double()), (grad.float(), weight, weights, act)):
        assert_sums(ops.project_accumulate(*args[:3], act=args[3]), *args, None)


def test_other_rows_do_not_leak(backend, device):
    """A tile holds rows of other groups, and lanes of no row: theirs may be NaN."""
    grad, weight, weights, act, groups = inputs((3, 6, 17, 63, 2), torch.float32, device)
    grad[:, 3:], act[3:] = math.nan, math.inf
    for s in ops.project_accumulate(grad, weight, weights, act=act, groups=groups):
        assert s[0].isfinite().all() and not s[1].isfinite().any()


def test_same_bits_every_run(backend, device):
    grad, weight, weights, act, groups = inputs((4, 200, 65, 431, 2), torch.bfloat16, device)
    first = ops.project_accumulate(grad, weight, weights, act=act, groups=groups)
    for _ in range(2):
        again = ops.project_accumulate(grad, weight, weights, act=act, groups=groups)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_no_rows(backend, device):
    grad, weight, weights, _, _ = inputs((3, 4, 8, 5, None), torch.float32, device)
    s1, s2 = ops.project_accumulate(grad[:, :0], weight, weights)
    assert s1.shape == s2.shape == (0, 5)


@pytest.mark.parametrize("groups", [None, 2])
def test_opcheck(backend, device, groups, monkeypatch):
    monkeypatch.undo()  # opcheck itself compares uninitialised memory
    grad, weight, weights, act, _ = inputs((3, 4, 17, 63, None), torch.float32, device)
    torch.library.opcheck(torch.ops.mipfast.project_accumulate.default, (grad, weight, weights, act, groups))


TRITON = pytest.mark.skipif("triton" not in BACKENDS, reason="needs a GPU or TRITON_INTERPRET=1")
SMALL = (16, 128, 16, 1, 1)  # its neurons are summed 64 at a time


@TRITON
@pytest.mark.parametrize("tma", [True, False], ids=["tma", "pointers"])
@pytest.mark.parametrize(("rows", "groups"), [(5, 5), (50, 2)], ids=["rows-kept", "summed"])
def test_triton_many_tiles(rows, groups, tma, monkeypatch):
    """Several tiles along every axis: splits, swizzled programs, a ragged end of H."""
    from mipfast_kernels import project_accumulate as kernel

    if tma and kernel.architecture() not in kernel.TMA_ARCHITECTURES | {"interpreter"}:
        pytest.skip("this GPU has no tensor memory accelerator")
    monkeypatch.setattr(kernel, "TILES", {kernel.architecture(): {4: [SMALL]}})
    monkeypatch.setattr(kernel, "TMA_ARCHITECTURES", {kernel.architecture()} if tma else set())
    grad, weight, weights, act, _ = inputs((3, rows, 40, 140, None), torch.float32)
    found = kernel.project_accumulate(grad, weight, weights, act, groups)
    assert_sums(found, grad, weight, weights, act, groups)


def test_tiles_are_chosen_by_rows_and_programs():
    pytest.importorskip("triton", reason="triton is not installed")
    from mipfast_kernels.project_accumulate import TILES, choose_tile

    few, some, more, most = tiles = TILES["sm_90"][2]
    for pairs, neurons, tile in [(16, 18944, few), (17, 64, some), (512, 3420, some), (640, 3420, more)]:
        assert choose_tile(tiles, pairs, neurons) == tile
    assert choose_tile(tiles, 8192, 3420) == most and choose_tile(tiles, 129, 64) == few


def test_agrees_with_the_reference_in_float64():
    grad, weight, weights, act, groups = inputs((3, 6, 17, 63, 2), torch.float64)
    found = ops.project_accumulate(grad, weight, weights, act=act, groups=groups)
    want = reference.project_accumulate(grad, weight, weights, act=act, groups=groups)
    assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1]) and found[0].dtype == torch.float64


@pytest.mark.slow
def test_compiles(monkeypatch):
    monkeypatch.undo()  # inductor allocates what autograd may not write into
    grad, weight, weights, act, groups = inputs((3, 6, 17, 63, 2), torch.float32)

    @torch.compile(fullgraph=True)
    def doubled(grad):
        s1, s2 = ops.project_accumulate(2 * grad, weight, weights, act=act, groups=groups)
        return s1 + 1, s2

    s1, s2 = ops.project_accumulate(2 * grad, weight, weights, act=act, groups=groups)
    found = doubled(grad)
    assert torch.equal(found[0], s1 + 1) and torch.equal(found[1], s2)
