"""Samples at nodes of their own: a replay of slots, each a sample at one alpha, where `nodes` has every sample at every
node. For a quadrature that asks for more nodes only where a sample needs them.

Where a batch cannot be divided among its samples, as pictures in one sequence, all of them are at every node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from mipfast import ops
from mipfast.model.batch import Labels
from mipfast.scoring.capture import Capture
from mipfast.scoring.nodes import CleanNode, HookedNodes, NodeGroup, ResidualNodes, Sums
from mipfast.scoring.replay import Replay

Slot = tuple[int, float]  # (sample, alpha)
Valued = Callable[[torch.Tensor, Labels], torch.Tensor]  # (logits [s,q,V], labels of s samples) -> F [s]


class Slots(NodeGroup):
    """A NodeGroup whose m·n rows of copies are slots, in their order. `score` gives the sums of every slot [s,F], and
    leaves F of every slot in `values`."""

    packing: Packing
    slots: list[Slot]
    values: torch.Tensor

    def of_slots(self, packing: Packing, slots: list[Slot]) -> Slots:
        """Takes its slots; the replay it was made with runs them."""
        device = self.replay.capture.rows.index.device
        self.packing, self.slots = packing, slots
        samples = torch.tensor([sample for sample, _ in slots], device=device)
        self._rows, self._counts = packing.route.rows_of(samples), packing.counts[samples]
        wide = torch.promote_types(packing.route.outputs[0].dtype, torch.float32)
        alphas = torch.tensor([alpha for _, alpha in slots], dtype=wide, device=device)
        self._alphas = alphas.repeat_interleave(self._counts)[:, None]
        return self

    @property
    def copies(self) -> int:
        return len(self.slots) // self.packing.least

    def halves(self) -> list[NodeGroup]:
        middle = self.copies // 2 * self.packing.least
        return [self.packing.gathered([self], part) for part in (self.slots[:middle], self.slots[middle:])]

    def scored(self, act: torch.Tensor) -> tuple[Sums, torch.Tensor]:
        """(s1 and s2 [s,F] of the next block, zero without gradient; dF/d alpha through the path's earlier neurons
        [s]) of every slot."""
        sums, along = self.score(act, None, self._value_of)
        if sums is None:
            nothing = torch.zeros(len(self.slots), act.shape[1], device=act.device)
            sums = nothing, nothing
        return sums, along.flatten()

    def _value_of(self, logits: torch.Tensor) -> torch.Tensor:
        value = self.packing.objective(logits, self.replay.capture.labels)
        self.values = value.detach()
        return value

    def _of_all(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[self._rows].view(self.replay.copies, -1, rows.shape[-1])

    def _between(self, ends: torch.Tensor) -> torch.Tensor:
        """What is linear in alpha, from [2,R,...] at 0 and at 1."""
        at_0, at_1 = (end[self._rows] for end in ends)
        found = at_0 * (1 - self._alphas) + at_1 * self._alphas
        return found.to(ends.dtype).view(self.replay.copies, -1, ends.shape[-1])

    def _ends(self, act: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.0, 1.0], device=act.device)

    def _summed(self, grad: torch.Tensor, act: torch.Tensor, groups: int | None) -> Sums:
        weight = self._weight() if isinstance(self, ResidualNodes) else None
        return slot_sums(grad, act[self._rows], weight, self._counts)


def slot_sums(grad: torch.Tensor, act: torch.Tensor, weight: torch.Tensor | None, counts: torch.Tensor) -> Sums:
    """(s1, s2) [s,F] of ops.riemann_accumulate, not summed over nodes, from gradients of rows that are sorted by slot:
    by activations, or with weight [H,F] by its product with them. counts [s]: rows of a slot."""
    flat, one = grad.reshape(1, -1, grad.shape[-1]), torch.ones(1, device=grad.device)
    groups = len(counts) if len(counts) * int(counts[0]) == len(act) and bool((counts == counts[0]).all()) else None
    if weight is None:
        s1, s2 = ops.riemann_accumulate(flat, one, act=act, groups=groups)
    else:
        s1, s2 = ops.project_accumulate(flat, weight, one, act=act, groups=groups)
    if groups is None:
        s1, s2 = (torch.segment_reduce(part, "sum", lengths=counts) for part in (s1, s2))
    return s1, s2


class HookedSlots(Slots, HookedNodes):
    """The native way."""

    def _scaled(self, act: torch.Tensor, path: torch.Tensor | None) -> torch.Tensor:
        return self._between(ops.riemann_interpolate(act, self._ends(act), neurons=path))


class ResidualSlots(Slots, ResidualNodes):
    """Where blocks add their FFN's output."""

    def _contributed(self, act: torch.Tensor, path: torch.Tensor | None) -> torch.Tensor:
        return self._between(ops.riemann_project(act, self._weight(), self._ends(act), neurons=path))


