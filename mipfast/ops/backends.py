"""Which backend runs an op: what is usable here, what was asked for, what is the default.

reference  plain torch, always there
triton     CUDA tensors (CPU tensors too in Triton's interpreter, TRITON_INTERPRET=1, for tests)
cpp        CPU tensors, where the extension `mipfast._C` was built
cuda       CUDA tensors, riemann_accumulate only, where `mipfast._C` was built with MIPFAST_BUILD=cuda
"""

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from mipfast.errors import BackendError

logger = logging.getLogger("mipfast")

NAMES = ("reference", "triton", "cpp", "cuda")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_requested: ContextVar[str | None] = ContextVar("mipfast_backend", default=None)


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def load_extension():
    """`mipfast._C`, or None (and one log line) where it was not built."""
    try:
        return importlib.import_module("mipfast._C")
    except ImportError as error:
        logger.warning("mipfast._C is missing (%s): CPU tensors take the reference backend", error)
        return None


def call_extension(function: str, **arguments: Any) -> Any:
    """Call a function of `mipfast._C`, which knows nothing of torch: a tensor is passed as its address, None as a null
    pointer, a torch.dtype as the extension's own. Shapes and layouts are the caller's affair (csrc/<op>.h says which).
    """
    passed = arguments.copy()  # `arguments` keeps alive, until the call returns, what only it holds
    for name, value in arguments.items():
        if type(value) is int:  # most are, and each of the tests below takes its tenth of a microsecond
            continue
        if isinstance(value, Tensor):
            passed[name] = value.data_ptr()
        elif value is None:
            passed[name] = 0
        elif isinstance(value, torch.dtype):
            passed[name] = _extension_dtype(value)
    return getattr(load_extension(), function)(**passed)


@functools.cache
def _extension_dtype(dtype: torch.dtype) -> Any:
    return getattr(load_extension().Dtype, str(dtype).removeprefix("torch."))


@functools.cache
def _probe(name: str) -> tuple[bool, str]:
    """(usable, why): whether the backend can run anything at all in this process."""
    if name == "reference":
        return True, "plain torch"
    if name == "cpp":
        if load_extension() is None:
            return False, "mipfast._C was not built: install with MIPFAST_BUILD=cpu to see why"
        return True, "mipfast._C, CPU tensors"
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return False, "triton is not installed: pip install 'mipfast[triton]' (Linux only)"
        if importlib.util.find_spec("mipfast_kernels") is None:
            return False, "mipfast_kernels is not installed: reinstall mipfast"
        if interpreting():
            return True, "Triton's interpreter (TRITON_INTERPRET=1)"
        if not torch.cuda.is_available():
            return False, "torch sees no GPU: use backend 'cpp' or 'reference'"
        return True, f"{torch.cuda.get_device_name()}, CUDA tensors"
    if not hasattr(load_extension(), "riemann_accumulate_cuda"):
        return False, "no CUDA C++ kernel is built: use backend 'triton', or install with MIPFAST_BUILD=cuda (nvcc)"
    if trouble := load_extension().cuda_trouble():
        return False, f"mipfast._C has the CUDA kernel, but {trouble}"
    if not torch.cuda.is_available():
        return False, "mipfast._C has the CUDA kernel, but this torch sees no GPU"
    return True, f"mipfast._C, {torch.cuda.get_device_name()}, riemann_accumulate of CUDA tensors"


def status() -> list[tuple[str, bool, str]]:
    """(name, usable, reason) of every backend, in this process."""
    return [(name, *_probe(name)) for name in NAMES]


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops called within by one backend.

    By default CUDA tensors take triton, CPU tensors cpp, and whatever these cannot take the reference. triton has a
    kernel for every op; an op that another backend has none for runs in plain torch. Holds for the current thread
    (context); autograd's own threads for CUDA tensors keep the default.

    Args:
        name: "reference", "triton", "cpp" or "cuda".

    Returns:
        A context manager.

    Raises:
        BackendError: on entering, for an unknown name or a backend that is not usable here; by an op within, for
            tensors the backend cannot take.

    Example:
        >>> import torch
        >>> from mipfast import ops
        >>> with ops.backend("reference"):
        ...     ops.riemann_interpolate(torch.ones(1, 2), torch.tensor([0.5]))
        tensor([[[0.5000, 0.5000]]])
    """
    if name not in NAMES:
        raise BackendError(f"unknown backend {name!r}: expected one of {', '.join(NAMES)}")
    usable, reason = _probe(name)
    if not usable:
        raise BackendError(f"backend {name!r} is not usable here: {reason}")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def _refusal(name: str, tensor: Tensor) -> str | None:
    """Why a usable backend cannot take this tensor, or None."""
    if name == "reference":
        return None
    if tensor.dtype not in KERNEL_DTYPES:
        return f"it takes float32, bfloat16 or float16, found {tensor.dtype}"
    if name == "cpp" and tensor.device.type != "cpu":
        return f"it takes CPU tensors, found {tensor.device}"
    if name in ("triton", "cuda") and not (tensor.is_cuda or (name == "triton" and interpreting())):
        return f"it takes CUDA tensors, found {tensor.device}"
    return None


def choose(tensor: Tensor) -> str:
    """The backend for an op whose largest input is `tensor`: the one asked for, else the device's kernel,
    else reference. Raises BackendError where the one asked for cannot take the tensor."""
    name = _requested.get()
    if name is not None:
        refusal = _refusal(name, tensor)
        if refusal:
            raise BackendError(f"backend {name!r} cannot run this op: {refusal}; use 'reference' or convert it")
        return name
    name = "triton" if tensor.is_cuda else "cpp" if tensor.device.type == "cpu" else "reference"
    return name if _refusal(name, tensor) is None and _probe(name)[0] else "reference"
