"""A model held still: evaluation mode, gradients for chosen parameters only; a module's forward replaced for a while;
and the model inside its wrappers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from mipfast.errors import ModelError


@contextmanager
def frozen_eval(model: nn.Module, trainable: Iterable[torch.Tensor] = ()) -> Iterator[None]:
    """Every module in eval mode (no dropout), only the trainable parameters requiring gradient. On the way out modes
    and flags are what they were, and the trainable parameters' gradients are dropped.

    Where accelerate put mixed precision into the model's forward, it is left out meanwhile: the numbers are the plain
    model's, and every part of it has one dtype, inside a pass and beside it."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    chosen = list(trainable)
    plain = vars(unwrapped(model)).get("_original_forward")
    model.eval()
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for tensor in chosen:
            tensor.requires_grad_(True)
        with replaced_forward(unwrapped(model), plain) if plain else nullcontext():
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


WRAPPED = ("_orig_mod", "module")  # where torch.compile, and DistributedDataParallel and its like, keep the model


def unwrapped(model: Any) -> Any:
    """The transformers model inside torch.compile, DistributedDataParallel or a PeftModel; any other model itself.

    Raises ModelError for a PeftModel that puts virtual tokens before the prompt: the model inside runs without them."""
    parts = getattr(model, "_modules", {})
    for name in WRAPPED:
        if name in parts and not hasattr(type(model), "get_decoder"):
            return unwrapped(parts[name])
    if not hasattr(model, "get_base_model"):
        return model
    adapter: Any = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise ModelError(
            f"this {type(model).__name__} has {adapter.peft_type.value}: virtual tokens before every "
            "prompt, which are in no batch and have no neurons of their own. Expected a model without them: an adapter "
            "on its projections, such as LoRA, or get_base_model()"
        )
    return model.get_base_model()


@contextmanager
def removing(handle: Any) -> Iterator[None]:
    """Remove a hook on the way out."""
    try:
        yield
    finally:
        handle.remove()
