"""Searches whose error is controlled: every layer of every sample gets the nodes that its integral asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from mipfast.scoring import memory, slot_wave
from mipfast.scoring.attribution import chosen
from mipfast.scoring.capture import Capture
from mipfast.scoring.config import LocateConfig
from mipfast.scoring.nodes import Sums, with_oom_halving
from mipfast.scoring.panels import (
    COARSE,
    GRADED,
    WHOLE,
    Mesh,
    coarsened,
    error,
    errors,
    integral,
    nodes_of,
    refined,
    refined_to,
)
from mipfast.scoring.plan import plan
from mipfast.scoring.slots import Packing, Slot, Slots, Valued, slot_sums
from mipfast.scoring.wave import CleanRun, LayerGradient

# From this tol on the estimates grow with it: of meshes that are coarse enough for more, half of a difference was below
# the error in 29 of 100 layers of one of three language models, at .05, and twice and a half of it would be in 2.
LOOSE = 0.02
FEW_AT_ONE = 64  # rows of all layers up to which one more node costs less than a pass of its own
SMALL = 1e-3  # of the largest layer's score: a layer that matters less does not get nodes for its own sake
# A layer starts from the nodes that would have been enough for the layer below at so many times the tolerance: fewer
# would ask again more often, more would rarely be needed.
AS_BELOW = 1


@dataclass(frozen=True)
class Integrated:
    """One layer of n samples: s1, s2 [n,F], C of completeness [n], F at alpha = 0 [n], the estimated error of the sum
    that is the score, in its 2-norm [n], nodes [n]."""

    s1: torch.Tensor
    s2: torch.Tensor
    carried: torch.Tensor
    at_zero: torch.Tensor
    error: torch.Tensor
    nodes: list[int]


class Layer:
    """What is known of one layer's integrand: of every sample and node (s1, s2, dF/d alpha along the path, F)."""

    def __init__(self, captured: Capture, config: LocateConfig):
        self._known: list[dict[float, tuple[torch.Tensor, ...]]] = [{} for _ in range(captured.num_samples)]
        self._which, self._factor = 0 if config.score == "igi" else 1, max(1.0, (config.tol or 0.0) / LOOSE)
        self._dtype = torch.float64 if captured.logits.dtype == torch.float64 else torch.float32

    def add(self, slots: Slots, act: torch.Tensor) -> None:
        """What a replay of slots finds."""
        sums, along = slots.scored(act)
        self.add_slots(slots.slots, sums, along, slots.values)

    def add_slots(self, slots: list[Slot], sums: Sums, along: torch.Tensor, values: torch.Tensor) -> None:
        """Of each slot (s1, s2) [s,F], dF/d alpha along the path [s], F [s]."""
        for (sample, alpha), *found in zip(slots, *sums, along, values, strict=True):
            self._known[sample][alpha] = tuple(found)

    def add_gradient(self, gradient: LayerGradient, clean: CleanRun) -> None:
        """What a wave found."""
        m, n, act = len(gradient.nodes), len(self._known), clean.capture.activations[gradient.layer]
        if gradient.grad is None:
            s1 = s2 = torch.zeros(m * n, act.shape[1], device=act.device)
        else:
            weight = clean.weight(gradient.layer) if clean.additive else None
            counts = torch.bincount(clean.capture.rows.sample, minlength=n)
            s1, s2 = slot_sums(gradient.grad, act.repeat(m, 1), weight, counts.repeat(m))
        nothing = torch.zeros((), device=act.device)
        for k, alpha in enumerate(gradient.nodes.tolist()):
            for i, known in enumerate(self._known):
                known[alpha] = (s1[k * n + i], s2[k * n + i], nothing, gradient.values[k, i])

    def missing(self, meshes: Sequence[Mesh]) -> list[list[float]]:
        """Of every sample the nodes that are not known."""
        return [[a for a in nodes_of(mesh) if a not in known] for mesh, known in zip(meshes, self._known, strict=True)]

    def errors(self, meshes: Sequence[Mesh]) -> tuple[list[list[float]], list[float]]:
        """(of every sample the estimated errors of its panels; norms of the scores)."""
        of_panels = [self._factor * errors(values, mesh) for values, mesh in self._values(meshes, self._which)]
        norms = torch.stack([integral(values, mesh).norm() for values, mesh in self._values(meshes, self._which)])
        norms, *found = torch.cat([norms, *of_panels]).cpu().split([len(norms), *map(len, of_panels)])  # one wait
        return [one.tolist() for one in found], norms.tolist()

    def integrated(self, meshes: Sequence[Mesh]) -> Integrated:
        """The integrals by these meshes, whose nodes are all known."""
        parts = (
            torch.stack([integral(values, mesh) for values, mesh in self._values(meshes, which)]) for which in range(3)
        )
        parts_off = [errors(values, mesh)[: max(1, len(mesh))] for values, mesh in self._values(meshes, self._which)]
        off = [self._factor * one.norm() for one in parts_off]
        s1, s2, carried = parts
        at_zero = torch.stack([known[0.0][3] for known in self._known])
        return Integrated(s1, s2, carried, at_zero, torch.stack(off), [len(nodes_of(mesh)) for mesh in meshes])

    def _values(self, meshes: Sequence[Mesh], which: int) -> Iterator[tuple[torch.Tensor, Mesh]]:
        for known, mesh in zip(self._known, meshes, strict=True):
            yield torch.stack([known[alpha][which] for alpha in nodes_of(mesh)]).to(self._dtype), mesh


