"""Copies of the batch, one for each node alpha of the quadrature, through the blocks layer by layer: `score`
differentiates at the next block, `advance` goes past it.

The classes differ in how a copy gets past a block; `make_node_groups` chooses. Here gradients are summed over nodes;
which sum is the score is search.py's to say.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any, TypeVar

import torch

from mipfast import ops
from mipfast.scoring.capture import Capture
from mipfast.scoring.plan import plan
from mipfast.scoring.replay import Replay
from mipfast.scoring.staggered import Staggered

log = logging.getLogger("mipfast")
Result = TypeVar("Result")
Sums = tuple[torch.Tensor, torch.Tensor]  # (s1, s2) of ops.riemann_accumulate
Objective = Callable[[torch.Tensor], torch.Tensor]  # logits [m·n,q,V] -> F [m·n]


def make_node_groups(
    captured: Capture,
    nodes: torch.Tensor,
    weights: torch.Tensor,
    steps: int,
    measure: bool,
    value_of: Objective,
    depth: int,
) -> tuple[list[NodeGroup], ZeroNode | None]:
    """(the quadrature's nodes in groups of at most `steps` copies, the node at zero that completeness needs, if it is
    to be measured), for the first `depth` layers.

    Where blocks only add their FFN's output, alpha = 1 is the clean run of every layer: one pass serves all."""
    unit = nodes == 1
    route, clean = plan(captured, clean_states=bool(unit.any()))
    kind = ResidualNodes if clean else HookedNodes
    node_groups: list[NodeGroup] = []
    scaled = torch.ones_like(nodes, dtype=torch.bool)
    if clean and bool(unit.any()):
        scaled = ~unit
        gradients, taps = Replay(route, 1).clean_gradients(value_of, range(depth))
        node_groups.append(
            CleanNode(Replay(route, 1), nodes[unit], weights[unit], measure, clean.states, gradients, taps)
        )
    for alphas, w in zip(nodes[scaled].split(steps), weights[scaled].split(steps), strict=True):
        if len(alphas):
            node_groups.append(kind(Replay(route, len(alphas)), alphas, w, measure))
    zero = torch.zeros(1)
    return node_groups, ZeroNode(kind(Replay(route, 1), zero, zero, carry=False)) if measure else None


def with_oom_halving(node_groups: list[Any], work: Callable[[Any], Result]) -> Iterator[tuple[Any, Result]]:
    """work(group) of every NodeGroup or Wave. One that runs out of memory is replaced in the list by its halves, where
    it stands. Raises torch.OutOfMemoryError where a single copy does."""
    i = 0
    while i < len(node_groups):
        group = node_groups[i]
        try:
            result = work(group)
        except torch.OutOfMemoryError:
            if group.copies == 1:
                raise
        else:
            yield group, result
            i += 1
            continue
        # outside `except`: while the exception is alive, its traceback keeps the tensors in memory
        node_groups[i : i + 1] = group.halves()
        log.warning("out of memory: going on with %d of %d copies", node_groups[i].copies, group.copies)


