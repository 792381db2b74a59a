"""RMisU, representation misdirection: push forget-set hidden states to a random direction, hold the retain set's where
they were, and train only what belongs to the path. MIP-Editor (arXiv 2511.06793) section 3.3.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from mipfast import ops
from mipfast.edit.config import RMisUConfig
from mipfast.edit.hidden import hidden_states
from mipfast.edit.lora import adapter_slices, add_adapter, remove_adapter
from mipfast.edit.prune import Neurons, active_prunes, check_neurons, neuron_slices
from mipfast.edit.steering import find_target
from mipfast.edit.train import Losses, Trainable, descend, order, take_batches, training
from mipfast.errors import InputError, configured
from mipfast.model.batch import Batch
from mipfast.model.patching import unwrapped
from mipfast.model.sites import Sites, check_layer, find_sites

log = logging.getLogger("mipfast")


def rmisu_loss(
    forget: torch.Tensor | None,
    retain: torch.Tensor | None,
    target: torch.Tensor,
    kept: torch.Tensor | None,
    alpha: float = 0.5,
) -> Losses:
    """(1 - alpha) mean ||forget - target||²/D + alpha mean ||retain - kept||²/D, for any training loop.

    MIP-Editor, arXiv 2511.06793, section 3.3.

    Args:
        forget: [T,D], `hidden_states` of a forget batch. None leaves the term out: two calls and two backward passes
            hold one graph at a time.
        retain: [R,D], `hidden_states` of a retain batch, or None.
        target: [D], see `steering_target`.
        kept: [R,D], the retain batch's hidden states before training, or None.
        alpha: weight of the retain term, 0 to 1.

    Returns:
        Scalars (loss, forget's mean, retain's mean); None for a term that was left out.

    Example:
        >>> import torch
        >>> from mipfast import rmisu_loss
        >>> states, target = torch.zeros(3, 4), torch.ones(4)
        >>> rmisu_loss(states, states, target, states, alpha=0.5).loss
        tensor(0.5000)
    """
    away = None if forget is None else ops.misdirection_loss(forget, target)
    held = None if retain is None or kept is None else ops.misdirection_loss(retain, kept)
    terms = [] if away is None else [(1 - alpha) * away]
    terms += [] if held is None else [alpha * held]
    return Losses(torch.stack(terms).sum(), away, held)


def misdirect(
    model: nn.Module,
    path: Neurons,
    forget: Iterable[Batch],
    retain: Iterable[Batch],
    config: RMisUConfig | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Train the path's neurons in place until the forget set's hidden states point somewhere meaningless.

    RMisU (MIP-Editor, arXiv 2511.06793, section 3.3): every step takes a forget and a retain batch; the loss is
    `rmisu_loss` at the output of block `layer`, where the forward pass stops. The retain set's hidden states are held
    at those of the model before any prune still in force.

    Args:
        model: a transformers model; weights outside the path stay as they are, bit for bit, and after any error or
            interruption all do (what trains is kept on the CPU meanwhile).
        path: {(stack, layer): indices [k]} to train, such as a `NeuronPath`.
        forget: batches as model(**batch) takes them, with labels; of a sequence a batch is asked for when its step
            comes, so that it may be made then.
        retain: the same of what is to be kept.
        config: the settings; None is RMisUConfig().
        overrides: fields of RMisUConfig that differ from config's.

    Returns:
        A report: what trained, what could not, losses per step, the target's length, seconds, and of a learned
        direction the answers' mean log-probability with hidden states on it and on the draw it began with. With
        trainable="lora" the model then has the adapter, which `model.save_pretrained` writes; see
        `mipfast.edit.lora.fold_prune` for one that needs no prune.

    Raises:
        InputError: for settings or batches that cannot be used, and where nothing could train.
        ArtefactError: for another model's path.
        ModelError: for weights that training would not reach: offloaded, sharded, quantised or made anew in every
            forward pass.
        DivergedError: for a loss that is not finite.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from mipfast import misdirect
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> forget, retain = ({"input_ids": t, "labels": t} for t in torch.arange(12).view(2, 1, 6))
        >>> path = {("model.layers", 0): torch.tensor([3, 7])}
        >>> report = misdirect(model, path, [forget], [retain], steps=2)
        >>> report["steps"], report["trained"]  # two rows of gate and up, two columns of down
        (2, {'model.layers/0': 96})
    """
    started = time.monotonic()
    config = configured(RMisUConfig, config, overrides)
    sites, path = check_neurons(model, path, written=config.trainable != "lora")
    model = unwrapped(model)
    layer = steering_layer(config, sites)
    forget, retain = take_batches(forget, retain)
    steps = config.steps if config.steps is not None else config.epochs * len(forget)
    forget_order, retain_order = order(config.seed, (len(forget), len(retain)), steps)
    neurons, above = neurons_below(path, sites, layer, config.trainable)
    check_no_hook(model, neurons)

    def hidden(batch: Batch) -> torch.Tensor:
        return hidden_states(model, batch, layer, config.positions, sites)

    def loss_terms(step: tuple[int, int]) -> Iterator[Losses]:
        yield rmisu_loss(hidden(forget[step[0]]), None, target, None, config.alpha)
        yield rmisu_loss(None, hidden(retain[step[1]]), target, kept[step[1]], config.alpha)

    with ExitStack() as edit:
        if config.trainable == "lora":
            add_adapter(model, neurons, config.lora_rank, config.lora_alpha, config.seed)
            edit.callback(remove_adapter, model)
            sites = find_sites(model)
        with training(model, trainable_parts(neurons, sites, config.trainable)) as leaves:
            with unedited(model):
                kept = {i: hidden(retain[i]) for i in sorted(set(retain_order))}
                first, every = hidden(forget[forget_order[0]]), torch.cat(list(kept.values()))
                seen: Any = Subset(forget, forget_order)  # type: ignore[arg-type]
                target, likely = find_target(model, config, layer, seen, first, every)
            pairs = list(zip(forget_order, retain_order, strict=True))
            epoch = max(len(forget), len(retain))
            report = descend(leaves, loss_terms, pairs, config.lr, epoch, "misdirect", config.progress)
        edit.pop_all()
    return report | {
        **likely,
        "config": asdict(config) | {"layer": layer},
        "seed": config.seed,
        "above_the_steering_layer": above,
        "target_norm": target.norm().item(),
        "seconds": time.monotonic() - started,
    }


