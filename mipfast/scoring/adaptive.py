"""Searches whose error is controlled: every layer of every sample gets the nodes that its integral asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from mipfast.scoring import memory
from mipfast.scoring.attribution import chosen
from mipfast.scoring.capture import Capture
from mipfast.scoring.config import LocateConfig
from mipfast.scoring.nodes import with_oom_halving
from mipfast.scoring.panels import GRADED, WHOLE, Mesh, coarsened, error, errors, integral, nodes_of, refined
from mipfast.scoring.plan import plan
from mipfast.scoring.slots import Packing, Slot, Slots, Valued, slot_sums
from mipfast.scoring.wave import CleanRun, LayerGradient

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
        self._which = 0 if config.score == "igi" else 1
        self._dtype = torch.float64 if captured.logits.dtype == torch.float64 else torch.float32

    def add(self, slots: Slots, act: torch.Tensor) -> None:
        """What a replay of slots finds."""
        (s1, s2), along = slots.scored(act)
        for i, (sample, alpha) in enumerate(slots.slots):
            self._known[sample][alpha] = (s1[i], s2[i], along[i], slots.values[i])

    def add_gradient(self, gradient: LayerGradient, clean: CleanRun, packing: Packing) -> None:
        """What a wave found."""
        m, n, act = len(gradient.nodes), len(self._known), clean.capture.activations[gradient.layer]
        if gradient.grad is None:
            s1 = s2 = torch.zeros(m * n, act.shape[1], device=act.device)
        else:
            weight = clean.weight(gradient.layer) if clean.additive else None
            s1, s2 = slot_sums(gradient.grad, act.repeat(m, 1), weight, packing.counts.repeat(m))
        nothing = torch.zeros((), device=act.device)
        for k, alpha in enumerate(gradient.nodes.tolist()):
            for i, known in enumerate(self._known):
                known[alpha] = (s1[k * n + i], s2[k * n + i], nothing, gradient.values[k, i])

    def missing(self, meshes: Sequence[Mesh]) -> list[list[float]]:
        """Of every sample the nodes that are not known."""
        return [[a for a in nodes_of(mesh) if a not in known] for mesh, known in zip(meshes, self._known, strict=True)]

    def errors(self, meshes: Sequence[Mesh], floors: Sequence[float]) -> tuple[list[list[float]], list[float]]:
        """(of every sample the estimated errors of its panels, over its score's norm or its floor; these norms)."""
        of_panels = [errors(values, mesh) for values, mesh in self._values(meshes, self._which)]
        norms = torch.stack([integral(values, mesh).norm() for values, mesh in self._values(meshes, self._which)])
        flat = torch.cat([norms, *of_panels]).tolist()  # one wait for the GPU
        found, at = [], len(meshes)
        for norm, floor, panels in zip(flat, floors, of_panels, strict=False):
            by = max(norm, floor) or 1.0
            found.append([size / by for size in flat[at : at + len(panels)]])
            at += len(panels)
        return found, flat[: len(meshes)]

    def integrated(self, meshes: Sequence[Mesh]) -> Integrated:
        """The integrals by these meshes, whose nodes are all known."""
        parts = (
            torch.stack([integral(values, mesh) for values, mesh in self._values(meshes, which)]) for which in range(3)
        )
        off = [errors(values, mesh)[: len(mesh)].norm() for values, mesh in self._values(meshes, self._which)]
        s1, s2, carried = parts
        at_zero = torch.stack([known[0.0][3] for known in self._known])
        return Integrated(s1, s2, carried, at_zero, torch.stack(off), [len(nodes_of(mesh)) for mesh in meshes])

    def _values(self, meshes: Sequence[Mesh], which: int) -> Iterator[tuple[torch.Tensor, Mesh]]:
        for known, mesh in zip(self._known, meshes, strict=True):
            yield torch.stack([known[alpha][which] for alpha in nodes_of(mesh)]).to(self._dtype), mesh


def greedy(
    captured: Capture, config: LocateConfig, fitting: int, measure: bool, objective: Valued
) -> tuple[torch.Tensor, torch.Tensor, list[Integrated]]:
    """Layer by layer along the path: (scores [n,L,F], path [n,L,k], every layer's integral)."""
    assert config.tol is not None
    acts, n = captured.activations, captured.num_samples
    route, run = plan(captured, clean_states=True)
    packing = Packing(route, run is not None, fitting, measure, objective)
    clean: list[Slots] = [packing.at_clean(run)] if run else []
    meshes, largest, groups, paths = [GRADED] * n, [0.0] * n, list[Slots](), list[torch.Tensor]()
    found, parts = [], []
    for at, act in enumerate(acts):
        layer = Layer(captured, config)
        for group in clean:
            layer.add(group, act)
        score = partial(_scored, layer, captured, at)
        for _ in with_oom_halving(groups, score):
            pass
        started = partial(packing.started, acts=acts, paths=paths)
        meshes, relative, norms = _converged(layer, meshes, packing, config, largest, started, score, groups)
        largest = [max(pair) for pair in zip(largest, norms, strict=True)]
        found.append(layer.integrated(meshes))
        parts.append(chosen(captured, config, found[-1].s1[:, None], found[-1].s2[:, None], at))
        paths.append(parts[-1][1][captured.rows.sample, 0])  # [R,k], the neurons that stay scaled
        if at + 1 < len(acts):
            for group in [*clean, *groups]:
                group.advance(act, paths[-1])
            meshes = [coarsened(e, mesh, AS_BELOW * config.tol) for e, mesh in zip(relative, meshes, strict=True)]
            groups = _regrouped(packing, groups, meshes)
    scores, path = (torch.cat(column, 1) for column in zip(*parts, strict=True))
    return scores, path, found


def pointwise(
    captured: Capture, config: LocateConfig, fitting: int, measure: bool, objective: Valued
) -> tuple[torch.Tensor, torch.Tensor, list[Integrated]]:
    """As `greedy`, without a path: a wave, and what is missing then, layer by layer from the clean run."""
    clean, n, depth = CleanRun(captured), captured.num_samples, captured.stack.num_layers
    packing = Packing(clean.capture, clean.additive, fitting, False, objective)
    layers = [Layer(captured, config) for _ in range(depth)]
    meshes = [GRADED, *[WHOLE] * (depth - 1)]

    def value_of(logits: torch.Tensor) -> torch.Tensor:
        return objective(logits, clean.capture.labels)

    nodes = [torch.tensor(nodes_of(mesh), dtype=torch.float64) for mesh in meshes]
    if clean.additive:  # at alpha = 1 every layer is the clean run
        nodes = [of_layer[:-1] for of_layer in nodes]
        for one in clean.clean_gradients(value_of):
            layers[one.layer].add_gradient(one, clean, packing)
    for one in clean.gradients(nodes, config.memory_budget, value_of):
        layers[one.layer].add_gradient(one, clean, packing)
    norms = [layer.errors([mesh] * n, [0.0] * n)[1] for layer, mesh in zip(layers, meshes, strict=True)]
    largest, found = [max(of_sample) for of_sample in zip(*norms, strict=True)], []
    for at, (layer, mesh) in enumerate(zip(layers, meshes, strict=True)):

        def started(slots: list[Slot], at: int = at) -> Slots:
            clean.run()
            return packing.branched(slots, clean.replay, at)

        score = partial(_scored, layer, captured, at)
        finer, _, _ = _converged(layer, [mesh] * n, packing, config, largest, started, score, [])
        found.append(layer.integrated(finer))
    s1, s2 = torch.stack([layer.s1 for layer in found], 1), torch.stack([layer.s2 for layer in found], 1)
    return *chosen(captured, config, s1, s2), found


def _scored(layer: Layer, captured: Capture, at: int, slots: Slots) -> None:
    with memory.measured(captured, [at] * slots.copies):
        layer.add(slots, captured.activations[at])


def _converged(
    layer: Layer,
    meshes: Sequence[Mesh],
    packing: Packing,
    config: LocateConfig,
    largest: Sequence[float],
    started: Callable[[list[Slot]], Slots],
    score: Callable[[Slots], None],
    groups: list[Slots],
) -> tuple[list[Mesh], list[list[float]], list[float]]:
    """Finer meshes for the samples that need them, until the error is below tol or the nodes are used up: (meshes, the
    relative errors of their panels, norms of the scores). What was started for it is added to groups."""
    assert config.tol is not None and config.max_nodes is not None
    meshes, floors = list(meshes), [SMALL * norm for norm in largest]
    while True:
        if slots := packing.asked(layer.missing(meshes)):
            new = [started(part) for part in packing.packed(slots)]
            for _ in with_oom_halving(new, score):
                pass
            groups += new
        relative, norms = layer.errors(meshes, floors)
        finer = [
            refined(e, mesh, config.max_nodes) if error(e, mesh) > config.tol else mesh
            for e, mesh in zip(relative, meshes, strict=True)
        ]
        if finer == meshes:
            return meshes, relative, norms
        meshes = finer


def _regrouped(packing: Packing, groups: list[Slots], meshes: Sequence[Mesh]) -> list[Slots]:
    """Those slots that the next block's meshes ask for, in as few replays as hold them."""
    here = {slot for group in groups for slot in group.slots}
    slots = [slot for slot in packing.asked([nodes_of(mesh) for mesh in meshes]) if slot in here]
    return [packing.gathered(groups, part) for part in packing.packed(slots)] if slots else []
