"""Logits at the label positions alone: a hook between the base model and the language-model head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mipfast.model.batch import Labels
from mipfast.model.patching import unwrapped


def base_model(model: Any) -> nn.Module:
    """The module whose last_hidden_state the language-model head reads."""
    inner = unwrapped(model)
    base = inner.base_model
    base = inner.model if base is inner else base  # LLaVA of transformers 4 names no base
    children = list(base.children())
    return children[0] if len(children) == 1 else base  # a mere wrapper, as OPT's and BART's, is passed by


def with_states(output: Any, states: torch.Tensor) -> Any:
    """A base model's output with other hidden states; wrappers also read rope_deltas, image_hidden_states and the
    like."""
    if isinstance(output, tuple):
        return (states, *output[1:])
    return type(output)(**{**output, "last_hidden_state": states})


@contextmanager
def label_states(model: nn.Module, labels: Labels) -> Iterator[None]:
    """Let the head see only the label positions: [rows,S,H] -> [rows,q,H], rows a multiple of the n samples."""

    def gather(module: nn.Module, args: tuple, output: Any) -> Any:
        states = output[0]
        index = labels.index.to(states.device).repeat(len(states) // labels.num_samples, 1)
        picked = states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
        return with_states(output, picked)

    with base_model(model).register_forward_hook(gather):
        yield
