"""RMisU, representation misdirection: push forget-set hidden states to a random direction, hold the retain set's where
they were, and train only what belongs to the path. MIP-Editor (arXiv 2511.06793) section 3.3.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import Subset

from mipfast import ops
from mipfast.capture import removing
from mipfast.direction import STEPS, answer_log_prob, draw_direction, learned_direction
from mipfast.errors import InputError
from mipfast.lora import adapter_slices, add_adapter, remove_adapter
from mipfast.modes import held, unwrapped
from mipfast.positions import (
    TEXT_POSITIONS,
    Batch,
    Positions,
    check_inputs,
    check_name,
    image_token,
    text_rows,
    without_labels,
)
from mipfast.pruning import Neurons, active_prunes, check_neurons, neuron_slices
from mipfast.sites import Sites, check_layer, find_sites
from mipfast.training import Losses, Places, check_kind, check_steps, descend, order, take_batches, training

log = logging.getLogger("mipfast")

TOKENWISE = {"input_ids", "attention_mask", "position_ids", "mm_token_type_ids"}
PICTURES = {"pixel_values", "image_grid_thw", "image_sizes"}


@dataclass(frozen=True)
class RMisUConfig:
    """layer: the text block whose output is steered; None is three fifths of the depth. steering_coeff: length of the
    target in units of unit: retain, the retain set's mean hidden norm there; forget, the first forget batch's
    (adaptive RMU, arXiv 2408.06223); none, 1 (RMU, and the released code with a coefficient of 10). alpha: weight of
    the retain loss, 1 - alpha of the forget loss.
    direction: gaussian, uniform on [0,1) as released, or learned before training (`learned_direction`). trainable: path
    (the neurons' gate/up rows and down columns), down (columns only), lora (an adapter of lora_rank and lora_alpha
    restricted to the path, see mipfast.lora), all (every FFN up to the layer: plain RMU). positions: where the losses
    look. steps: optimiser steps, or epochs over the forget batches. lr: of Adam without weight decay. seed: direction
    and order of batches."""

    layer: int | None = None
    steering_coeff: float = 1.0
    unit: Literal["retain", "forget", "none"] = "retain"
    alpha: float = 0.5
    direction: Literal["gaussian", "uniform", "learned"] = "gaussian"
    trainable: Literal["path", "down", "lora", "all"] = "path"
    lora_rank: int = 8
    lora_alpha: int = 16
    positions: Positions = "last_prompt"
    steps: int | None = None
    epochs: int = 1
    lr: float = 3e-3
    seed: int = 0
    progress: bool = False


def rmisu_loss(
    forget: torch.Tensor | None,
    retain: torch.Tensor | None,
    target: torch.Tensor,
    kept: torch.Tensor | None,
    alpha: float = 0.5,
) -> Losses:
    """(1 - alpha) mean ||forget - target||²/D + alpha mean ||retain - kept||²/D, for any training loop.

    forget [T,D], retain [R,D]: `hidden_states` of a forget and a retain batch; None leaves the term out: two calls and
    two backward passes hold one graph at a time. target [D]: see `steering_target`. kept [R,D]: the retain batch's
    hidden states before training. Returns scalars (loss, forget's mean, retain's mean)."""
    away = None if forget is None else ops.misdirection_loss(forget, target)
    held = None if retain is None or kept is None else ops.misdirection_loss(retain, kept)
    terms = [] if away is None else [(1 - alpha) * away]
    terms += [] if held is None else [alpha * held]
    return Losses(torch.stack(terms).sum(), away, held)


def hidden_states(
    model: Any, batch: Batch, layer: int, positions: Positions = "last_prompt", sites: Sites | None = None
) -> torch.Tensor:
    """Hidden states [T,D] behind one text block at the chosen positions of a batch with labels. The forward pass ends
    there; tokens that no chosen position sees are left out, and the block's FFN runs at the chosen positions only.

    sites: find_sites(model), where it is called often. Raises InputError where the block does not run."""
    stack = (sites or find_sites(model)).text
    check_layer(layer, stack)
    check_inputs(model, batch)
    block, ffn = stack.blocks[layer], stack.ffns[layer]
    inputs, rows, shape = _seen(model, batch, text_rows(batch, positions).index)

    def gather(module: nn.Module, args: tuple) -> tuple:
        return args if args[0].shape[:-1] != shape else (args[0].flatten(0, 1)[None, rows], *args[1:])

    def scatter(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if output.shape[:-1] == shape:
            return output
        return output.new_zeros(shape.numel(), output.shape[-1]).index_copy(0, rows, output[0]).unflatten(0, shape)

    def stop(module: nn.Module, args: tuple, output: Any) -> None:
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        if not _hooked(model):
            hooks.enter_context(removing(ffn.register_forward_pre_hook(gather)))
            hooks.enter_context(removing(ffn.register_forward_hook(scatter)))
        hooks.enter_context(removing(block.register_forward_hook(stop)))
        try:
            model(**inputs, use_cache=False)
        except _Reached as reached:
            return reached.hidden.flatten(0, -2)[rows]
    raise InputError(
        f"the steered block {type(block).__name__} did not run in a forward pass of {type(model).__name__}"
    )


def _seen(model: Any, batch: Batch, rows: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor, torch.Size]:
    """(inputs cut behind the last of the rows of [n·S], the rows in them, [n,S] of them). Uncut where it is not known
    how."""
    inputs, shape = without_labels(batch), batch["labels"].shape
    stop = int((rows % shape[1]).max()) + 1
    tokenwise = {name: value for name, value in inputs.items() if name in TOKENWISE}
    picture = image_token(unwrapped(model).config)
    if (
        _hooked(model)
        or "input_ids" not in inputs
        or not inputs.keys() <= {*TOKENWISE, *PICTURES}
        or any(value.ndim != 2 and name != "position_ids" for name, value in tokenwise.items())
        or (picture is not None and bool((inputs["input_ids"][:, stop:] == picture).any()))
    ):
        return inputs, rows, shape
    cut = {name: value[..., :stop] for name, value in tokenwise.items()}
    return {**inputs, **cut}, rows // shape[1] * stop + rows % shape[1], torch.Size((shape[0], stop))


def _hooked(model: nn.Module) -> bool:
    """Whether a prune's hook may count positions."""
    return any(handle.mode == "activations" for handle in active_prunes(model))


