"""Scores of layers that do not depend on each other, all in one forward and one backward.

The copies of layer l, one for each node alpha, leave the clean run at block l and join those of the layers below, and
the batch walks up once. Every block is read twice, where layer by layer it is read twice for each layer below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch

from mipfast import ops
from mipfast.scoring import memory
from mipfast.scoring.capture import Capture
from mipfast.scoring.nodes import Objective, Sums, gradients_of, staggered_values, with_oom_halving
from mipfast.scoring.plan import _close, plan
from mipfast.scoring.replay import Replay, repeated
from mipfast.scoring.staggered import Staggered

FEW = 256  # rows of a copy up to which reading the weights, not arithmetic, is what a clean run of its own costs
ENOUGH = 2048  # rows of a wave: reading the weights once more for others costs nothing beside their arithmetic


def spans(counts: Sequence[int], kept: Sequence[float], rows: float, room: float) -> list[tuple[range, float]]:
    """Of counts copies that leave at each layer, each of so many rows, those that may share a wave: (layers, bytes left
    of the room), from the last layer on."""
    found, stop = [], len(counts)
    while any(counts[:stop]):
        start = stop - 1
        left, copies = room - counts[start] * kept[start], counts[start]
        while start:
            more = counts[start - 1]
            if more * kept[start - 1] > left or (copies + more) * rows > ENOUGH:
                break
            start, left, copies = start - 1, left - more * kept[start - 1], copies + more
        if copies:
            found.append((range(start, stop), left))
        stop = start
    return found


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
            self.replay = Replay(self.capture, 1)  # anew, where memory ran out on the way
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
        self,
        layers: Sequence[int],
        nodes: torch.Tensor,
        weights: torch.Tensor,
        budget: Any,
        value_of: Objective,
        groups: int | None,
    ) -> Iterator[tuple[int, Sums]]:
        """These layers' (s1, s2) of ops.riemann_accumulate, in parts that add up; none for a layer without gradient."""
        if self.additive and bool((unit := nodes == 1).any()):
            for one in self.clean_gradients(layers, value_of):
                if one.grad is not None:
                    yield one.layer, self.sums(one.layer, one.grad, weights[unit], groups)
            nodes, weights = nodes[~unit], weights[~unit]
        if not len(nodes):
            return
        device = self.capture.rows.index.device
        nodes, weights = nodes.to(device), weights.to(device)
        of_layers = [nodes if layer in layers else nodes[:0] for layer in range(self.capture.stack.num_layers)]
        for one in self.gradients(of_layers, budget, value_of):
            if one.grad is not None:
                own = (
                    weights if len(one.nodes) == len(nodes) else weights[(one.nodes[:, None] == nodes).int().argmax(1)]
                )
                yield one.layer, self.sums(one.layer, one.grad, own, groups)

    def clean_gradients(self, layers: Sequence[int], value_of: Objective) -> Iterator[LayerGradient]:
        """At alpha = 1, where blocks add their FFN's output: of these layers, ascending, in one pass."""
        one, full = Replay(self.capture, 1), value_of(self.capture.logits)[None]
        span = range(layers[0], layers[-1] + 1)
        for layer, gradient in zip(span, one.clean_gradients(value_of, span)[0], strict=True):
            if layer not in layers:
                continue
            yield LayerGradient(layer, full.new_ones(1), None if gradient is None else one.at_rows(gradient), full)

    def gradients(self, nodes: Sequence[torch.Tensor], budget: Any, value_of: Objective) -> Iterator[LayerGradient]:
        """Of every layer at its nodes, in parts."""
        waves = self.waves(nodes, memory.room(self.capture, budget))
        for _, parts in with_oom_halving(waves, partial(Wave.score, value_of=value_of)):
            yield from parts

    def waves(self, nodes: Sequence[torch.Tensor], room: float) -> list[Wave]:
        """All layers at their nodes, if they have any, in waves of no more rows than are enough, or one layer's, that
        keep no more than `room` bytes, or one node of one layer."""
        device, kept = self.capture.rows.index.device, self.kept()
        moved = {id(one): one.to(device) for one in nodes}
        nodes, waves = [moved[id(one)] for one in nodes], []
        parts = spans([len(one) for one in nodes], kept, self.capture.tokens, room)
        for layers, _ in parts:
            if len(layers) == 1:
                fit = max(1, int(min(room / kept[layers.start], len(nodes[layers.start]))))
                waves += [Wave(self, layers, (part,)) for part in nodes[layers.start].split(fit)]
            else:
                waves.append(Wave(self, layers, tuple(nodes[layers.start : layers.stop])))
        if len(waves) == 1 and self.additive and self.capture.tokens <= FEW and parts[0][1] >= kept[0]:
            waves[0] = replace(waves[0], rides=True)
        return waves

    @cached_property
    def sizes_of_one(self) -> dict[int, Any]:
        """Of the tensors that each block is called with for one sample, see `Staggered`."""
        probe = Replay(self.capture.of(torch.zeros(1, dtype=torch.int64, device=self.capture.rows.index.device)), 1)
        probe.measure_calls()
        return probe.sizes

    def kept(self) -> list[float]:
        """Bytes that a wave keeps of one copy that leaves at each layer."""
        return [memory.kept(self.capture, layer + self.additive) for layer in range(self.capture.stack.num_layers)]

    def baseline_values(self, layers: Sequence[int], copies: int, value_of: Objective) -> torch.Tensor:
        """F [L,n] with each of these L layers' neurons at their baseline, up to copies of them in one pass."""
        self.run()
        starts = {layer: self.replay.baseline_outputs[layer] for layer in layers}
        return staggered_values(self.replay, starts, copies, value_of)

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
class LayerGradient:
    """A layer's copies at nodes [m]: the gradient [m,R,...] by what its neurons contribute there, or are; None where
    there is none. values [m,n]: F."""

    layer: int
    nodes: torch.Tensor
    grad: torch.Tensor | None
    values: torch.Tensor


