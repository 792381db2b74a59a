"""Searches at the nodes of a fixed rule, the same for every layer and sample, whose error nobody watches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import torch

from mipfast.scoring import memory
from mipfast.scoring.attribution import chosen
from mipfast.scoring.capture import Capture
from mipfast.scoring.config import LocateConfig
from mipfast.scoring.nodes import NodeGroup, Objective, Sums, make_node_groups, with_oom_halving
from mipfast.scoring.wave import CleanRun

# of the L layers that are scored: scores [n,L,F], path [n,L,k], their part of F(1) - F(0) by the quadrature [L,n], F(0)
# [L,n] if it was measured
Searched = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def pointwise(
    captured: Capture,
    config: LocateConfig,
    nodes: torch.Tensor,
    weights: torch.Tensor,
    fitting: int,
    measure: bool,
    value_of: Objective,
) -> Searched:
    clean, of_layers, layers = CleanRun(captured), _Sums(captured), config.scored(captured.stack.num_layers)
    for layer, part in clean.pointwise(layers, nodes, weights, config.memory_budget, value_of, of_layers.groups):
        of_layers.add(layer, part)
    s1, s2 = of_layers.of(layers)
    at_zero = clean.baseline_values(layers, fitting, value_of) if measure else None
    return *chosen(captured, config, s1, s2, layers), s1.sum(2).T, at_zero


def greedy(
    captured: Capture,
    config: LocateConfig,
    nodes: torch.Tensor,
    weights: torch.Tensor,
    fitting: int,
    measure: bool,
    value_of: Objective,
) -> Searched:
    """Layer by layer: score, take the top k, advance every replay over the block with the path scaled."""
    of_layers, found, totals = _Sums(captured), [], []
    groups, n, depth = of_layers.groups, captured.num_samples, len(config.scored(captured.stack.num_layers))
    steps = min(len(nodes), fitting)
    node_groups, zero_node = make_node_groups(captured, nodes, weights, steps, measure, value_of, depth)

    def scored(group: NodeGroup, act: torch.Tensor) -> tuple[Sums | None, torch.Tensor]:
        with memory.measured(captured, [0] * group.copies):
            return group.score(act, groups, value_of)

    for layer, act in enumerate(captured.activations[:depth]):
        carried = of_layers.zeros(n)
        for group, (part, along_path) in with_oom_halving(node_groups, partial(scored, act=act)):
            carried += group.weights.to(carried) @ along_path
            if part is not None:
                of_layers.add(layer, part)
        s1, s2 = of_layers.of([layer])
        totals.append(s1.sum((1, 2)) + carried)
        found.append(chosen(captured, config, s1, s2, [layer]))
        path_of_rows = found[-1][1][captured.rows.sample, 0]  # [R,k], the neurons that stay scaled
        if zero_node:
            zero_node.advance(act, path_of_rows)
        if layer + 1 < depth:
            for group in node_groups:
                group.advance(act, path_of_rows)
    scores, paths = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return scores, paths, torch.stack(totals), zero_node.values(fitting, value_of) if zero_node else None


class _Sums:
    """(s1, s2) [n,F] of every layer, in the objective's precision; groups: of equally many rows a sample, by which the
    ops sum them, None where they are not equally many."""

    def __init__(self, captured: Capture):
        self._captured, self._parts = captured, defaultdict[int, list[torch.Tensor]](list)
        self._counts = torch.bincount(captured.rows.sample, minlength=captured.num_samples)  # rows are sorted by sample
        self.groups = captured.rows.groups(captured.num_samples)
        self._dtype = torch.float64 if captured.logits.dtype == torch.float64 else torch.float32

    def zeros(self, *size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=self._dtype, device=self._captured.rows.sample.device)

    def add(self, layer: int, part: Sums) -> None:
        new = [one.to(self._dtype) for one in part]
        if not self.groups:
            new = [torch.segment_reduce(one, "sum", lengths=self._counts) for one in new]
        before = self._parts[layer]
        self._parts[layer] = [a + b for a, b in zip(before, new, strict=True)] if before else new

    def of(self, layers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Both [n,L,F]; zero where a layer has no gradient."""
        nothing = self.zeros(self._captured.num_samples, self._captured.stack.num_neurons)
        s1, s2 = zip(*(self._parts.get(layer, (nothing, nothing)) for layer in layers), strict=True)
        return torch.stack(s1, 1), torch.stack(s2, 1)
