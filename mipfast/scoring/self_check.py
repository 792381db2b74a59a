"""Whether a call's way of scoring gives what plain autograd gives: asked of its first samples, in one layer at one node.

`plan` compares clean runs; what a family does only away from one, or with several copies, would pass there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from mipfast.errors import InputError
from mipfast.model.batch import Batch, Labels, find_labels, without_labels
from mipfast.model.patching import removing
from mipfast.model.positions import Positions
from mipfast.model.sites import Sites, Stack
from mipfast.scoring.capture import Capture, chosen_rows
from mipfast.scoring.memory import halves
from mipfast.scoring.nodes import HookedNodes, NodeGroup, ResidualNodes
from mipfast.scoring.plan import plan
from mipfast.scoring.replay import Replay, repeated

Objective = Callable[[torch.Tensor, Labels], torch.Tensor]  # logits [m·n,q,V] -> F [m·n]


def first_samples(batch: Batch, positions: Positions, config: Any) -> Iterator[tuple[Batch, Positions]]:
    """Two samples of the batch, then one, with their positions; more where it cannot be divided."""
    find_labels(batch)
    try:
        while len(batch["labels"]) > 2:
            batch = halves(batch, config)[0]
        parts = [batch] if len(batch["labels"]) == 1 else [batch, halves(batch, config)[0]]
    except InputError:
        parts = [batch]
    for part in parts:
        own = positions if isinstance(positions, str) else torch.as_tensor(positions)
        yield part, own[: len(part["labels"])] if isinstance(own, torch.Tensor) and own.ndim == 2 else own


def plain_scores(
    model: Any, sites: Sites, stack: Stack, batch: Batch, positions: Positions, alpha: float, objective: Objective
) -> torch.Tensor:
    """a dF/da [R,F] of the middle layer's neurons at alpha a: the model's own forward and autograd's backward, nothing
    else. Empty where the layer does not run."""
    labels, seen = find_labels(batch), [torch.empty(0, requires_grad=True)] * 2

    def scale(module: torch.nn.Module, args: tuple) -> tuple:
        flat = args[0].detach().reshape(-1, args[0].shape[-1])
        rows, _ = chosen_rows(model, sites, stack, batch, positions, labels, flat)
        seen[:] = flat[rows.index], (alpha * flat[rows.index]).requires_grad_()
        return (flat.index_put((rows.index,), seen[1]).view_as(args[0]), *args[1:])

    hook = stack.outputs[stack.num_layers // 2].register_forward_pre_hook(scale)
    with removing(hook), torch.enable_grad():
        logits = model(**without_labels(batch), use_cache=False).logits
        index = labels.index.to(logits.device)
        value = objective(logits[torch.arange(len(index), device=logits.device)[:, None], index], labels)
        grad = None
        if value.requires_grad:
            grad = torch.autograd.grad(value.sum(), seen[1], allow_unused=True)[0]
    return torch.zeros_like(seen[0]) if grad is None else seen[0] * grad


def replayed_scores(captured: Capture, alpha: float, objective: Objective) -> torch.Tensor:
    """The same [R,F] as a search computes it, in the first of two copies."""
    layer, weights = captured.stack.num_layers // 2, torch.tensor([1.0, 0.0])
    route, clean = plan(captured, clean_states=True)
    replay = Replay(route, 2)
    kind = ResidualNodes if clean else HookedNodes
    group: NodeGroup = kind(replay, torch.tensor([alpha, 1.0]), weights, carry=False)
    for i, act in enumerate(captured.activations[:layer]):
        if clean:
            replay.push(repeated(clean.states[i], 2), None)
        else:
            group.advance(act, None)
    sums, _ = group.score(captured.activations[layer], None, lambda logits: objective(logits, captured.labels))
    return torch.zeros_like(captured.activations[layer]) if sums is None else sums[0]


def difference(found: torch.Tensor, expected: torch.Tensor, sample: torch.Tensor) -> float:
    """The largest of the samples' ||found - expected|| / ||expected||."""
    off, norm = (
        torch.zeros(int(sample.max()) + 1, dtype=torch.float64, device=sample.device).index_add_(
            0, sample, x.double().square().sum(1)
        )
        for x in (found - expected, expected)
    )
    return float((off / norm.clamp(min=torch.finfo(torch.float64).tiny)).max().sqrt())