def greedy(
    captured: Capture, config: LocateConfig, fitting: int, measure: bool, objective: Valued
) -> tuple[torch.Tensor, torch.Tensor, list[Integrated]]:
    """Layer by layer along the path: (scores [n,L,F], path [n,L,k], every layer's integral), of those to be scored."""
    assert config.max_nodes is not None and config.tol is not None
    acts, n = captured.activations, captured.num_samples
    depth = len(config.scored(captured.stack.num_layers))
    route, run = plan(captured, clean_states=True)
    packing = Packing(route, run is not None, fitting, measure, objective)
    clean: list[Slots] = [packing.at_clean(run, depth)] if run else []
    meshes, largest, groups, paths = [_first(config)] * n, [0.0] * n, list[Slots](), list[torch.Tensor]()
    found, parts = [], []
    for at, act in enumerate(acts[:depth]):
        layer = Layer(captured, config)
        for group in clean:
            layer.add(group, act)
        score = partial(_scored, layer, captured, at)
        for _ in with_oom_halving(groups, score):
            pass
        while True:
            if slots := packing.asked(layer.missing(meshes)):
                new = [packing.started(part, acts, paths) for part in packing.packed(slots)]
                for _ in with_oom_halving(new, score):
                    pass
                groups += new
            of_panels, norms = layer.errors(meshes)
            relative = _relative(of_panels, norms, largest)
            finer = _finer(meshes, relative, config, partial(refined, max_nodes=config.max_nodes))
            if finer == meshes:
                break
            meshes = finer
        largest = [max(pair) for pair in zip(largest, norms, strict=True)]
        found.append(layer.integrated(meshes))
        parts.append(chosen(captured, config, found[-1].s1[:, None], found[-1].s2[:, None], [at]))
        paths.append(parts[-1][1][captured.rows.sample, 0])  # [R,k], the neurons that stay scaled
        if at + 1 < depth:
            for group in [*clean, *groups]:
                group.advance(act, paths[-1])
            meshes = [coarsened(e, mesh, AS_BELOW * config.tol) for e, mesh in zip(relative, meshes, strict=True)]
            groups = _regrouped(packing, groups, meshes)
    scores, path = (torch.cat(column, 1) for column in zip(*parts, strict=True))
    return scores, path, found


