"""A model held still: evaluation mode, and gradients for chosen parameters only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def held(model: nn.Module, trainable: Iterable[torch.Tensor] = ()) -> Iterator[None]:
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
