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
from mipfast.scoring.plan import _close, plan
from mipfast.scoring.replay import Replay, repeated

FEW = 256  # rows of a copy up to which reading the weights, not arithmetic, is what a clean run of its own costs
ENOUGH = 2048  # rows of a wave: reading the weights once more for others costs nothing beside their arithmetic


class CleanRun:
    """One copy past all blocks, by the cheapest exact route. additive: blocks add their FFN's output, so that what a
    copy's neurons contribute can be added behind their block; else the block runs again with them overwritten.

    It runs before the first wave, or where the model is known and one wave holds all, in it."""

    def __init__(self, captured: Capture):
        self._captured = captured
        self._take(clean_states=False)

    @property
    def known(self) -> bool:
        return len(self.replay.states) == self.capture.stack.num_layers

    def run(self) -> None:
        """Past all blocks, if it is not yet."""
        if not self.known and self.additive:
            self._take(clean_states=True)
        if not self.known:
            self.replay.walk(self.capture.stack.num_layers, self._past_natively)

    def _take(self, clean_states: bool) -> None:
        self.capture, clean = plan(self._captured, clean_states)
        self.additive, self.replay = clean is not None, clean or Replay(self.capture, 1)

    def arrived(self, rider: Replay) -> bool:
        """Take the copy that rode along, if at the chosen rows it came past all blocks as the captured run did."""
        outputs = torch.stack(self.capture.outputs)
        rows = torch.stack(rider.states).view(len(outputs), -1, outputs.shape[-1])[:, self.capture.rows.index]
        if exact := _close(rows, outputs):
            self.replay = rider
        return exact

    def _past_natively(self, layer: int) -> bool:
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
        """All layers at all nodes, in waves of no more rows than are enough, or one layer's, that keep no more than
        `room` bytes, or one node of one layer."""
        device, stop, waves = self.capture.rows.index.device, self.capture.stack.num_layers, []
        kept = [memory.kept(self.capture, layer + self.additive) for layer in range(stop)]
        most = max(1, ENOUGH // (len(nodes) * self.capture.tokens))  # layers
        while stop:
            start, left = stop - 1, room - len(nodes) * kept[stop - 1]
            while start and stop - start < most and len(nodes) * kept[start - 1] <= left:
                start -= 1
                left -= len(nodes) * kept[start]
            fit = max(1, int(min(room / kept[start], len(nodes))))
            for part in zip(nodes.to(device).split(fit), weights.to(device).split(fit), strict=True):
                waves.append(Wave(self, range(start, stop), *part))
            stop = start
        if len(waves) == 1 and self.additive and self.capture.tokens <= FEW and left >= kept[0]:
            waves[0] = replace(waves[0], rides=True)
        return waves

    def baseline_values(self, copies: int, value_of: Objective) -> torch.Tensor:
        """F [L,n] with each layer's neurons at their baseline, up to copies of them in one pass."""
        self.run()
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
    rides: bool = False  # the clean run is made on the way, if it is not yet

    @property
    def copies(self) -> int:
        return len(self.layers) * len(self.nodes)

    def halves(self) -> list[Wave]:
        """The same in two waves: of fewer layers, or of fewer nodes of one."""
        if len(self.layers) > 1:
            middle = len(self.layers) // 2
            return [replace(self, layers=part, rides=False) for part in (self.layers[middle:], self.layers[:middle])]
        middle = len(self.nodes) // 2
        parts = slice(middle), slice(middle, None)
        return [replace(self, nodes=self.nodes[i], weights=self.weights[i], rides=False) for i in parts]

    def score(self, groups: int | None, value_of: Objective) -> list[tuple[int, Sums]]:
        """The sums of its layers that have a gradient."""
        clean, rides = self.clean, self.rides and not self.clean.known
        if not rides:
            clean.run()
        firsts = [layer + clean.additive for layer in self.layers for _ in self.nodes]
        with torch.enable_grad(), memory.measured(clean.capture, firsts + [0] * rides):
            rider = Replay(clean.capture, 1) if rides else None
            leaves, logits = self._left(rider)
            if rider and not clean.arrived(rider):
                return replace(self, rides=False).score(groups, value_of)
            grads = gradients_of(value_of(logits), leaves)
        pairs = zip(self.layers, grads, strict=True)
        return [(layer, clean.sums(layer, grad, self.weights, groups)) for layer, grad in pairs if grad is not None]

    def _left(self, rider: Replay | None) -> tuple[list[torch.Tensor], torch.Tensor]:
        """(what each layer's neurons contribute, or are, at the nodes: leaves; logits of the copies that left so)."""
        clean, copies, leaves = self.clean, len(self.nodes), []
        capture, run, replay = clean.capture, rider or clean.replay, Replay(clean.capture, copies)
        nodes = torch.cat([self.nodes, self.nodes.new_ones(1 if rider else 0)])
        nodes = nodes.to(torch.promote_types(capture.outputs[0].dtype, torch.float32))  # once, not by every op
        contributions: list[torch.Tensor] = []

        def contribute(layer: int) -> torch.Tensor:
            return ops.riemann_project(capture.activations[layer], clean.weight(layer), nodes)

        def ride(layer: int, output: torch.Tensor) -> None:
            contributions.append(contribute(layer))
            run.baseline_outputs.append(output)
            run.push(run.add_rows(output, contributions[-1][-1:]), None)

        def start_of(layer: int) -> torch.Tensor:
            leaves.append((contributions.pop()[:-1] if rider else contribute(layer)).requires_grad_())
            return replay.add_rows(run.baseline_outputs[layer], leaves[-1])

        if rider:
            rider.measure_calls()
            return leaves, rider.staggered(self.layers, copies, start_of, ride)
        if clean.additive:
            return leaves, run.staggered(self.layers, copies, start_of)
        starts, replay.states = [], [repeated(state, copies) for state in run.states[: self.layers.start]]
        for layer in self.layers:
            leaves.append(ops.riemann_interpolate(capture.activations[layer], self.nodes).requires_grad_())
            starts.append(replay.block_output(leaves[-1]))
            replay.states.append(repeated(run.states[layer], copies))
        return leaves, run.staggered(self.layers, copies, lambda layer: starts[layer - self.layers.start])
