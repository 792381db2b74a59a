"""Which model is it? A hash of what decides its results."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from mipfast.errors import ModelError
from mipfast.model import families
from mipfast.model.patching import unwrapped

CHUNK = 1 << 26  # bytes a thread holds of a weight that is not on the CPU
_known: ContextVar[dict[int, str]] = ContextVar("_known", default={})  # noqa: B039 (never written to)


def fingerprint(model: Any) -> str:
    """sha256 over every byte of every parameter and buffer, its name and dtype, over the config, and over which
    adapters are switched on. Hooks and replaced forwards are not seen.

    It reads all weights: 7.5 GB of a 3B model in bfloat16, 145 GB of a 72B one, at some 0.5 to 2 GB/s a core for up to
    8 cores, and of a GPU no faster than copies to the host are. Raises ModelError for a weight that cannot be read."""
    model = unwrapped(model)
    if id(model) in _known.get():
        return _known.get()[id(model)]
    weights: dict[int, tuple[str, Any]] = {}  # tied ones once
    for name, weight in (model.state_dict(keep_vars=True) | dict(model.named_buffers())).items():
        weights.setdefault(id(weight), (name, weight))
    modules = list(model.named_modules())
    moving = {f"{name}.inv_freq" for name, m in modules if getattr(m, "rope_type", "") in families.ROPE_OF_LAST_FORWARD}
    listed = sorted((entry for entry in weights.values() if entry[0] not in moving), key=lambda entry: entry[0])
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(lambda entry: _digest(model, *entry), listed))
    adapters = [
        [name, *(str(getattr(module, switch, "")) for switch in families.ADAPTER_SWITCHES)]
        for name, module in modules
        if hasattr(module, families.ADAPTED)
    ]
    facts = [digests, adapters, _plain(model.config.to_dict())]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Within, nobody writes to the model, so that it is hashed once however often its fingerprint is asked for. There
    is no such cache between calls: a write through `.data` leaves no trace, not even in `_version`."""
    token = _known.set({**_known.get(), id(unwrapped(model)): fingerprint(model)})
    try:
        yield
    finally:
        _known.reset(token)


def _digest(model: nn.Module, name: str, weight: Any) -> str:
    digest = hashlib.sha256(f"{name} {getattr(weight, 'dtype', '')} {[*getattr(weight, 'shape', '')]}".encode())
    if not isinstance(weight, torch.Tensor):  # what a quantised module has besides
        digest.update(str(weight).encode())
        return digest.hexdigest()
    try:
        if weight.is_meta:
            weight = _offloaded(model, name)
        parts = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else ()
        for tensor in [getattr(weight, part) for part in parts] or [weight]:
            for chunk in tensor.detach().contiguous().reshape(-1).view(torch.uint8).split(CHUNK):
                digest.update(chunk.cpu().numpy())
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(
            f"{name}, a {type(weight).__name__} on {weight.device}, cannot be read ({error}), so there is no telling "
            "which model this is; load the model with its weights on a CPU or GPU"
        ) from error
    return digest.hexdigest()


def _offloaded(model: nn.Module, name: str) -> torch.Tensor:
    """From where accelerate keeps it: its hook, or one of the hooks it is made of."""
    parent, _, own = name.rpartition(".")
    hook: Any = model.get_submodule(parent)._hf_hook
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "weights_map", None) is not None:
            return one.weights_map[own]
    raise KeyError("a meta tensor that accelerate did not offload")


def _plain(config: Any) -> Any:
    """A config without what says where it came from, not what the model computes."""
    if isinstance(config, dict):
        return {str(k): _plain(value) for k, value in config.items() if k not in families.NOT_COMPUTED_WITH}
    return config
