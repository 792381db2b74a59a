"""What every op checks of its inputs, and when a call may go past torch.library."""

import torch
from torch import Tensor
from torch.nn import Parameter

from mipfast.errors import InputError


def check_tensor(op: str, name: str, tensor: Tensor, shape: tuple[int | None, ...], like: Tensor | None = None) -> None:
    """Floating point, of `shape` (None = any size) and, with `like`, on its device."""
    found = tensor.shape
    if len(found) != len(shape) or any([w not in (None, f) for w, f in zip(shape, found, strict=True)]):
        expected = ", ".join("any" if want is None else str(want) for want in shape)
        raise InputError(f"{op}: {name} has shape {list(found)}, expected [{expected}]")
    if not tensor.dtype.is_floating_point:
        raise InputError(f"{op}: {name} is {tensor.dtype}, expected a floating-point tensor")
    if like is not None and tensor.device != like.device:
        raise InputError(f"{op}: {name} is on {tensor.device}, expected {like.device}; move it there")


def check_neurons(op: str, neurons: Tensor, act: Tensor) -> None:
    """Indices [R, k] of neurons of act [R, F], int64; their values are looked at on a CPU only."""
    if neurons.dim() != 2 or neurons.shape[0] != act.shape[0]:
        raise InputError(f"{op}: neurons has shape {list(neurons.shape)}, expected [{act.shape[0]}, k]")
    if neurons.dtype != torch.int64 or neurons.device != act.device:
        found = f"{neurons.dtype} on {neurons.device}"
        raise InputError(f"{op}: neurons is {found}, expected torch.int64 on {act.device}; convert it")
    # reading the values would stall a GPU's stream, and cannot be compiled: there an index too large names no neuron
    if neurons.device.type != "cpu" or torch.compiler.is_compiling() or not neurons.numel():
        return
    if int(neurons.max()) >= act.shape[1]:
        raise InputError(f"{op}: neurons names {int(neurons.max())}, expected below {act.shape[1]}")


def check_groups(op: str, groups: int | None, rows: int) -> None:
    """groups=None, or equal groups of rows."""
    if groups is not None and (groups < 1 or rows % groups):
        raise InputError(f"{op}: groups={groups} does not divide the {rows} rows into equal groups")


def untraced(*tensors: Tensor | None, constant: bool = False) -> bool:
    """Whether a call may go past torch.library: plain tensors, nobody compiling and, with constant, nobody
    differentiating. Its dispatch costs 15 us, and more where the caches have been flushed: misdirection_loss of
    64 x 2048 was 1.3x eager with it and is 2.3x without."""
    if torch.compiler.is_compiling():
        return False
    traced = constant and torch.is_grad_enabled()
    for t in tensors:
        if t is not None and (type(t) not in (Tensor, Parameter) or (traced and t.requires_grad)):
            return False
    return True