class NodeGroup:
    """Some nodes of the quadrature on their way through the layers; with carry also d state / d alpha."""

    def __init__(self, replay: Replay, alphas: torch.Tensor, weights: torch.Tensor, carry: bool):
        device = replay.capture.rows.index.device  # once, not per layer: a copy to a GPU waits for it
        self.replay, self.alphas, self.weights, self.carry = replay, alphas.to(device), weights.to(device), carry

    @property
    def copies(self) -> int:
        return self.replay.copies

    def halves(self) -> list[NodeGroup]:
        """The same nodes in two groups."""
        middle, parts = len(self.alphas) // 2, []
        for start, stop in ((0, middle), (middle, len(self.alphas))):
            part = copy(self)
            part.replay = self.replay.part(start, stop)
            part.alphas, part.weights = self.alphas[start:stop], self.weights[start:stop]
            parts.append(part)
        return parts

    def score(self, act: torch.Tensor, groups: int | None, value_of: Objective) -> tuple[Sums | None, torch.Tensor]:
        """The next block's (s1, s2), None without gradient, and dF/d alpha through the path's earlier neurons [m,n]."""
        raise NotImplementedError

    def baseline_output(self) -> torch.Tensor:
        """The next block's output with its neurons at their baseline."""
        return self.replay.baseline_output(carry=False)[0]

    def advance(self, act: torch.Tensor, path: torch.Tensor | None) -> None:
        """Past the next block: clean activations, the path's [R,k] entries times alpha."""
        raise NotImplementedError

    def _of_all(self, rows: torch.Tensor) -> torch.Tensor:
        """[m,R,...]: of every copy, what is the same at every alpha."""
        return rows.expand(self.replay.copies, *rows.shape)

    def _moving(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """States that depend on alpha through the path, as leaves, and their tangents."""
        pairs = zip(self.replay.states, self.replay.tangents, strict=True)
        return [(state.requires_grad_(), tangent) for state, tangent in pairs if tangent is not None]

    def _along(
        self, gradients: Sequence[torch.Tensor | None], tangents: Sequence[torch.Tensor], like: torch.Tensor
    ) -> torch.Tensor:
        like = like.to(torch.promote_types(like.dtype, torch.float32))
        total = like.new_zeros(self.replay.copies, self.replay.capture.num_samples)
        for gradient, tangent in zip(gradients, tangents, strict=True):
            if gradient is not None:
                total += self.replay.per_sample(gradient.to(like) * tangent.to(like))
        return total


class HookedNodes(NodeGroup):
    """The native way: the block runs with its FFN's inner activations overwritten, and is differentiated."""

    def score(self, act: torch.Tensor, groups: int | None, value_of: Objective) -> tuple[Sums | None, torch.Tensor]:
        grad, along = self.gradients(act, value_of)
        return (None if grad is None else self._summed(grad, act, groups)), along

    def gradients(self, act: torch.Tensor, value_of: Objective) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(dF/da of the next block [m,R,F] or None, dF along the carried tangents [m,n])."""
        leaf = self._scaled(act, None).requires_grad_()
        moving = self._moving()
        with torch.enable_grad():
            value = value_of(self.replay.run(leaf))
            grad, *state_grads = gradients_of(value, [leaf, *(state for state, _ in moving)])
        return grad, self._along(state_grads, [tangent for _, tangent in moving], value)

    def advance(self, act: torch.Tensor, path: torch.Tensor | None) -> None:
        if path is None:
            self.replay.advance(self._of_all(act), None)
            return
        tangent = self._of_all(_on_path(act, path)).contiguous() if self.carry else None
        self.replay.advance(self._scaled(act, path), tangent)

    def _scaled(self, act: torch.Tensor, path: torch.Tensor | None) -> torch.Tensor:
        """[m,R,F]: the path's activations, or all, times alpha."""
        return ops.riemann_interpolate(act, self.alphas.to(act.device), neurons=path)

    def _summed(self, grad: torch.Tensor, act: torch.Tensor, groups: int | None) -> Sums:
        return ops.riemann_accumulate(grad, self.weights.to(act.device), act=act, groups=groups)


class ResidualNodes(NodeGroup):
    """Where blocks add their FFN's output: the block runs once, its neurons at their baseline, and alpha W a is added
    to its output."""

    def score(self, act: torch.Tensor, groups: int | None, value_of: Objective) -> tuple[Sums | None, torch.Tensor]:
        state = self.replay.add_rows(self.baseline_output(), self._contributed(act, None)).requires_grad_()
        earlier = self._moving()
        with torch.enable_grad():
            self.replay.push(state, None)
            try:
                value = value_of(self.replay.run())
            finally:  # out of memory, its halves go on from here
                self.replay.drop()
            grad, *state_grads = gradients_of(value, [state, *(s for s, _ in earlier)])
        tangents = [tangent for _, tangent in earlier]
        if self._d_output is not None:
            state_grads, tangents = [grad, *state_grads], [self._d_output, *tangents]
        along = self._along(state_grads, tangents, value)
        if grad is None:
            return None, along
        return self._summed(self.replay.at_rows(grad), act, groups), along

    def baseline_output(self) -> torch.Tensor:
        self._output, self._d_output = self.replay.baseline_output(carry=self._carries())
        return self._output

    def advance(self, act: torch.Tensor, path: torch.Tensor | None) -> None:
        assert path is not None  # a joint search without a path has HookedNodes
        state = self.replay.add_rows(self._output, self._contributed(act, path))
        self.replay.push(state, self._tangent(act, path))

    def _contributed(self, act: torch.Tensor, path: torch.Tensor | None) -> torch.Tensor:
        """[m,R,H]: what the next block's neurons add to its output, the path's of them, or all, at alpha."""
        return ops.riemann_project(act, self._weight(), self.alphas.to(act.device), neurons=path)

    def _carries(self) -> bool:
        return any(tangent is not None for tangent in self.replay.tangents)

    def _tangent(self, act: torch.Tensor, path: torch.Tensor) -> torch.Tensor | None:
        """d output / d alpha: what the earlier path moves, and this block's path neurons."""
        if not self.carry:
            return None
        own = self._of_all(_on_path(act, path) @ self._weight().T)
        return self.replay.add_rows(torch.zeros_like(self._output) if self._d_output is None else self._d_output, own)

    def _summed(self, grad: torch.Tensor, act: torch.Tensor, groups: int | None) -> Sums:
        return ops.project_accumulate(grad, self._weight(), self.weights.to(act.device), act=act, groups=groups)

    def _weight(self) -> torch.Tensor:
        return self.replay.capture.stack.outputs[len(self.replay.states)].weight


class CleanNode(ResidualNodes):
    """The node alpha = 1: states and gradients of every block come from one pass; only tangents are carried."""

    def __init__(
        self,
        replay: Replay,
        alphas: torch.Tensor,
        weights: torch.Tensor,
        carry: bool,
        states: list[torch.Tensor],
        gradients: list[torch.Tensor | None],
        taps: list[torch.Tensor | None],
    ):
        super().__init__(replay, alphas, weights, carry)
        self._states, self._gradients, self._taps = states, gradients, taps

    def score(self, act: torch.Tensor, groups: int | None, value_of: Objective) -> tuple[Sums | None, torch.Tensor]:
        layer = len(self.replay.states)
        self._output, self._d_output = self._states[layer], None
        if self._carries():
            self._d_output = self.replay.baseline_output(carry=True)[1]
        grad = self._gradients[layer]
        pairs = zip([*self._taps[:layer], grad], [*self.replay.tangents, self._d_output], strict=True)
        moved = [(g, tangent) for g, tangent in pairs if tangent is not None]
        along = self._along([g for g, _ in moved], [tangent for _, tangent in moved], act)
        return (None if grad is None else self._summed(self.replay.at_rows(grad), act, groups)), along

    def advance(self, act: torch.Tensor, path: torch.Tensor | None) -> None:
        assert path is not None
        self.replay.push(self._output, self._tangent(act, path))


class ZeroNode:
    """The node alpha = 0, where a layer's completeness begins: F with its neurons at their baseline. No score waits
    for it, so it is computed when the path is known, several layers in one pass."""

    def __init__(self, group: NodeGroup):
        self._group = group
        self._starts: list[torch.Tensor] = []

    def advance(self, act: torch.Tensor, path: torch.Tensor | None) -> None:
        """Past the next block, as `NodeGroup.advance` does."""
        self._starts.append(self._group.baseline_output())
        self._group.advance(act, path)

    def values(self, copies: int, value_of: Objective) -> torch.Tensor:
        """F [L,n] with each layer at its baseline, up to copies of them in one pass."""
        return staggered_values(self._group.replay, dict(enumerate(self._starts)), copies, value_of)


def staggered_values(
    clean: Replay, starts: Mapping[int, torch.Tensor], copies: int, value_of: Objective
) -> torch.Tensor:
    """F [L,n] of a copy that leaves `clean` at each of L blocks, ascending, with its start, up to copies of them in one
    pass."""
    layers = list(starts)
    with torch.no_grad():
        parts = [layers[i : i + copies] for i in range(0, len(layers), copies)]
        spans = [range(part[0], part[-1] + 1) for part in parts]
        waves = [Staggered(clean, span, [layer in starts for layer in span]) for span in spans]
        passes = [wave.logits(starts.__getitem__) for wave in waves]
        return torch.cat([value_of(logits).view(-1, clean.capture.num_samples) for logits in passes])


def gradients_of(value: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """d value.sum() / d input; None for an input that value does not depend on."""
    if not value.requires_grad:
        return [None] * len(inputs)
    return list(torch.autograd.grad(value.sum(), inputs, allow_unused=True))


def _on_path(act: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
    """The activations [R,F] of the path's neurons, zero elsewhere: d (scaled activations) / d alpha."""
    return act - ops.riemann_interpolate(act, act.new_zeros(1), neurons=path)[0]
