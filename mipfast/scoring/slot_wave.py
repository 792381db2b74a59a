"""The wave of samples that ask for nodes of their own: slots of every layer in one forward and one backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from mipfast.scoring import memory
from mipfast.scoring.capture import OfRows
from mipfast.scoring.nodes import ResidualNodes, Sums, gradients_of, with_oom_halving
from mipfast.scoring.slots import HookedSlots, Packing, Slot, Slots
from mipfast.scoring.staggered import Staggered
from mipfast.scoring.wave import CleanRun, spans

Scored = tuple[int, list[Slot], Sums, torch.Tensor]  # (layer, slots, their (s1, s2) [s,F], F [s])


def scored(clean: CleanRun, packing: Packing, slots: Sequence[list[Slot]], budget: float | str) -> Iterator[Scored]:
    """Of every layer its slots, in waves of no more rows than are enough, or one layer's, that keep no more than the
    budget, or one slot of one layer. For a batch that can be divided among its samples."""
    clean.run()
    n, room, waves = clean.capture.num_samples, memory.room(clean.capture, budget), list[SlotWave]()
    kept = [size / n for size in clean.kept()]
    for layers, _ in spans([len(own) for own in slots], kept, clean.capture.tokens / n, room):
        own = slots[layers.start]
        fit = max(1, int(min(room / kept[layers.start], len(own)))) if len(layers) == 1 else len(own)
        if fit < len(own):
            parts = [own[i : i + fit] for i in range(0, len(own), fit)]
            waves += [SlotWave(clean, packing, layers, (part,)) for part in parts]
        else:
            waves.append(SlotWave(clean, packing, layers, tuple(slots[layers.start : layers.stop])))
    for _, found in with_oom_halving(waves, SlotWave.score):
        yield from found


@dataclass(frozen=True)
class SlotWave:
    """The slots of some layers."""

    clean: CleanRun
    packing: Packing
    layers: range
    slots: tuple[list[Slot], ...]

    @property
    def copies(self) -> int:
        return sum(map(len, self.slots))

    def halves(self) -> list[SlotWave]:
        """The same in two waves: of fewer layers, or of fewer slots of one."""
        several = len(self.layers) > 1
        middle = (len(self.layers) if several else self.copies) // 2
        parts = (slice(middle, None), slice(middle))
        if several:
            return [replace(self, layers=self.layers[i], slots=self.slots[i]) for i in parts]
        return [replace(self, slots=(self.slots[0][i],)) for i in parts]

    def score(self) -> list[Scored]:
        """What its slots have."""
        if not self.copies:  # a half of layers that asked for nothing
            return []
        clean, first = self.clean, int(self.clean.additive)
        n, device = clean.capture.num_samples, clean.capture.rows.index.device
        samples = [torch.tensor([i for i, _ in own], dtype=torch.int64, device=device) for own in self.slots]
        firsts = [layer + first for layer, own in zip(self.layers, self.slots, strict=True) for _ in own]
        with torch.enable_grad(), memory.measured(clean.capture, firsts, 1 / n):
            groups, leaves, starts = {}, [], {}
            for layer, own, of in zip(self.layers, self.slots, samples, strict=True):
                if own:
                    groups[layer] = self.packing.new(own)
                    leaf, starts[layer] = self._start(groups[layer], layer, of)
                    leaves.append(leaf)
            wave = Staggered(clean.replay, self.layers, [len(own) for own in self.slots], samples, clean.sizes_of_one)
            values = self.packing.objective(wave.logits(starts.__getitem__), wave.wave.capture.labels)
            grads = gradients_of(values, leaves)
        of_layers = values.detach().split([len(group.slots) for group in groups.values()])
        rows = zip(groups.items(), grads, of_layers, strict=True)
        return [(layer, group.slots, self._sums(group, grad, layer), f) for (layer, group), grad, f in rows]

    def _start(self, group: Slots, layer: int, samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(what the slots' neurons contribute, or are: a leaf; the state in which they leave the clean run)."""
        act, run = self.clean.capture.activations[layer], self.clean.replay
        group.replay.states = OfRows(run.states[:layer], samples)
        if isinstance(group, ResidualNodes):
            leaf = group._contributed(act, None).requires_grad_()
            return leaf, group.replay.add_rows(run.baseline_outputs[layer][samples], leaf)
        assert isinstance(group, HookedSlots)
        leaf = group._scaled(act, None).requires_grad_()
        return leaf, group.replay.block_output(leaf)

    def _sums(self, group: Slots, grad: torch.Tensor | None, layer: int) -> Sums:
        act = self.clean.capture.activations[layer]
        if grad is None:
            nothing = torch.zeros(len(group.slots), act.shape[1], device=act.device)
            return nothing, nothing
        return group._summed(grad, act, None)
