"""What was found out about how a model runs, kept for as long as nothing but its weights changes."""

from __future__ import annotations

from collections.abc import Hashable
from types import BuiltinFunctionType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

SETTINGS = (type(None), bool, int, float, str, torch.dtype, torch.device, FunctionType, BuiltinFunctionType)
_known: WeakKeyDictionary[nn.Module, tuple[Any, dict[Hashable, Any]]] = WeakKeyDictionary()


def remembered(model: nn.Module) -> dict[Hashable, Any]:
    """To be read and filled; empty where the model never was here, or runs otherwise than it did then."""
    code = _code(model)
    if code is None:
        return {}
    if model not in _known or _known[model][0] != code:
        _known[model] = code, {}
    return _known[model][1]


def _code(model: nn.Module) -> Any:
    """Whatever but the values of tensors decides what a forward pass computes: classes and their functions, hooks, and
    every module's own settings. None where a module's forward was replaced by something that cannot be compared."""
    found: list[Any] = [str(getattr(model, "config", None))]
    kinds: set[type] = set()
    for name, module in model.named_modules():
        own = vars(module)
        if "forward" in own:
            return None
        kinds.update(type(module).__mro__)
        settings = [(key, one) for key, one in own.items() if key != "training" and isinstance(one, SETTINGS)]
        hooks = [*own["_forward_pre_hooks"], *own["_forward_hooks"]]  # by numbers that torch gives out once
        tensors = [(p.dtype, p.device) for p in own["_parameters"].values() if p is not None]
        attention = getattr(own.get("config"), "_attn_implementation", None)
        found.append((name, type(module), settings, hooks, tensors, attention))
    own_kinds = sorted(kinds - set(nn.Module.__mro__), key=repr)
    return found, [(kind, [one for one in vars(kind).values() if isinstance(one, FunctionType)]) for kind in own_kinds]
