"""Scores of layers that do not depend on each other, all in one forward and one backward.

The copies of layer l, one for each node alpha, leave the clean run at block l and join those of the layers below, and
the batch walks up once. Every block is read twice, where layer by layer it is read twice for each layer below.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from mipfast import ops
from mipfast.scoring import memory
from mipfast.scoring.capture import Capture
from mipfast.scoring.nodes import Objective, Sums, gradients_of, staggered_values, with_oom_halving
from mipfast.scoring.plan import plan
from mipfast.scoring.replay import Replay, repeated


class CleanRun:
    """One copy past all blocks, by the cheapest exact route. additive: blocks add their FFN's output, so that what a
    copy's neurons contribute can be added behind their block; else the block runs again with them overwritten."""

    def __init__(self, captured: Capture):
        self.capture, clean = plan(captured, clean_states=True)
        self.additive = clean is not None
        self.replay = clean or Replay(self.capture, 1)
        if not self.additive:
            self.replay.walk(captured.stack.num_layers, self._past)

    def _past(self, layer: int) -> bool:
        self.replay.baseline_outputs.append(self.replay.baseline_output(carry=False)[0])
        self.replay.advance(self.capture.activations[layer][None], None)
        return True

    def pointwise(
        self, nodes: torch.Tensor, weights: torch.Tensor, budget: Any, value_of: Objective, groups: int | None
    ) -> Iterator[tuple[int, Sums]]:
        """Every layer's (s1, s2) of ops.riemann_accumulate, in parts that add up; none for a layer without gradient."""
        if self.additive and bool((unit := nodes == 1).any()):
            one, weight = Replay(self.capture, 1), weights[unit]
            for layer, gradient in enumerate(one.clean_gradients(value_of)[0]):
                if gradient is not None:
                    yield layer, self.sums(layer, one.at_rows(gradient), weight, groups)
            nodes, weights = nodes[~unit], weights[~unit]
        waves = self.waves(nodes, weights, memory.room(self.capture, budget)) if len(nodes) else []
        for _, parts in with_oom_halving(waves, partial(Wave.score, groups=groups, value_of=value_of)):
            yield from parts

    def waves(self, nodes: torch.Tensor, weights: torch.Tensor, room: float) -> list[Wave]:
        """All layers at all nodes in as few waves as keep no more than `room` bytes, or one node of one layer."""
        device, stop, waves = self.capture.rows.index.device, self.capture.stack.num_layers, []
        kept = [memory.kept(self.capture, layer + self.additive) for layer in range(stop)]
        while stop:
            start, left = stop - 1, room - len(nodes) * kept[stop - 1]
            while start and len(nodes) * kept[start - 1] <= left:
                start -= 1
                left -= len(nodes) * kept[start]
            fit = max(1, int(min(room / kept[start], len(nodes))))
            for part in zip(nodes.to(device).split(fit), weights.to(device).split(fit), strict=True):
                waves.append(Wave(self, range(start, stop), *part))
            stop = start
        return waves

    def baseline_values(self, copies: int, value_of: Objective) -> torch.Tensor:
        """F [L,n] with each layer's neurons at their baseline, up to copies of them in one pass."""
        return staggered_values(self.replay, self.replay.baseline_outputs, copies, value_of)

    def sums(self, layer: int, grad: torch.Tensor, weights: torch.Tensor, groups: int | None) -> Sums:
        """Over nodes, of the gradient [m,R,...] by a layer's leaf."""
        act, weights = self.capture.activations[layer], weights.to(grad.device)
        if self.additive:
            return ops.project_accumulate(grad, self.weight(layer), weights, act=act, groups=groups)
        return ops.riemann_accumulate(grad, weights, act=act, groups=groups)

    def weight(self, layer: int) -> torch.Tensor:
        """Of the FFN's output projection [H,F]."""
        return self.capture.stack.outputs[layer].weight


@dataclass(frozen=True)
class Wave:
    """The copies of some layers at some nodes."""

    clean: CleanRun
    layers: range
    nodes: torch.Tensor
    weights: torch.Tensor

    @property
    def copies(self) -> int:
        return len(self.layers) * len(self.nodes)

    def halves(self) -> list[Wave]:
        """The same in two waves: of fewer layers, or of fewer nodes of one."""
        middle = len(self.layers) // 2
        if middle:
            return [replace(self, layers=self.layers[middle:]), replace(self, layers=self.layers[:middle])]
        middle = len(self.nodes) // 2
        return [
            replace(self, nodes=self.nodes[part], weights=self.weights[part])
            for part in (slice(middle), slice(middle, None))
        ]

    def score(self, groups: int | None, value_of: Objective) -> list[tuple[int, Sums]]:
        """The sums of its layers that have a gradient."""
        capture, clean, copies = self.clean.capture, self.clean, len(self.nodes)
        firsts = [layer + clean.additive for layer in self.layers for _ in range(copies)]
        with torch.enable_grad(), memory.measured(capture, firsts):
            leaves, starts = self._leaving()
            value = value_of(clean.replay.staggered(self.layers.start, starts))
            del starts
            grads = gradients_of(value, leaves)
        pairs = zip(self.layers, grads, strict=True)
        return [(layer, clean.sums(layer, grad, self.weights, groups)) for layer, grad in pairs if grad is not None]

    def _leaving(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(what the layers' neurons contribute, or are, at the nodes: leaves; the states their copies leave with)."""
        capture, clean, copies = self.clean.capture, self.clean, len(self.nodes)
        replay, leaves, starts = Replay(capture, copies), [], []
        if not clean.additive:
            replay.states = [repeated(state, copies) for state in clean.replay.states[: self.layers.start]]
        for layer in self.layers:
            act = capture.activations[layer]
            if clean.additive:
                leaf = ops.riemann_project(act, clean.weight(layer), self.nodes).requires_grad_()
                starts.append(replay.add_rows(repeated(clean.replay.baseline_outputs[layer], copies), leaf))
            else:
                leaf = ops.riemann_interpolate(act, self.nodes).requires_grad_()
                starts.append(replay.block_output(leaf))
                replay.states.append(repeated(clean.replay.states[layer], copies))
            leaves.append(leaf)
        return leaves, starts
