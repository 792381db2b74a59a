"""A model held still: evaluation mode, gradients for chosen parameters only, configs of its own; a forward or an
attention replaced for a while; and the model inside its wrappers."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from mipfast.errors import ModelError
from mipfast.model import families

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_counter = itertools.count()


def lock_of(model: nn.Module) -> threading.RLock:
    """For one thread at a time: whoever patches a model changes it under the feet of every other thread."""
    return _locks.setdefault(unwrapped(model), threading.RLock())


@contextmanager
def own_configs(model: nn.Module) -> Iterator[None]:
    """Every module's config a copy: two models may be built from one, and what is switched in it is meant for one."""
    configs = [(m, m.config) for m in model.modules() if hasattr(vars(m).get("config"), "_attn_implementation")]
    copies: dict[int, Any] = {}  # shared, so that a config inside another stays the same object as the module's
    try:
        for module, config in configs:
            module.config = deepcopy(config, copies)
        yield
    finally:
        for module, config in configs:
            module.config = config


@contextmanager
def replaced_attention(
    configs: Iterable[Any], name: str, attend: Callable, mask: Callable | None = None
) -> Iterator[None]:
    """The attention of modules of these configs by `attend`, with a mask by `mask` (None: transformers builds none).
    transformers finds both by name, in registries of the whole process: the name is new every time, so that neither
    another thread nor a call inside this one is in the way."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = [(config, config._attn_implementation) for config in configs]
    name = f"{name}_{next(_counter)}"
    ALL_ATTENTION_FUNCTIONS.register(name, attend)  # for every instance of the registry: Doge has its own
    if mask is not None:
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
        del ALL_ATTENTION_FUNCTIONS._global_mapping[name]  # where register puts it
        if mask is not None:
            del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[name]


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


def unwrapped(model: Any) -> Any:
    """The transformers model inside torch.compile, DistributedDataParallel or a PeftModel; any other model itself.

    Raises ModelError for a PeftModel that puts virtual tokens before the prompt: the model inside runs without them."""
    for name in families.WRAPPED:
        if (inner := getattr(model, "_modules", {}).get(name)) is not None:
            return unwrapped(inner)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ModelError(
            f"this {type(model).__name__} puts virtual tokens before every prompt, which are in no batch. Expected an "
            "adapter on projections, such as LoRA, or get_base_model()"
        )
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def compiled(model: nn.Module) -> bool:
    """Whether torch.compile took the model, or a part of it."""
    return any(m._compiled_call_impl is not None or families.WRAPPED[0] in m._modules for m in model.modules())


@contextmanager
def plain_forward(model: nn.Module) -> Iterator[None]:
    """The model without the mixed precision that accelerate put into its forward, and without what torch.compile made
    of its parts, which would not see hooks and forwards that came later: the numbers are the plain model's."""
    inner = unwrapped(model)
    with ExitStack() as plain:
        if forward := vars(inner).get(families.UNMIXED_FORWARD):
            plain.enter_context(replaced_forward(inner, forward))
        if compiled(model):
            plain.enter_context(torch.compiler.set_stance("force_eager"))
        yield