class _Reached(Exception):
    """Carries the steered block's output out of the forward pass."""

    def __init__(self, hidden: torch.Tensor):
        self.hidden = hidden


def steering_target(
    config: RMisUConfig, forget: torch.Tensor, kept: torch.Tensor, direction: torch.Tensor | None = None
) -> torch.Tensor:
    """steering_coeff times its unit times the direction: [D]. forget [T,D], kept [R,D]: hidden states of the model
    before training, of the first forget batch and of retain batches. direction [D], of any length: None draws what
    config.direction says; `learned_direction`'s where it says learned, or InputError is raised."""
    u = draw_direction(config.direction, kept.shape[-1], config.seed) if direction is None else direction
    return target_length(config, forget, kept) * (u / u.norm()).to(kept)


def target_length(config: RMisUConfig, forget: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """steering_coeff times its unit, of the same hidden states: scalar."""
    measured = {"retain": kept, "forget": forget}.get(config.unit)
    unit = torch.ones_like(kept[0, 0]) if measured is None else measured.norm(dim=-1).mean()
    return config.steering_coeff * unit


def find_target(
    model: nn.Module,
    config: RMisUConfig,
    layer: int,
    batches: Sequence[Batch],
    forget: torch.Tensor,
    kept: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, float]]:
    """(steering_target, and of a learned direction what it is for: the mean `answer_log_prob` with hidden states on it,
    and on the draw that it began with). batches: of the forget set; the first STEPS count."""
    if config.direction != "learned":
        return steering_target(config, forget, kept), {}
    length = target_length(config, forget, kept).item()
    learned = learned_direction(model, batches, layer, config.positions, length, config.seed)
    drawn = draw_direction("gaussian", len(learned), config.seed)
    targets = {name: steering_target(config, forget, kept, u) for name, u in (("drawn", drawn), ("learned", learned))}
    values: dict[str, list[float]] = {name: [] for name in targets}
    with held(model), torch.no_grad():
        for i in range(min(STEPS, len(batches))):
            batch = batches[i]
            for name, target in targets.items():
                values[name].append(answer_log_prob(model, batch, layer, config.positions, target).item())
    return targets["learned"], {f"answer_log_prob_{name}": fmean(found) for name, found in values.items()}


