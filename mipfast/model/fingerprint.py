"""Which model is it? A hash of what decides its results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from mipfast.errors import ModelError
from mipfast.model import families
from mipfast.model.patching import unwrapped
from mipfast.ops.word_sums import word_sums

_known: ContextVar[dict[int, str]] = ContextVar("_known", default={})  # noqa: B039 (never written to)


def fingerprint(model: Any) -> str:
    """A hash over every byte of every parameter and buffer, its name and dtype, over the config, and over which
    adapters are switched on. Hooks and replaced forwards are not seen.

    It reads all weights where they lie, at some 5 GB/s a CPU core and at a GPU's bandwidth (`ops.word_sums`). One word
    of 8 bytes that changed is always seen, several at once but for a chance of 2^-33. Raises ModelError for a weight
    that cannot be read."""
    model = unwrapped(model)
    if id(model) in _known.get():
        return _known.get()[id(model)]
    modules = list(model.named_modules())
    moving = {f"{name}.inv_freq" for name, m in modules if getattr(m, "rope_type", "") in families.ROPE_OF_LAST_FORWARD}
    named = model.state_dict(keep_vars=True) | dict(model.named_buffers())
    weights = {id(weight): name for name, weight in named.items() if name not in moving}  # tied ones once
    digests = [_digest(model, name, named[name]) for name in sorted(weights.values())]
    adapted = [(name, m) for name, m in modules if hasattr(m, families.ADAPTED)]
    switches = [[name, *(str(getattr(m, one, "")) for one in families.ADAPTER_SWITCHES)] for name, m in adapted]
    facts = json.dumps([digests, switches, _plain(model.config.to_dict())], sort_keys=True, default=str)
    return hashlib.sha256(facts.encode()).hexdigest()


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
    try:
        digest = hashlib.sha256(f"{name} {weight.dtype} {[*weight.shape]}".encode())
        if weight.is_meta:  # offloaded: accelerate's hook, or one of those it is made of, knows where to
            parent, _, own = name.rpartition(".")
            hook: Any = model.get_submodule(parent)._hf_hook
            maps = [getattr(one, "weights_map", None) for one in getattr(hook, "hooks", [hook])]
            weight = next(found for found in maps if found is not None)[own]
        parts = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else ()
        for tensor in [getattr(weight, part) for part in parts] or [weight]:
            digest.update(word_sums(tensor.detach().contiguous().reshape(-1).view(torch.uint8)).tobytes())
    except (RuntimeError, TypeError, AttributeError, KeyError, StopIteration) as error:
        raise ModelError(
            f"{name}, a {type(weight).__name__}, cannot be read ({type(error).__name__} {error}), so there is no "
            "telling which model this is; load it with its weights on a CPU or GPU"
        ) from error
    return digest.hexdigest()


def _plain(config: Any) -> Any:
    """A config without what says where it came from, not what the model computes."""
    if not isinstance(config, dict):
        return config
    return {str(k): _plain(value) for k, value in config.items() if k not in families.NOT_COMPUTED_WITH}
