"""A model held still: evaluation mode, gradients for chosen parameters only; a module's forward replaced for a while;
and the model inside its wrappers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from mipfast.errors import ModelError


@contextmanager
def frozen_eval(model: nn.Module, trainable: Iterable[torch.Tensor] = ()) -> Iterator[None]:
    """Every module in eval mode (no dropout), only the trainable parameters requiring gradient. On the way out modes
    and flags are what they were, and the trainable parameters' gradients are dropped. Runs the `plain_forward`."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    chosen = list(trainable)
    model.eval()
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for tensor in chosen:
            tensor.requires_grad_(True)
        with plain_forward(model):
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


def compiled(model: nn.Module) -> bool:
    """Whether torch.compile took the model, or a part of it."""
    return any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules())


@contextmanager
def plain_forward(model: nn.Module) -> Iterator[None]:
    """The model without the mixed precision that accelerate put into its forward, and without what torch.compile made
    of its parts, which would not see hooks and forwards that came later: the numbers are the plain model's."""
    inner = unwrapped(model)
    with ExitStack() as plain:
        if "_original_forward" in vars(inner):
            plain.enter_context(replaced_forward(inner, inner._original_forward))
        if compiled(model):
            plain.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def removing(handle: Any) -> Iterator[None]:
    """Remove a hook on the way out."""
    try:
        yield
    finally:
        handle.remove()
