"""Whether a call's scores are plain autograd's: asked of its first samples, in one layer at one node.

`plan` compares clean runs: what a family does only away from one, or with several copies, passes there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from mipfast.errors import InputError
from mipfast.model.batch import Batch, Labels, find_labels, read_batch, without_labels
from mipfast.model.positions import Positions
from mipfast.model.sites import Sites, Stack
from mipfast.scoring.capture import Capture, chosen_rows
from mipfast.scoring.memory import halves
from mipfast.scoring.nodes import HookedNodes, NodeGroup, ResidualNodes
from mipfast.scoring.plan import plan
from mipfast.scoring.replay import Replay, repeated

Objective = Callable[[torch.Tensor, Labels], torch.Tensor]  # logits [m·n,q,V], labels -> F [m·n]


def first_samples(model: Any, batch: Batch, positions: Positions) -> tuple[Batch, Positions]:
    """Two samples, or more where it is not known how to divide the batch, and their positions. Raises InputError for
    what cannot be used."""
    batch, _ = read_batch(model, batch)
    with suppress(InputError):
        while len(batch["labels"]) > 2:
            batch = halves(batch, model.config)[0]
    if not isinstance(positions, str) and torch.as_tensor(positions).ndim == 2:
        positions = positions[: len(batch["labels"])]
    return batch, positions


def plain_scores(
    model: Any, sites: Sites, stack: Stack, batch: Batch, positions: Positions, alpha: float, objective: Objective
) -> torch.Tensor:
    """a dF/da [R,F] of the middle layer's neurons at alpha a: the model's own forward and autograd's backward."""
    labels, seen = find_labels(batch), []

    def scale(module: nn.Module, args: tuple) -> tuple:
        flat = args[0].detach().reshape(-1, args[0].shape[-1])
        rows, _ = chosen_rows(model, sites, stack, batch, positions, labels, flat)
        act = flat[rows.index]
        seen.extend([act, (alpha * act).requires_grad_()])
        return (flat.index_put((rows.index,), seen[1]).view_as(args[0]), *args[1:])

    with stack.outputs[stack.num_layers // 2].register_forward_pre_hook(scale), torch.enable_grad():
        logits = model(**without_labels(batch), use_cache=False).logits
        at_labels = logits.gather(1, labels.index.to(logits.device)[..., None].expand(-1, -1, logits.shape[-1]))
        value = objective(at_labels, labels).sum()
    if not value.requires_grad:
        raise InputError(f"a layer of {stack.name} that does not run, or that nothing reads")
    act, leaf = seen
    return act * torch.autograd.grad(value, leaf)[0]


def replayed_scores(captured: Capture, alpha: float, objective: Objective, copies: int) -> torch.Tensor:
    """The same [R,F] as a search computes it, for the first of one or two copies."""
    layer = captured.stack.num_layers // 2
    route, clean = plan(captured, clean_states=True)
    replay, alphas, weights = Replay(route, copies), torch.tensor([alpha, 1.0]), torch.tensor([1.0, 0.0])
    group: NodeGroup = (ResidualNodes if clean else HookedNodes)(replay, alphas[:copies], weights[:copies], carry=False)
    for i, act in enumerate(captured.activations[:layer]):
        if clean:
            replay.push(repeated(clean.states[i], copies), None)
        else:
            group.advance(act, None)
    sums, _ = group.score(captured.activations[layer], None, lambda logits: objective(logits, captured.labels))
    return torch.zeros_like(captured.activations[layer]) if sums is None else sums[0]


def difference(found: torch.Tensor, expected: torch.Tensor, sample: torch.Tensor) -> float:
    """The largest of the samples' ||found - expected|| / ||expected||."""
    each = [sample == i for i in sample.unique()]
    off, norm = (torch.stack([x[own].double().norm() for own in each]) for x in (found - expected, expected))
    return float((off / norm.clamp(min=torch.finfo(norm.dtype).tiny)).max())