class CleanSlots(ResidualSlots, CleanNode):
    """Every sample at alpha = 1."""


class Packing:
    """How slots of one captured batch run: by the cheapest exact route, in replays of no more than `most` slots.

    additive: whether blocks add their FFN's output; else the native way. divisible: whether a slot can be any sample;
    else they come as whole batches. carry: with d state / d alpha, for completeness.
    """

    def __init__(self, route: Capture, additive: bool, fitting: int, carry: bool, objective: Valued):
        self.objective, self.carry, self.route = objective, carry, route
        self.kind = ResidualSlots if additive else HookedSlots
        self.counts = torch.bincount(route.rows.sample, minlength=route.num_samples)
        self.divisible = route.divisible
        self.least = 1 if self.divisible else route.num_samples
        self.most = max(1, fitting) * route.num_samples

    def at_clean(self, run: Replay, depth: int) -> CleanSlots:
        """Every sample at alpha = 1, from one pass, for the first `depth` layers. run: a copy past every block, that
        adds its FFN's output."""

        def value_of(logits: torch.Tensor) -> torch.Tensor:
            return self.objective(logits, self.route.labels)

        one = torch.ones(1)
        gradients, taps = Replay(self.route, 1).clean_gradients(value_of, range(depth))
        clean = CleanSlots(Replay(self.route, 1), one, one, self.carry, run.states, gradients, taps)
        clean.values = value_of(self.route.logits)
        clean.of_slots(self, [(i, 1.0) for i in range(self.route.num_samples)])
        return clean

    def asked(self, wanted: Sequence[Iterable[float]]) -> list[Slot]:
        """The slots of these nodes of every sample, or, where it cannot be divided, of every node that one needs."""
        nodes = [set(of_sample) for of_sample in wanted]
        if not self.divisible:
            nodes = [set().union(*nodes)] * len(nodes)
        return [(i, a) for a in sorted(set().union(*nodes)) for i, own in enumerate(nodes) if a in own]

    def packed(self, slots: list[Slot]) -> list[list[Slot]]:
        """In parts of equal size, no larger than a replay may be."""
        units = len(slots) // self.least
        parts = -(-units // max(1, self.most // self.least))
        ends = [units * i // parts * self.least for i in range(parts + 1)]
        return [slots[start:stop] for start, stop in zip(ends, ends[1:], strict=False)]

    def new(self, slots: list[Slot]) -> Slots:
        """Slots before the first block."""
        device = self.route.rows.index.device
        if self.divisible:
            replay = Replay(self.route.of(torch.tensor([sample for sample, _ in slots], device=device)), 1)
        else:
            replay = Replay(self.route, len(slots) // self.least)
        unused = torch.ones(1)
        return self.kind(replay, unused, unused, self.carry).of_slots(self, slots)

    def started(self, slots: list[Slot], acts: Sequence[torch.Tensor], paths: Sequence[torch.Tensor]) -> Slots:
        """New slots past as many blocks as there are paths [R,k], along them."""
        found = self.new(slots)

        def past(layer: int) -> bool:
            if isinstance(found, ResidualSlots):
                found.baseline_output()
            found.advance(acts[layer], paths[layer])
            return True

        if paths:
            found.replay.walk(len(paths), past)
        return found

    def gathered(self, groups: Sequence[Any], slots: list[Slot]) -> Slots:
        """These slots of some groups, past the same blocks, as one."""
        place: dict[Slot, int] = {}
        for group in groups:
            place.update({slot: len(place) + i for i, slot in enumerate(group.slots)})
        units = [place[slot] // self.least for slot in slots[:: self.least]]
        index = torch.tensor(units, device=self.route.rows.index.device)
        found = self.new(slots)

        def taken(parts: list[Any]) -> Any:
            if parts[0] is None:
                return None
            by_unit = [part.reshape(g.copies, -1, part.shape[-1]) for part, g in zip(parts, groups, strict=True)]
            return torch.cat(by_unit)[index]

        for states, tangents in zip(
            zip(*(g.replay.states for g in groups), strict=True),
            zip(*(g.replay.tangents for g in groups), strict=True),
            strict=True,
        ):
            found.replay.push(taken([s.detach() for s in states]), taken(list(tangents)))
        return found