def misdirect(
    model: nn.Module,
    path: Neurons,
    forget: Iterable[Batch],
    retain: Iterable[Batch],
    config: RMisUConfig | None = None,
) -> dict[str, Any]:
    """Train the path's neurons in place until the forget set's hidden states point somewhere meaningless.

    forget, retain: batches as model(**batch) takes them, with labels; of a sequence a batch is asked for when its step
    comes, so that it may be made then. Every step takes one of each. The loss is `rmisu_loss` at the output of block
    `layer`, where the forward pass stops; the retain set's hidden states are held at those of the model before any
    prune still in force. Returns a report: what trained, what could not, losses per step, the target's length, seconds,
    and of a learned direction the answers' mean log-probability with hidden states on it and on the draw it began with.

    With trainable="lora" the model then has the adapter, which `model.save_pretrained` writes; see
    `mipfast.lora.fold_prune` for one that needs no prune.

    Raises InputError where nothing could train, DivergedError for a loss that is not finite."""
    started = time.monotonic()
    config = config or RMisUConfig()
    sites = check_neurons(model, path)
    check_config(config)
    layer = steering_layer(config, sites)
    forget, retain = take_batches(forget, retain)
    steps = config.steps if config.steps is not None else config.epochs * len(forget)
    forget_order, retain_order = order(config.seed, (len(forget), len(retain)), steps)
    neurons, above = reached(path, sites, layer, config.trainable)
    check_no_hook(model, neurons)

    def hidden(batch: Batch) -> torch.Tensor:
        return hidden_states(model, batch, layer, config.positions, sites)

    def terms(step: tuple[int, int]) -> Iterator[Losses]:
        yield rmisu_loss(hidden(forget[step[0]]), None, target, None, config.alpha)
        yield rmisu_loss(None, hidden(retain[step[1]]), target, kept[step[1]], config.alpha)

    with ExitStack() as edit:
        if config.trainable == "lora":
            add_adapter(model, neurons, config.lora_rank, config.lora_alpha, config.seed)
            edit.callback(remove_adapter, model)
            sites = find_sites(model)
        with training(model, train_places(neurons, sites, config.trainable)) as leaves:
            with unedited(model):
                kept = {i: hidden(retain[i]) for i in sorted(set(retain_order))}
                first, every = hidden(forget[forget_order[0]]), torch.cat(list(kept.values()))
                seen: Any = Subset(forget, forget_order)  # type: ignore[arg-type]
                target, likely = find_target(model, config, layer, seen, first, every)
            pairs = list(zip(forget_order, retain_order, strict=True))
            epoch = max(len(forget), len(retain))
            report = descend(leaves, terms, pairs, config.lr, epoch, "misdirect", config.progress)
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


def check_config(config: RMisUConfig) -> None:
    """Raises InputError for a value that no run could use."""
    check_kind(config, RMisUConfig)
    check_name(config.positions, TEXT_POSITIONS)
    if config.direction not in ("gaussian", "uniform", "learned"):
        raise InputError(f"direction={config.direction!r}; expected gaussian, uniform or learned")
    if config.unit not in ("retain", "forget", "none"):
        raise InputError(f"unit={config.unit!r}; expected retain, forget or none")
    if not 0 <= config.alpha <= 1:
        raise InputError(f"alpha={config.alpha}; expected 0..1")
    if config.trainable not in ("path", "down", "lora", "all"):
        raise InputError(f"trainable={config.trainable!r}; expected path, down, lora or all")
    if config.lora_rank < 1 or not config.lora_alpha > 0:
        raise InputError(f"lora_rank={config.lora_rank}, lora_alpha={config.lora_alpha}; expected positive numbers")
    check_steps(config)


def reached(path: Neurons, sites: Sites, layer: int, trainable: str) -> tuple[Neurons, list[str]]:
    """(the neurons to train, "stack/layer" of those above the steering layer, which no loss there can reach). Raises
    InputError where there is nothing to train."""
    if trainable == "all":
        path = {
            (stack.name, i): torch.arange(stack.num_neurons) for stack in sites.stacks for i in range(len(stack.blocks))
        }
    chosen = {place: index for place, index in path.items() if place[0] != sites.text.name or place[1] <= layer}
    above = [] if trainable == "all" else [f"{stack}/{i}" for stack, i in path if (stack, i) not in chosen]
    if not chosen:
        raise InputError(
            f"nothing to train: the path has {len(path)} layers, {len(above)} of them above the steering layer {layer}"
        )
    if above:
        log.warning("%s lie above the steering layer %d: pruned perhaps, but not trained", ", ".join(above), layer)
    return chosen, above


def train_places(neurons: Neurons, sites: Sites, trainable: str) -> Places:
    """{"stack/layer": what trains}."""
    places: Places = {}
    for (stack, i), index in neurons.items():
        rows, columns = neuron_slices(sites, stack, i, index)
        parts = columns if trainable == "down" else [*rows, *columns]
        if trainable == "lora":
            places[f"{stack}/{i}"] = adapter_slices(sites, stack, i, index)
        else:
            places[f"{stack}/{i}"] = [part.parameter for part in parts] if trainable == "all" else parts
    return places


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
