"""Adaptive Simpson quadrature on [0, 1] of integrands that are vectors, with an estimate of its error.

A mesh divides [0, 1] into panels by halving, each with five nodes at quarters of its width. Its integral is Simpson's
on both halves with one Richardson step, which is Boole's rule; its error is told from the difference between Simpson's
on the halves and on the whole. Where that is too large the panel is halved, and every node serves again.
"""

from __future__ import annotations

from functools import lru_cache
from heapq import heapify, heappop, heappush

import numpy as np
import torch

Panel = tuple[float, float]  # (start, stop)
Mesh = tuple[Panel, ...]  # ascending

WHOLE: Mesh = ((0.0, 1.0),)
# Before any panel: nodes at 0, 1/4, 3/4 and 1, a rule of degree three with a quarter of Simpson's error on three nodes.
# Its error is told from the difference to the mean of the two inner ones.
COARSE: Mesh = ()
_COARSE_NODES, _COARSE_WEIGHTS = [0.0, 0.25, 0.75, 1.0], np.array([1, 8, 8, 1]) / 18
_ENDS = (0, *(i / 128 for i in (1, 2, 3, 4, 6, 8, 16, 24, 32, 48, 64)), 1)
# Where the FFN's output dwarfs the state below it, as in the first block, the integrand peaks next to 0. Of three
# language models that block asks for these 49 nodes, some fewer, or up to 50 more.
GRADED: Mesh = tuple(zip(map(float, _ENDS), map(float, _ENDS[1:]), strict=False))
# An error over the difference between Simpson's on halves and on the whole: .15 in the median panel of three language
# models, .4 in one of twenty; half holds for sums over panels too.
SAFETY = 0.5


def nodes_of(mesh: Mesh) -> list[float]:
    """Ascending."""
    if mesh == COARSE:
        return _COARSE_NODES
    return sorted({start + (stop - start) * quarter / 4 for start, stop in mesh for quarter in range(5)})


@lru_cache(maxsize=4096)
def _rules(mesh: Mesh) -> tuple[torch.Tensor, torch.Tensor, list[Panel]]:
    """(the integral's weights [m] of the mesh's nodes; differences [panels,m] between Simpson's on a panel's halves and
    on the whole; the panels: the mesh's, and all that were halved on the way to it)."""
    if mesh == COARSE:
        return torch.tensor(_COARSE_WEIGHTS), torch.tensor(_COARSE_WEIGHTS - [0, 0.5, 0.5, 0])[None], []
    place = {node: i for i, node in enumerate(nodes_of(mesh))}
    panels = [*mesh, *sorted(_halved(mesh))]
    weights, differences = np.zeros(len(place)), np.zeros((len(panels), len(place)))
    for row, (start, stop) in enumerate(panels):
        width = stop - start
        at = [place[start + width * quarter / 4] for quarter in range(5)]
        differences[row, at] = width / 12 * np.array([-1, 4, -6, 4, -1])
        if row < len(mesh):
            weights[at] += width / 90 * np.array([7, 32, 12, 32, 7])
    return torch.tensor(weights), torch.tensor(differences), panels


def _halved(mesh: Mesh) -> set[Panel]:
    """The panels that contain more than one of the mesh's."""
    found, level = set(), set(mesh)
    while level:
        level = {parent(panel) for panel in level if panel != WHOLE[0]}
        found |= level
    return found


def parent(panel: Panel) -> Panel:
    """What a panel is a half of."""
    width = panel[1] - panel[0]
    start = panel[0] - width if int(panel[0] / width) % 2 else panel[0]
    return (start, start + 2 * width)


def integral(values: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Of values [m,...] at the mesh's nodes."""
    return torch.tensordot(_rules(mesh)[0].to(values), values, 1)


def errors(values: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Estimates [panels] of the 2-norm of the integral's error on every panel of the mesh, and on those that were
    halved, as if they had not been; of values [m,F] at its nodes."""
    return SAFETY * (_rules(mesh)[1].to(values) @ values).norm(dim=1)


def error(of_panels: list[float], mesh: Mesh) -> float:
    """The whole integral's, from those of the mesh's panels, which come first."""
    return float(np.linalg.norm(of_panels[: max(1, len(mesh))]))


def refined(of_panels: list[float], mesh: Mesh, max_nodes: int) -> Mesh:
    """The mesh with those panels halved whose error is at least half of the largest, worst first, as long as it has no
    more than max_nodes."""
    worst, count = max(of_panels[: len(mesh)]), len(nodes_of(mesh))
    found = set(mesh)
    for size, panel in sorted(zip(of_panels, mesh, strict=False), reverse=True):
        if size < worst / 2 or count + 4 > max_nodes:
            break
        middle, count = (panel[0] + panel[1]) / 2, count + 4
        found = found - {panel} | {(panel[0], middle), (middle, panel[1])}
    return tuple(sorted(found))


def refined_to(of_panels: list[float], mesh: Mesh, max_nodes: int, bound: float) -> Mesh:
    """The mesh with its worst panels halved until the error would be no more than bound, were a half's an eighth of its
    panel's, as long as it has no more than max_nodes. In fewer rounds than `refined`, for a wave reads all weights."""
    if mesh == COARSE:  # whose first panel has about half of its error
        mesh, of_panels = WHOLE, [of_panels[0] / 2]
    queue, count = [(-size, panel) for size, panel in zip(of_panels, mesh, strict=False)], len(nodes_of(mesh))
    heapify(queue)
    squares = sum(size**2 for size, _ in queue)
    while squares > bound**2 and count + 4 <= max_nodes:
        size, panel = heappop(queue)
        squares += (2 / 64 - 1) * size**2
        for half in _halves(panel):
            heappush(queue, (size / 8, half))
        count += 4
    return tuple(sorted(panel for _, panel in queue))


def coarsened(of_panels: list[float], mesh: Mesh, bound: float) -> Mesh:
    """The mesh with halves put together again, those of the smallest error first, as long as the error is no more than
    bound."""
    of = dict(zip(_rules(mesh)[2], of_panels, strict=True))
    found, squares = set(mesh), error(of_panels, mesh) ** 2
    while True:
        twins = {parent(panel) for panel in found if panel != WHOLE[0]}
        whole = [(of[p], p) for p in twins if all(half in found for half in _halves(p))]
        if not whole:
            break
        size, panel = min(whole)
        squares += size**2 - sum(of[half] ** 2 for half in _halves(panel))
        if squares > bound**2:
            break
        found = found - set(_halves(panel)) | {panel}
    return tuple(sorted(found))


def _halves(panel: Panel) -> tuple[Panel, Panel]:
    middle = (panel[0] + panel[1]) / 2
    return (panel[0], middle), (middle, panel[1])