@dataclass(frozen=True)
class Wave:
    """The copies of some layers, each at its nodes."""

    clean: CleanRun
    layers: range
    nodes: tuple[torch.Tensor, ...]
    rides: bool = False  # the clean run is made on the way, if it is not yet

    @property
    def copies(self) -> int:
        return sum(map(len, self.nodes))

    def halves(self) -> list[Wave]:
        """The same in two waves: of fewer layers, or of fewer nodes of one."""
        several = len(self.layers) > 1
        middle = (len(self.layers) if several else self.copies) // 2
        first, last = slice(middle), slice(middle, None)
        if several:
            return [replace(self, layers=self.layers[i], nodes=self.nodes[i], rides=False) for i in (last, first)]
        return [replace(self, nodes=(self.nodes[0][i],), rides=False) for i in (first, last)]

    def score(self, value_of: Objective) -> list[LayerGradient]:
        """What its copies have."""
        if not self.copies:  # a half of layers that asked for nothing
            return []
        run, rides = self.clean, self.rides and not self.clean.known
        if not rides:
            run.run()
        firsts = [layer + run.additive for layer, own in zip(self.layers, self.nodes, strict=True) for _ in own]
        with torch.enable_grad(), memory.measured(run.capture, firsts + [0] * rides):
            rider = Replay(run.capture, 1) if rides else None
            leaves, logits = self._run(rider)
            if rider and not run.arrived(rider):
                return replace(self, rides=False).score(value_of)
            values = value_of(logits)
            grads = gradients_of(values, leaves)
        some = [(layer, own) for layer, own in zip(self.layers, self.nodes, strict=True) if len(own)]
        of_layers = values.detach().view(-1, run.capture.num_samples).split([len(own) for _, own in some])
        return [LayerGradient(*at, *found) for at, *found in zip(some, grads, of_layers, strict=True)]

    def _run(self, rider: Replay | None) -> tuple[list[torch.Tensor], torch.Tensor]:
        """(what each layer's neurons contribute, or are, at the nodes: leaves; logits of the copies that left so)."""
        run, capture, leaves = rider or self.clean.replay, self.clean.capture, list[torch.Tensor]()
        wide = torch.promote_types(capture.outputs[0].dtype, torch.float32)
        replays = {m: Replay(capture, m) for m in {len(of_layer) for of_layer in self.nodes} if m}
        nodes: dict[int, torch.Tensor] = {}  # by identity: many layers have the same, which is made once
        for of_layer in {id(one): one for one in self.nodes}.values():
            nodes[id(of_layer)] = torch.cat([of_layer, of_layer.new_ones(1 if rider else 0)]).to(wide)
        contributions: list[torch.Tensor] = []

        def contribute(layer: int) -> torch.Tensor:
            at = nodes[id(self.nodes[layer - self.layers.start])]
            return ops.riemann_project(capture.activations[layer], self.clean.weight(layer), at)

        def ride(layer: int, output: torch.Tensor) -> None:
            contributions.append(contribute(layer))
            run.baseline_outputs.append(output)
            run.push(run.add_rows(output, contributions[-1][-1:]), None)

        def start_of(layer: int) -> torch.Tensor:
            leaves.append((contributions.pop()[:-1] if rider else contribute(layer)).requires_grad_())
            return replays[len(leaves[-1])].add_rows(run.baseline_outputs[layer], leaves[-1])

        copies = [len(of_layer) for of_layer in self.nodes]
        if rider:
            rider.measure_calls()
            return leaves, Staggered(rider, self.layers, copies).logits(start_of, ride)
        if self.clean.additive:
            return leaves, Staggered(run, self.layers, copies).logits(start_of)
        starts = []
        for layer, of_layer in zip(self.layers, self.nodes, strict=True):
            if not len(of_layer):
                starts.append(run.states[layer])  # which nobody asks for
                continue
            replay = replays[len(of_layer)]
            for state in run.states[len(replay.states) : layer]:
                replay.states.append(repeated(state, replay.copies))
            leaves.append(ops.riemann_interpolate(capture.activations[layer], of_layer).requires_grad_())
            starts.append(replay.block_output(leaves[-1]))
        return leaves, Staggered(run, self.layers, copies).logits(lambda layer: starts[layer - self.layers.start])
