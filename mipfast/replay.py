"""Run m scaled copies of a batch through the blocks from l on.

The model's own code runs: `entry` is called again with its clean arguments tiled m times, and blocks before l return
what they returned when the path was advanced over them. Copies are step-major (row k·n + i), so tiling needs no
knowledge of a
family: repeating whatever is concatenated over samples is always right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mipfast.capture import Capture, base_model, label_states, removing, without_labels

# Arguments whose batch dimension is not the first, and arguments without one. position_ids are [n,S] or [3,n,S].
BATCH_DIM = {"position_ids": -2}
UNTILED = ("cache_position", "logits_to_keep")
BROADCASTS = ("position_ids", "attention_mask")  # a batch dimension of 1 serves every sample


class Replay:
    """m copies of the captured batch, with the states of the blocks the path has advanced over.

    tangents[l] is d state[l] / d alpha along the path, for the completeness residual; None where not carried."""

    def __init__(self, capture: Capture, copies: int):
        self.capture, self.copies = capture, copies
        offsets = torch.arange(copies, device=capture.rows.index.device) * capture.tokens
        self._index = (offsets[:, None] + capture.rows.index).flatten()
        self._kwargs = {k: _tile(k, v, copies, capture.num_samples) for k, v in capture.kwargs.items()}
        self.states: list[torch.Tensor] = []
        self.tangents: list[torch.Tensor | None] = []
        self._call: tuple[tuple, dict] = ((), {})
        self._rest: tuple = ()  # what a block returns besides its state, in transformers 4

    def run(self, values: torch.Tensor) -> torch.Tensor:
        """Logits [m·n,q,V] at the label positions, with the next block's neurons overwritten by values [m,R,F]."""
        capture, layer = self.capture, len(self.states)
        base, entry = base_model(capture.model), capture.entry
        call_entry = entry.forward if entry is base else entry
        with ExitStack() as patches:
            patches.enter_context(_forward(base, lambda *_, **__: call_entry(**self._kwargs)))
            for block, state in zip(capture.stack.blocks, self.states, strict=False):
                patches.enter_context(_forward(block, lambda *_, _state=state, **__: self._output(_state)))
            keep = capture.stack.blocks[layer].register_forward_pre_hook(self._keep_call, with_kwargs=True)
            patches.enter_context(removing(keep))
            patches.enter_context(self._overwritten(layer, values))
            patches.enter_context(label_states(capture.model, capture.labels))
            return capture.model(**without_labels(capture.batch), use_cache=False).logits

    def advance(self, values: torch.Tensor, tangent: torch.Tensor | None) -> None:
        """Take the block last run into the states, its neurons overwritten by values [m,R,F] whose derivative by alpha
        is tangent [m,R,F]; with tangent None no derivative is carried."""
        layer = len(self.states)
        (hidden, *args), kwargs = self._call
        block = self.capture.stack.blocks[layer]
        hidden = hidden.detach()
        with torch.no_grad(), forward_ad.dual_level(), ExitStack() as patches:
            if tangent is not None:
                patches.enter_context(sdpa_kernel(SDPBackend.MATH))  # the only backend with a forward-mode derivative
                values = forward_ad.make_dual(values, tangent)
                if layer:
                    hidden = forward_ad.make_dual(hidden, self.tangents[-1])
            patches.enter_context(self._overwritten(layer, values))
            output = block.forward(hidden, *args, **kwargs)
            state, self._rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, ())
            state, moved = forward_ad.unpack_dual(state)
            self.states.append(state.detach().clone())
            self.tangents.append(None if moved is None else moved.detach().clone())

    def per_sample(self, values: torch.Tensor) -> torch.Tensor:
        """Sum values [m·tokens, ...] of one state over a sample's tokens and channels: [m,n]."""
        rows = values.reshape(self.copies, self.capture.tokens, -1).sum(-1)
        out = rows.new_zeros(self.copies, self.capture.num_samples)
        return out.index_add_(1, self.capture.token_sample, rows)

    def _keep_call(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not args:
            kwargs = dict(kwargs)
            args = (kwargs.pop("hidden_states"),)
        self._call = (args, kwargs)

    def _output(self, state: torch.Tensor) -> Any:
        return (state, *self._rest) if self._rest else state

    @contextmanager
    def _overwritten(self, layer: int, values: torch.Tensor) -> Iterator[None]:
        flat = values.reshape(-1, values.shape[-1])

        def overwrite(module: nn.Module, args: tuple) -> tuple:
            x = args[0].reshape(-1, args[0].shape[-1])  # out of place: the input is also somebody else's saved tensor
            return (x.index_put((self._index,), flat).view_as(args[0]), *args[1:])

        with removing(self.capture.stack.outputs[layer].register_forward_pre_hook(overwrite)):
            yield


@contextmanager
def _forward(module: nn.Module, forward: Callable) -> Iterator[None]:
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


def _tile(name: str, value: Any, copies: int, num_samples: int) -> Any:
    if isinstance(value, dict):
        return {key: _tile(name, item, copies, num_samples) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_tile(name, item, copies, num_samples) for item in value)
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or name in UNTILED:
        return value
    dim = BATCH_DIM.get(name, 0)
    if name in BROADCASTS and value.shape[dim] == 1 and num_samples > 1:
        return value
    times = [1] * value.ndim
    times[dim] = copies
    return value.repeat(times)