def steering_layer(config: Any, sites: Sites) -> int:
    """Index of the text block whose output is steered. Raises InputError for one the model does not have."""
    layer = config.layer if config.layer is not None else 3 * sites.text.num_layers // 5
    check_layer(layer, sites.text)
    return layer


def neurons_below(path: Neurons, sites: Sites, layer: int, trainable: str) -> tuple[Neurons, list[str]]:
    """(the neurons to train, "stack/layer" of those above the steering layer, which no loss there can reach). Raises
    InputError where there is nothing to train."""
    if trainable == "all":
        path = {
            (stack.name, i): torch.arange(stack.num_neurons) for stack in sites.stacks for i in range(len(stack.blocks))
        }
    chosen = {key: index for key, index in path.items() if key[0] != sites.text.name or key[1] <= layer}
    above = [] if trainable == "all" else [f"{stack}/{i}" for stack, i in path if (stack, i) not in chosen]
    if not chosen:
        raise InputError(
            f"nothing to train: the path has {len(path)} layers, {len(above)} of them above the steering layer {layer}"
        )
    if above:
        log.warning("%s lie above the steering layer %d: pruned perhaps, but not trained", ", ".join(above), layer)
    return chosen, above


def trainable_parts(neurons: Neurons, sites: Sites, trainable: str) -> Trainable:
    """{"stack/layer": what trains}."""
    by_layer: Trainable = {}
    for (stack, i), index in neurons.items():
        rows, columns = neuron_slices(sites, stack, i, index)
        parts = columns if trainable == "down" else [*rows, *columns]
        if trainable == "lora":
            by_layer[f"{stack}/{i}"] = adapter_slices(sites, stack, i, index)
        else:
            by_layer[f"{stack}/{i}"] = [part.parameter for part in parts] if trainable == "all" else parts
    return by_layer


def check_no_hook(model: nn.Module, neurons: Neurons) -> None:
    """Raises InputError where a prune by hook stands between the loss and what should train."""
    for handle in active_prunes(model):
        hooked = [
            f"{stack}/{i}" for stack, i in handle.neurons if handle.mode == "activations" and (stack, i) in neurons
        ]
        if hooked:
            raise InputError(
                f"{', '.join(hooked)} are zeroed by prune(mode='activations'): no gradient passes that hook. "
                "Undo it, or prune with mode='weights'"
            )


@contextmanager
def unedited(model: nn.Module) -> Iterator[None]:
    """Without gradients, and without the prunes in force."""
    with torch.no_grad(), ExitStack() as suspended:
        for handle in reversed(active_prunes(model)):
            suspended.enter_context(handle.suspended())
        yield
