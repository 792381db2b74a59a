"""A frozen model made fast for as long as a call lasts, and left as it was found."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from mipfast.model.fused_ffn import fused_ffns
from mipfast.model.patching import own_configs, replaced_forward
from mipfast.model.sites import Stack
from mipfast.model.window_attention import grouped_windows
from mipfast.ops.frozen_linear import linear


@contextmanager
def accelerated(model: nn.Module, stacks: Iterable[Stack], known: dict[Hashable, Any] | None = None) -> Iterator[None]:
    """A frozen model's products, the stacks' gated FFNs and windowed attention by the faster ways of ours. known: what
    is `remembered` of the model."""
    with own_configs(model), frozen_linears(model), fused_ffns(stacks, known), grouped_windows(model):
        yield


@contextmanager
def frozen_linears(model: nn.Module) -> Iterator[None]:
    """The model's nn.Linear layers by `linear`; their weights get no gradient within."""
    with ExitStack() as patches:
        for module in model.modules():
            if type(module) is nn.Linear and "forward" not in vars(module):
                patches.enter_context(replaced_forward(module, partial(_forward, module)))
        yield


def _forward(module: nn.Linear, input: Tensor) -> Tensor:
    return linear(input, module.weight, module.bias)
