"""What trains while everything else stands still, and the loop that every gradient method shares."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from tqdm.auto import tqdm

from mipfast.edit.prune import Slice
from mipfast.errors import DivergedError, InputError
from mipfast.model import families
from mipfast.model.batch import Batch, check_many
from mipfast.model.patching import frozen_eval
from mipfast.model.weights import check_weights

log = logging.getLogger("mipfast")


class Losses(NamedTuple):
    """A step's loss, or one term of it. loss: weighted, what goes backward. forget, retain: the unweighted losses in
    it; None where it has none."""

    loss: torch.Tensor
    forget: torch.Tensor | None = None
    retain: torch.Tensor | None = None


Trainable = dict[str, Sequence[Slice | torch.Tensor]]


class Leaf:
    """A whole parameter as the optimiser sees it: itself, or a float32 master where it is of half precision."""

    def __init__(self, name: str, parameter: torch.Tensor):
        self.name, self.parameter = name, parameter
        self.tensor, self.hook = parameter, None
        if parameter.dtype not in (torch.float32, torch.float64):
            self.tensor = nn.Parameter(parameter.detach().float())
            self.hook = parameter.register_post_accumulate_grad_hook(self._collect)

    def _collect(self, parameter: torch.Tensor) -> None:
        grad = cast(torch.Tensor, parameter.grad).float()
        self.tensor.grad = grad if self.tensor.grad is None else self.tensor.grad + grad
        parameter.grad = None

    def write(self) -> None:
        """Put what was learned into the model."""
        if self.hook:
            self.parameter.data.copy_(self.tensor.detach())
        torch.clear_autocast_cache()  # inside the caller's autocast, casts of the old values

    def remove(self) -> None:
        if self.hook:
            self.hook.remove()


class SliceLeaf:
    """A slice of a projection's weight or bias, in float32 at least. The weight itself gets no gradient: a hook on the
    projection computes the slice's alone, a share k/F of the work and memory."""

    def __init__(self, name: str, part: Slice, projection: nn.Module):
        self.name, self.part = name, part
        if not isinstance(projection, nn.Linear) and type(projection).__name__ not in families.TRANSPOSED:
            raise InputError(f"{name}: slices of a {type(projection).__name__} cannot be trained; expected nn.Linear")
        values = part.read()
        self.tensor = nn.Parameter(values if values.dtype == torch.float64 else values.float())
        transposed = not isinstance(projection, nn.Linear)
        self.kind = (
            "bias" if part.parameter.ndim == 1 else "outputs" if (part.dim == 0) != transposed else "inputs",
            transposed,
        )
        self.hook = projection.register_forward_hook(self._forward)

    def _forward(self, projection: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return output
        return cast(torch.Tensor, _SliceGradient.apply(output, args[0], self.tensor, self.part.index, *self.kind))

    def write(self) -> None:
        self.part.write(self.tensor.detach())

    def remove(self) -> None:
        self.hook.remove()


class _SliceGradient(torch.autograd.Function):
    """The identity on a projection's output; its backward gives the slice the gradient that autograd would have given
    to this part of the whole weight."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        x: torch.Tensor,
        leaf: torch.Tensor,
        index: torch.Tensor,
        part: str,
        transposed: bool,
    ) -> torch.Tensor:
        kept = x[..., index] if part == "inputs" else x if part == "outputs" else None
        ctx.save_for_backward(index, kept)
        ctx.part, ctx.transposed, ctx.dtype = part, transposed, leaf.dtype
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
        index, x = ctx.saved_tensors
        rows = grad_output.flatten(0, -2)
        rows = rows if ctx.part == "inputs" else rows[:, index]
        if ctx.part == "bias":
            grad = rows.sum(0)
        else:
            grad = rows.T @ x.flatten(0, -2).to(rows.dtype)
        grad = grad.T if ctx.transposed and ctx.part != "bias" else grad
        return grad_output, None, grad.to(ctx.dtype), None, None, None


Leaves = list[Leaf | SliceLeaf]


@contextmanager
def training(model: nn.Module, trainable: Trainable) -> Iterator[Leaves]:
    """The leaves of what is to train, in eval mode (no dropout) and nothing else trainable; undone on the way out.

    After an error or an interruption the weights are given back, bit for bit: what trains is kept on the CPU meanwhile.
    Raises ModelError for weights that training would not reach."""
    names = {id(p): name for name, p in model.named_parameters()}
    parts = [(key, part) for key, some in trainable.items() for part in some]
    weights = [(key, part.parameter if isinstance(part, Slice) else part) for key, part in parts]
    check_weights((names.get(id(weight), key), weight) for key, weight in weights)
    whole = [part for _, part in parts if not isinstance(part, Slice)]
    before = [(part.read() if isinstance(part, Slice) else part.detach()).to("cpu", copy=True) for _, part in parts]
    with frozen_eval(model, whole):
        leaves = make_leaves(model, trainable)
        try:
            yield leaves
        except BaseException:
            for (_, part), values in zip(parts, before, strict=True):
                if isinstance(part, Slice):
                    part.write(values)
                else:
                    part.data.copy_(values)
            torch.clear_autocast_cache()
            raise
        finally:
            for leaf in leaves:
                leaf.remove()


def make_leaves(model: nn.Module, trainable: Trainable) -> Leaves:
    owner = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    return [
        SliceLeaf(name, part, owner[id(part.parameter)]) if isinstance(part, Slice) else Leaf(name, part)
        for name, parts in trainable.items()
        for part in parts
    ]


def order(seed: int, counts: Iterable[int], steps: int) -> list[list[int]]:
    """For every count a list of `steps` batch numbers below it, one a step: shuffled epochs, one after the other."""
    rng = random.Random(seed)
    return [[i for _ in range(-(-steps // count)) for i in rng.sample(range(count), count)][:steps] for count in counts]


def take_batches(forget: Iterable[Batch], retain: Iterable[Batch]) -> tuple[Sequence[Batch], Sequence[Batch]]:
    """A sequence is kept: it may make its batches when asked for them. Raises InputError where there is none of
    either, or one batch in the place of many."""
    for name, batches in (("forget", forget), ("retain", retain)):
        check_many(name, batches)
    forget, retain = (batches if isinstance(batches, Sequence) else list(batches) for batches in (forget, retain))
    if not forget or not retain:
        raise InputError(f"{len(forget)} forget and {len(retain)} retain batches; expected at least one each")
    return forget, retain


def descend(
    leaves: Leaves,
    terms_of: Callable[[Any], Iterable[Losses]],
    steps: Sequence[Any],
    lr: float,
    epoch: int,
    name: str,
    progress: bool = False,
) -> dict[str, Any]:
    """One Adam step without weight decay for every step, on the sum of terms_of(step); each term goes backward before
    the next is computed, so that only one holds a graph. Returns the report of the run.

    epoch: after so many steps some leaf must have got a gradient (a shorter run only warns). Raises InputError where
    none did, DivergedError for a loss that is not finite."""
    started = time.monotonic()
    names = list(dict.fromkeys(leaf.name for leaf in leaves))
    optimizer = torch.optim.Adam([leaf.tensor for leaf in leaves], lr=lr)
    seen: dict[str, list[float]] = {"forget": [], "retain": []}
    moving: set[str] = set()
    for done, step in enumerate(tqdm(steps, desc=name, disable=not progress)):
        for term in terms_of(step):
            if not bool(term.loss.isfinite()):
                advice = f"lower lr ({lr})" if done else "check the model's weights and dtype, and the target's length"
                raise DivergedError(f"the loss of step {done} of {name} is {term.loss.item()}; {advice}")
            if term.loss.requires_grad:  # a vision path and a batch of text: no trained parameter is in this graph
                term.loss.backward()
            for part, values in seen.items():
                if (value := getattr(term, part)) is not None:
                    values.append(value.item())
        moving |= {leaf.name for leaf in leaves if leaf.name not in moving and _has_gradient(leaf.tensor)}
        if done + 1 == epoch and not moving:
            raise InputError(
                f"no gradient reaches {', '.join(names)}: gate and up rows of pruned neurons get none "
                "unless their output columns train too, and a vision tower needs batches with pixel_values"
            )
        optimizer.step()
        optimizer.zero_grad()
        for leaf in leaves:
            leaf.write()
    idle = sorted(set(names) - moving)
    if idle:
        log.warning("no gradient ever reached %s", ", ".join(idle))
    return {
        "steps": len(steps),
        "trained": {one: sum(t.tensor.numel() for t in leaves if t.name == one) for one in names},
        "without_gradient": idle,
        "forget_loss": seen["forget"],
        "retain_loss": seen["retain"],
        "seconds": time.monotonic() - started,
    }


def _has_gradient(tensor: torch.Tensor) -> bool:
    return tensor.grad is not None and bool(tensor.grad.any())
