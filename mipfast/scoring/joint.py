"""Joint scores, a product of sums: NeuronPath's, and what the released code of MIP-Editor makes of them.

    score_l(j) = (G_l(j) + C_l) * (a_l(j) + A_l)
    G_l(j)     = sum_k w_k dF_k/da_l(j)
    C_l, A_l   = the same gradient, and the activation, summed over the entering path neurons of the layers before l

NeuronPath: all path neurons enter. Released text code: only the last of each layer, and the score is divided by m. The
path's neurons are scaled by alpha in both. Released vision code: see `released_vision`.
"""

from __future__ import annotations

from functools import partial

import torch

from mipfast import ops
from mipfast.errors import InputError
from mipfast.scoring.attribution import strongest
from mipfast.scoring.capture import Capture
from mipfast.scoring.nodes import HookedNodes, NodeGroup, Objective, with_oom_halving
from mipfast.scoring.replay import Replay

Scored = tuple[torch.Tensor, torch.Tensor]  # scores [n,L,F], path [n,L,k]


def joint_search(
    captured: Capture,
    nodes: tuple[torch.Tensor, ...],
    weights: tuple[torch.Tensor, ...],
    objective: Objective,
    top_k: int,
    depth: int,
    greedy: bool = True,
    released: bool = False,
) -> Scored:
    """NeuronPath's joint score, or with released=True the released text code's. nodes, weights: the quadrature, cut
    into what one replay may hold. depth: how many layers are scored, from the first on.

    C_l is the derivative of F along one direction: 1 on every entering neuron. That direction is carried forward
    with the states, so the backward pass still ends at block l.

    Raises InputError where a sample has more than one position, DivergedError for non-finite scores."""
    _one_position(captured)
    node_groups: list[NodeGroup] = [
        HookedNodes(Replay(captured, len(alphas)), alphas, w, carry=greedy)
        for alphas, w in zip(nodes, weights, strict=True)
    ]
    acts = [_wide(act) for act in captured.activations[:depth]]
    entered = torch.zeros_like(acts[0][:, 0])
    scores, paths = [], []
    for layer, wide in enumerate(acts):
        act = captured.activations[layer]
        gradient, carried, has_gradient = torch.zeros_like(wide), torch.zeros_like(entered), False
        for group, (own, along_path) in with_oom_halving(
            node_groups, partial(HookedNodes.gradients, act=act, value_of=objective)
        ):
            carried += group.weights.to(carried) @ along_path
            if own is not None:
                has_gradient = True
                gradient += ops.riemann_accumulate(own, group.weights.to(act.device))[0]
        score = (gradient + carried[:, None]) * (wide + entered[:, None])
        if released:
            score = score / sum(map(len, nodes))
        path = strongest(score[:, None], top_k, captured.stack.name, [layer], act.dtype)[:, 0]
        dead = ((gradient + carried[:, None]) == 0).all(1) if has_gradient else torch.ones_like(carried).bool()
        score, path = score.masked_fill(dead[:, None], 0), path.masked_fill(dead[:, None], -1)
        scores.append(score)
        paths.append(path)
        if layer + 1 == depth:
            break
        if not greedy:
            for group in node_groups:
                group.advance(act, None)
            continue
        ones = torch.ones_like(act)
        entering = ones - ops.riemann_interpolate(ones, act.new_zeros(1), neurons=path[:, -1:] if released else path)[0]
        entered += (entering * wide).sum(1)
        for group in node_groups:
            values = ops.riemann_interpolate(act, group.alphas.to(act.device), neurons=path)
            group.replay.advance(values, entering.expand_as(values))
    return torch.stack(scores, 1).float().cpu(), torch.stack(paths, 1).cpu()


def released_vision(captured: Capture, n_steps: int, top_k: int) -> Scored:
    """What the released vision code computes, from the clean activations alone.

    It squares the z-score of each neuron's gradient over the m steps and then sums over these same steps. The sum of m
    squared z-scores is m - 1 whatever the gradients are (0 where they are all equal), so what remains is

        score_l(j) = (m - 1) * (l + 1) * (a_l(j) + sum_{l'<l} a_l'(b_l')) / m,      b the last path neuron of a layer

    Raises InputError where a sample has more than one position."""
    _one_position(captured)
    entered = torch.zeros_like(_wide(captured.activations[0][:, 0]))
    scores, paths = [], []
    for layer, act in enumerate(map(_wide, captured.activations)):
        scores.append((n_steps - 1) * (layer + 1) * (act + entered[:, None]) / n_steps)
        paths.append(strongest(scores[-1][:, None], top_k, captured.stack.name, [layer], act.dtype)[:, 0])
        entered = entered + act.gather(1, paths[-1][:, -1:])[:, 0]
    return torch.stack(scores, 1).float().cpu(), torch.stack(paths, 1).cpu()


def _one_position(captured: Capture) -> None:
    n, rows = captured.num_samples, captured.rows
    if len(rows.sample) != n or rows.groups(n) is None:
        raise InputError(
            f"joint scores multiply one activation per neuron, found {len(rows.sample)} positions in {n} samples; "
            "choose positions='last_prompt' or 'first', or combine='sum'"
        )


def _wide(act: torch.Tensor) -> torch.Tensor:
    return act if act.dtype == torch.float64 else act.float()
