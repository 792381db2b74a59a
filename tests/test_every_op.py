"""What holds for every op on every usable backend: any offset between elements, and the same numbers under autocast."""

import pytest
import torch
from accuracy import BACKENDS, DEVICE

from mipfast import ops
from mipfast.errors import InputError
from mipfast.ops import reference

# argument -> its axes: m nodes, R rows, F neurons, H outputs, k named neurons
ARGUMENTS = {
    "riemann_interpolate": dict(act="RF", alphas="m", neurons="Rk"),
    "riemann_accumulate": dict(grad="mRF", weights="m", act="RF"),
    "riemann_project": dict(act="RF", weight="HF", alphas="m", neurons="Rk"),
    "project_accumulate": dict(grad_out="mRH", weight="HF", weights="m", act="RF"),
    "swiglu": dict(gate="RF", up="RF"),
    "misdirection_loss": dict(hidden="RF", target="RF", mask="R"),
}
SIZES = dict(m=2, R=2, F=16, H=16, k=2)
NOT_DIFFERENTIABLE = {"neurons", "mask", "weights", "grad_out"}
STRIDED = [(op, name, axis) for op, names in ARGUMENTS.items() for name, axes in names.items() for axis in axes]
# size of the axis, elements between neighbours: a stride that passes 2^31, and one whose multiple does
FAR = {"stride": (2, 2**31 + 128), "multiple": (3, 2**30 + 64)}


def inputs(op, device, dtype, **sizes):
    sizes = SIZES | sizes
    tensors = {}
    for name, axes in ARGUMENTS[op].items():
        shape = [sizes[axis] for axis in axes]
        if name == "neurons":
            tensors[name] = torch.randint(-1, sizes["F"], shape).to(device)
        elif name == "mask":
            tensors[name] = torch.arange(*shape, device=device) != 1
        else:
            tensors[name] = torch.randn(shape).to(dtype).to(device)
    return tensors


def far_apart(tensor, dim, stride):
    """The same values with neighbours along `dim` that far apart, in memory of which no more is touched."""
    strides = list(torch.empty_like(tensor.select(dim, 0), memory_format=torch.contiguous_format).stride())
    strides.insert(dim, stride)
    size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True))
    try:
        store = torch.empty(size, dtype=tensor.dtype, device=tensor.device)
    except RuntimeError:
        pytest.skip(f"{size * tensor.itemsize / 2**30:.0f} GiB cannot be reserved here")
    return store.as_strided(tensor.shape, strides).copy_(tensor)


def values_and_gradients(op, tensors):
    leaves = {
        name: t.detach().requires_grad_(name not in NOT_DIFFERENTIABLE and op != "project_accumulate")
        for name, t in tensors.items()
    }
    found = getattr(ops, op)(**leaves)
    found = found if isinstance(found, tuple) else (found,)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    if not wanted:
        return found
    d_found = [torch.linspace(-1, 2, t.numel(), device=t.device).view(t.shape).to(t.dtype) for t in found]
    return *(t.detach() for t in found), *torch.autograd.grad(found, wanted, d_found)


@pytest.mark.parametrize("far", FAR.values(), ids=FAR)
@pytest.mark.parametrize(("op", "name", "axis"), STRIDED)
def test_offsets_past_31_bits(backend, device, op, name, axis, far):
    size, stride = far
    tensors = inputs(op, device, torch.bfloat16, **{axis: size})
    apart = far_apart(tensors[name], ARGUMENTS[op][name].index(axis), stride)
    found = values_and_gradients(op, tensors | {name: apart})
    with ops.backend("reference"):
        expected = values_and_gradients(op, tensors)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("op", ARGUMENTS)
def test_autocast_changes_nothing(backend, device, op):
    tensors = inputs(op, device, torch.float32)
    expected = values_and_gradients(op, tensors)
    with torch.autocast(device, torch.bfloat16):
        found = values_and_gradients(op, tensors)
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == e.dtype and torch.equal(f, e)


def test_one_tensor_of_more_than_31_bits():
    """The C++ ops copy what is not contiguous, so that only a tensor this large shows their offsets."""
    if "cpp" not in BACKENDS:
        pytest.skip("mipfast._C was not built")
    rows, width = 2**12 + 1, 2**19
    ends = torch.randn(2, width).to(torch.bfloat16)
    hidden = far_apart(ends, 0, (rows - 1) * width).as_strided((rows, width), (width, 1))
    kept = torch.zeros(rows)
    kept[[0, -1]] = 1
    with ops.backend("cpp"):
        found = ops.misdirection_loss(hidden, ends[0], kept)
    torch.testing.assert_close(found, reference.misdirection_loss(ends, ends[0]))


def test_triton_rows_past_what_its_kernel_counts():
    if "triton" not in BACKENDS:
        pytest.skip("triton does not run here")
    grad_out = torch.zeros(1, 1, 16, device=DEVICE).expand(2, 2**30, 16)
    weight, weights = torch.zeros(16, 16, device=DEVICE), torch.zeros(2, device=DEVICE)
    with ops.backend("triton"), pytest.raises(InputError, match=r"at most 2\^30 in all"):
        ops.project_accumulate(grad_out, weight, weights, groups=1)
