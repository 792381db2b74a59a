"""What the paper's released code computes, done the plain way: the baseline of the end-to-end bench.

One sample at a time. For every layer m copies of it go through the whole model, forward and backward, with the logits
of every token; parameters keep their gradients, as nothing in the released code freezes them. `frozen=True` is the same
with frozen parameters. Llama and Qwen2.5-VL, in eval mode; parameters' .grad is cleared.

Copy i of the sample, at token 0 (vision: row 0 of the tower's window order) and nowhere else, alpha_i = i / m:
layer l holds alpha_i * a_l, layers before l the clean a with their path neurons times alpha_i. b is the last, weakest
neuron of an earlier layer's path: a loop there overwrites its variable, so only this one enters the score.

    loss  = mean cross-entropy over copies and labels             g^i = dloss/da^i
    score = (sum_i g_l^i(j) + sum_{l'<l} sum_i g_l'^i(b)) * (a_l(j) / m + sum_{l'<l} a_l'(b) / m)

Vision replaces g by the square of its z-score over the m copies.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = dict[str, Tensor]
Scores = tuple[Tensor, Tensor]  # [L,F] and the path [L,k], strongest first


def released_igi(model: Any, batch: Batch, steps: int = 4, top_k: int = 5, frozen: bool = False) -> Scores:
    """The text stack of one sample; batch is what model(**batch) takes, with labels."""
    projections = [block.mlp.down_proj for block in model.get_decoder().layers]
    return _search(model, projections, batch, steps, top_k, lambda grad: grad, frozen)


def released_ifi(model: Any, batch: Batch, steps: int = 4, top_k: int = 5, frozen: bool = False) -> Scores:
    """The vision tower of one sample.

    The released code repeats patches where it means to repeat images, and reads gradients at other rows than those it
    overwrites. Here images are repeated and the overwritten rows read; through the z-score both give the same scores.
    """
    projections = [block.mlp.down_proj for block in model.base_model.visual.blocks]
    return _search(model, projections, batch, steps, top_k, _squared_zscore, frozen)


def _squared_zscore(grad: Tensor) -> Tensor:
    std = grad.std(0)
    return torch.where(std > 0, (grad - grad.mean(0)) / std, 0).square()


def _search(
    model: Any,
    projections: list[nn.Module],
    batch: Batch,
    steps: int,
    top_k: int,
    importance: Callable[[Tensor], Tensor],
    frozen: bool,
) -> Scores:
    clean = _clean_activations(model, projections, batch)
    copies = {name: _tile(value, steps) for name, value in batch.items()}
    alphas = torch.arange(steps).to(clean[0])[:, None] / steps
    scores: list[Tensor] = []
    path: list[Tensor] = []
    for layer, act in enumerate(clean):
        values = []
        for earlier, chosen in zip(clean, path, strict=False):
            scaled = earlier.repeat(steps, 1)
            scaled[:, chosen] *= alphas
            values.append(scaled)
        values.append(alphas * act)
        *before, own = map(importance, _gradients(model, projections, copies, values, frozen))

        gradient, activation = own.sum(0), act / steps
        for grad, earlier, chosen in zip(before, clean, path, strict=False):
            last = chosen[-1]
            gradient = gradient + grad[:, last].sum()
            activation = activation + earlier[last] / steps
        scores.append(gradient * activation)
        path.append(scores[layer].topk(top_k).indices)
    return torch.stack(scores), torch.stack(path)


@torch.no_grad()
def _clean_activations(model: Any, projections: list[nn.Module], batch: Batch) -> list[Tensor]:
    """Every projection's input [F] at token 0."""
    acts: list[Tensor] = []
    handles = [
        projection.register_forward_pre_hook(lambda _, args: acts.append(args[0].flatten(0, -2)[0].clone()))
        for projection in projections
    ]
    try:
        _loss(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return acts


def _gradients(
    model: Any, projections: list[nn.Module], batch: Batch, values: list[Tensor], frozen: bool
) -> list[Tensor]:
    """d loss / d value for values [m,F] written over token 0 of the first projections' inputs."""

    def overwrite(value: Tensor) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor]) -> Tensor:
            tokens = args[0].reshape(len(value), -1, args[0].shape[-1]).clone()
            tokens[:, 0] = value
            return tokens.view_as(args[0])

        return hook

    leaves = [value.requires_grad_() for value in values]
    handles = [
        projection.register_forward_pre_hook(overwrite(leaf))
        for projection, leaf in zip(projections, leaves, strict=False)
    ]
    try:
        if frozen:
            with _frozen(model):
                return list(torch.autograd.grad(_loss(model, batch), leaves))
        _loss(model, batch).backward()
        model.zero_grad()
        return [leaf.grad for leaf in leaves]  # type: ignore[misc]
    finally:
        for handle in handles:
            handle.remove()


def _loss(model: Any, batch: Batch) -> Tensor:
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    following = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return F.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=-100)


def _tile(value: Tensor, times: int) -> Tensor:
    """Qwen's position ids [3,1,S] have their samples in the middle; image patches [patches,...] follow each other."""
    if value.ndim == 3 and value.shape[:2] == (3, 1):
        return value.repeat(1, times, 1)
    return value.repeat(times, *[1] * (value.ndim - 1))


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