def pointwise(
    captured: Capture, config: LocateConfig, fitting: int, measure: bool, objective: Valued
) -> tuple[torch.Tensor, torch.Tensor, list[Integrated]]:
    """As `greedy`, without a path: a wave of all of them, and more waves of the slots that are missing then. Where a
    batch cannot be divided, a node that one sample asks for is every sample's."""
    assert config.max_nodes is not None and config.tol is not None
    clean, depth = CleanRun(captured), captured.stack.num_layers
    scored = config.scored(depth)
    layers = {at: Layer(captured, config) for at in scored}
    later = COARSE if config.modality == "text" else WHOLE
    meshes = {at: [later if at else _first(config)] * captured.num_samples for at in scored}
    packing = Packing(clean.capture, clean.additive, fitting, False, objective)

    def value_of(logits: torch.Tensor) -> torch.Tensor:
        return objective(logits, clean.capture.labels)

    if clean.additive and clean.capture.tokens * len(scored) > FEW_AT_ONE:
        for one in clean.clean_gradients(scored, value_of):
            layers[one.layer].add_gradient(one, clean)
    off: dict[int, tuple[list[list[float]], list[float]]] = {}
    changed = scored
    while changed:
        missing = [packing.asked(layers[at].missing(meshes[at])) if at in changed else [] for at in range(depth)]
        if clean.known and packing.divisible:
            for layer, slots, sums, values in slot_wave.scored(clean, packing, missing, config.memory_budget):
                layers[layer].add_slots(slots, sums, torch.zeros_like(values), values)
        else:
            nodes = [torch.tensor(sorted({a for _, a in slots}), dtype=torch.float64) for slots in missing]
            for one in clean.gradients(nodes, config.memory_budget, value_of):
                layers[one.layer].add_gradient(one, clean)
        for at in changed:
            off[at] = layers[at].errors(meshes[at])
        largest = [max(of_sample) for of_sample in zip(*(norms for _, norms in off.values()), strict=True)]
        refine = partial(refined_to, max_nodes=config.max_nodes, bound=config.tol)
        finer = {at: _finer(meshes[at], _relative(*off[at], largest), config, refine) for at in scored}
        changed = [at for at in scored if finer[at] != meshes[at]]
        meshes = finer
    found = [layers[at].integrated(meshes[at]) for at in scored]
    s1, s2 = torch.stack([layer.s1 for layer in found], 1), torch.stack([layer.s2 for layer in found], 1)
    return *chosen(captured, config, s1, s2, scored), found


def _scored(layer: Layer, captured: Capture, at: int, slots: Slots) -> None:
    share = slots.packing.least / captured.num_samples
    with memory.measured(captured, [at] * slots.copies, share):
        layer.add(slots, captured.activations[at])


def _first(config: LocateConfig) -> Mesh:
    """Of the first layer: a vision tower's was not seen to peak."""
    assert config.max_nodes is not None
    return GRADED if config.modality == "text" and len(nodes_of(GRADED)) <= config.max_nodes else WHOLE


def _relative(of_panels: list[list[float]], norms: list[float], largest: Sequence[float]) -> list[list[float]]:
    """Errors of every sample's panels over its score's norm, or over a part of its largest layer's."""
    by = [max(norm, SMALL * most) or 1.0 for norm, most in zip(norms, largest, strict=True)]
    return [[one / of_sample for one in panels] for panels, of_sample in zip(of_panels, by, strict=True)]


def _finer(
    meshes: list[Mesh], relative: list[list[float]], config: LocateConfig, refine: Callable[..., Mesh]
) -> list[Mesh]:
    """For the samples whose error is above tol, as long as nodes are left."""
    assert config.tol is not None
    pairs = zip(relative, meshes, strict=True)
    return [refine(e, mesh) if error(e, mesh) > config.tol else mesh for e, mesh in pairs]


def _regrouped(packing: Packing, groups: list[Slots], meshes: Sequence[Mesh]) -> list[Slots]:
    """Those slots that the next block's meshes ask for, in as few replays as hold them."""
    here = {slot for group in groups for slot in group.slots}
    slots = [slot for slot in packing.asked([nodes_of(mesh) for mesh in meshes]) if slot in here]
    parts = packing.packed(slots) if slots else []
    same = parts == [group.slots for group in groups]
    return groups if same else [packing.gathered(groups, part) for part in parts]
