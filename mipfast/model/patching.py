"""A model held still: evaluation mode, gradients for chosen parameters only; a module's forward replaced for a while;
and the model inside PEFT's wrapper."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def frozen_eval(model: nn.Module, trainable: Iterable[torch.Tensor] = ()) -> Iterator[None]:
    """Every module in eval mode (no dropout), only the trainable parameters requiring gradient. On the way out modes
    and flags are what they were, and the trainable parameters' gradients are dropped."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    chosen = list(trainable)
    model.eval()
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for tensor in chosen:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor in chosen:
            tensor.grad = None
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Replace a module's forward, and put back what was there."""
    before = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before  # type: ignore[method-assign]


def unwrapped(model: Any) -> Any:
    """The transformers model inside a PeftModel, whose own base_model is something else; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def removing(handle: Any) -> Iterator[None]:
    """Remove a hook on the way out."""
    try:
        yield
    finally:
        handle.remove()
