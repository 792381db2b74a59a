"""Copies that leave one run at block after block, and from there on walk up together, so that every block is read once.

Before they leave they are that run, which is past all these blocks, or gets there on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from mipfast.model.patching import replaced_forward
from mipfast.scoring.capture import OfRows
from mipfast.scoring.replay import Replay, _by_copy, _state_first

Ride = Callable[[int, torch.Tensor], None]


class Staggered:
    """run: one copy of a batch. layers: where copies leave it; copies: how many at each. sizes: of the tensors that
    each block is called with for one of them, see `Replay.measure_calls`; None where they are the run's. samples: of
    every layer, where what leaves is not the whole batch but these samples of it."""

    def __init__(
        self,
        run: Replay,
        layers: range,
        copies: Sequence[int],
        samples: Sequence[torch.Tensor] | None = None,
        sizes: dict[int, Any] | None = None,
    ):
        self.run, self.layers, self.copies, self.samples = run, layers, copies, samples
        self.sizes = run.sizes if sizes is None else sizes

    def logits(self, start_of: Callable[[int], torch.Tensor], ride: Ride | None = None) -> torch.Tensor:
        """Of all that leave, at the label positions; start_of(layer) is what its block returns to those that leave
        there. With ride the run is not past these blocks yet and goes along through all: ride(layer, output with the
        neurons at their baseline) is to take it past each."""
        capture, blocks, own = self.run.capture, self.run.capture.stack.blocks, 1 if ride else 0
        if self.samples is None:
            self.wave, self.total = Replay(capture, own + sum(self.copies)), own + sum(self.copies)
            self.wave.states = self.run.states[: self.layers.start]
        else:
            every = torch.cat(list(self.samples))
            self.wave, self.total = Replay(capture.of(every), 1), len(every)
            self.wave.states = OfRows(self.run.states[: self.layers.start], every)
        with ExitStack() as patches:
            for layer in range(self.layers.start, len(blocks) if ride else self.layers.stop):
                joined = partial(self._joined, start_of, ride, layer, blocks[layer].forward)
                # not a hook: transformers' own output-recording hook would run first and see the unmodified output
                patches.enter_context(replaced_forward(blocks[layer], joined))
            whole = ride is not None and blocks[-1] is capture.last_block
            return self.wave._run(at_labels=not whole)[own * capture.num_samples :]

    def _joined(
        self,
        start_of: Callable[[int], torch.Tensor],
        ride: Ride | None,
        layer: int,
        native: Callable[..., Any],
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """A block of the wave: those that left before run, others join them, the rest wait in the run's state."""
        call, parts, run, at = _state_first(args, kwargs), [], self.run, layer - self.layers.start
        if running := (1 if ride else 0) + sum(self.copies[:at]):
            args, kwargs = _first_copies(call, self.sizes[layer], running, self.total)
            with ExitStack() as patches:
                if ride:
                    patches.enter_context(run._overwritten(layer, run._baseline(layer)))
                output = native(*args, **kwargs)
            state = _by_copy(output[0] if isinstance(output, tuple) else output, running)
            if ride:
                own = len(state) // running
                ride(layer, state[:own].detach())
                parts, state = [run.states[layer]], state[own:]
            parts.append(state)
        if layer in self.layers and self.copies[at]:
            parts.append(start_of(layer))
        if waiting := sum(self.copies[at + 1 :]):
            state = run.states[layer]
            parts += [state] * waiting if self.samples is None else [state[torch.cat(list(self.samples[at + 1 :]))]]
        return self.wave._output(torch.cat(parts), call[0][0])


def _first_copies(value: Any, of_one: Any, copies: int, total: int) -> Any:
    """The first copies' part of a block's arguments of `total` copies, told by the sizes of one copy's: what grows with
    the copies is divided among them, and so are fences around sequences, of which there is one more."""
    if isinstance(value, dict):
        return {key: _first_copies(item, of_one[key], copies, total) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_first_copies(item, one, copies, total) for item, one in zip(value, of_one, strict=True))
    if isinstance(value, torch.Tensor):
        for dim, one in enumerate(of_one):
            if value.shape[dim] != one:
                fence = value.shape[dim] != total * one
                value = value.narrow(dim, 0, copies * (one - fence) + fence)
    return value
