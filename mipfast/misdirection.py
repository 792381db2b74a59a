"""RMisU, representation misdirection: push forget-set hidden states to a random direction, hold the retain set's where
they were, and train only what belongs to the path. MIP-Editor (arXiv 2511.06793) section 3.3.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from mipfast import ops
from mipfast.errors import DivergedError, InputError
from mipfast.modes import held
from mipfast.positions import Batch, Positions, text_rows, without_labels
from mipfast.pruning import Neurons, Slice, active_prunes, check_neurons, neuron_slices
from mipfast.sites import Sites

log = logging.getLogger("mipfast")


@dataclass(frozen=True)
class RMisUConfig:
    """layer: the text block whose output is steered; None is three fifths of the depth. steering_coeff: length of the
    target in units of the retain set's mean hidden norm there. alpha: weight of the retain loss, 1 - alpha of the
    forget loss.
    direction: gaussian, or uniform on [0,1) as released. trainable: path (the neurons' gate/up rows and down columns),
    down (columns only), all (every FFN up to the layer: plain RMU). positions: where the losses look. steps: optimiser
    steps, or epochs over the forget batches. lr: of Adam without weight decay. seed: direction and order of batches."""

    layer: int | None = None
    steering_coeff: float = 1.0
    alpha: float = 0.5
    direction: Literal["gaussian", "uniform"] = "gaussian"
    trainable: Literal["path", "down", "all"] = "path"
    positions: Positions = "last_prompt"
    steps: int | None = None
    epochs: int = 1
    lr: float = 3e-3
    seed: int = 0
    progress: bool = False


def misdirect(
    model: nn.Module,
    path: Neurons,
    forget: Iterable[Batch],
    retain: Iterable[Batch],
    config: RMisUConfig | None = None,
) -> dict[str, Any]:
    """Train the path's neurons in place until the forget set's hidden states point somewhere meaningless.

    forget, retain: batches as model(**batch) takes them, with labels; of a sequence a batch is asked for when its step
    comes, so that it may be made then. Every step takes one of each. The loss is (1 - alpha) mean||h_f - c·u||²/D +
    alpha mean||h_r - h0||²/D at the output of block `layer`, where the forward pass stops; h0 is the hidden state of
    the model before any prune still in force. Returns a report: what trained, what could not, losses per step, the
    target's length, seconds.

    Raises InputError where nothing could train, DivergedError for a loss that is not finite."""
    config = config or RMisUConfig()
    sites = check_neurons(model, path)
    check_config(config)
    layer = steering_layer(config, sites)
    forget_batches, retain_batches = (s if isinstance(s, Sequence) else list(s) for s in (forget, retain))
    if not forget_batches or not retain_batches:
        raise InputError(
            f"{len(forget_batches)} forget and {len(retain_batches)} retain batches; expected at least one each"
        )
    steps = config.steps if config.steps is not None else config.epochs * len(forget_batches)
    rng = random.Random(config.seed)
    forget_order, retain_order = (
        _order(rng, len(forget_batches), steps),
        _order(rng, len(retain_batches), steps),
    )
    block = sites.text.blocks[layer]
    places, above = _places(path, sites, layer, config.trainable)
    _check_no_hook(model, places)

    started = time.monotonic()
    with _training(model, places) as trainers:
        with torch.no_grad(), ExitStack() as unedited:
            for handle in reversed(active_prunes(model)):
                unedited.enter_context(handle.suspended())
            targets = {i: _hidden(model, block, retain_batches[i], config.positions) for i in sorted(set(retain_order))}
        norm = torch.cat([t.norm(dim=-1) for t in targets.values()]).mean()
        misdirected = config.steering_coeff * norm * _direction(config, targets[retain_order[0]])
        optimizer = torch.optim.Adam([t.leaf for t in trainers], lr=config.lr)
        losses: list[tuple[float, float]] = []
        moving: set[str] = set()
        epoch = min(steps, max(len(forget_batches), len(retain_batches)))
        bar = tqdm(
            zip(forget_order, retain_order, strict=True),
            total=steps,
            desc="misdirect",
            disable=not config.progress,
        )
        for f, r in bar:
            forget_loss = ops.misdirection_loss(_hidden(model, block, forget_batches[f], config.positions), misdirected)
            retain_loss = ops.misdirection_loss(_hidden(model, block, retain_batches[r], config.positions), targets[r])
            loss = (1 - config.alpha) * forget_loss + config.alpha * retain_loss
            if not bool(loss.isfinite()):
                raise DivergedError(
                    f"the loss of step {len(losses)} is {loss.item()}; lower lr ({config.lr}) or steering_coeff"
                )
            if loss.requires_grad:  # not where a vision path meets batches without pictures
                loss.backward()
            moving |= {t.place for t in trainers if t.leaf.grad is not None and bool(t.leaf.grad.any())}
            if len(losses) + 1 == epoch and not moving:
                raise InputError(
                    f"no gradient reaches {', '.join(places)}: input rows of neurons whose columns are zero do not "
                    "train alone, and a vision tower needs batches with pixel_values"
                )
            optimizer.step()
            optimizer.zero_grad()
            for trainer in trainers:
                trainer.write(trainer.leaf.detach())
            losses.append((forget_loss.item(), retain_loss.item()))
    idle = sorted(set(places) - moving)
    if idle:
        log.warning("no gradient ever reached %s", ", ".join(idle))
    return {
        "config": asdict(config) | {"layer": layer},
        "seed": config.seed,
        "steps": steps,
        "trained": {
            place: sum(t.leaf.numel() for t in trainers if t.place == place)
            for place in dict.fromkeys(t.place for t in trainers)
        },
        "above_the_steering_layer": above,
        "without_gradient": idle,
        "forget_loss": [f for f, _ in losses],
        "retain_loss": [r for _, r in losses],
        "target_norm": float(config.steering_coeff * norm),
        "seconds": time.monotonic() - started,
    }


class _Trainer(Slice):
    """A slice trained by itself: the optimiser sees only leaf (float32), and the parameter's full gradient is dropped
    as soon as the slice of it has been taken."""

    def __init__(self, place: str, part: Slice):
        super().__init__(part.parameter, part.dim, part.index)
        self.place = place
        self.leaf = nn.Parameter(self.read().float() if self.parameter.dtype != torch.float64 else self.read())
        self.hook = self.parameter.register_post_accumulate_grad_hook(self._collect)

    def _collect(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        grad = self.read(parameter.grad).to(self.leaf.dtype)
        self.leaf.grad = grad if self.leaf.grad is None else self.leaf.grad + grad
        parameter.grad = None


@contextmanager
def _training(model: nn.Module, places: dict[str, list[Slice]]) -> Iterator[list[_Trainer]]:
    """Only the slices' parameters require gradient, in eval mode (no dropout); undone on the way out."""
    parts = [(place, part) for place, slices in places.items() for part in slices]
    with held(model, [part.parameter for _, part in parts]):
        trainers = [_Trainer(place, part) for place, part in parts]
        try:
            yield trainers
        finally:
            for trainer in trainers:
                trainer.hook.remove()


def steering_layer(config: RMisUConfig, sites: Sites) -> int:
    """Index of the text block whose output is steered. Raises InputError for one the model does not have."""
    layer = config.layer if config.layer is not None else 3 * sites.text.num_layers // 5
    if not 0 <= layer < sites.text.num_layers:
        raise InputError(f"layer={layer}; the text stack has layers 0..{sites.text.num_layers - 1}")
    return layer


def check_config(config: RMisUConfig) -> None:
    """Raises InputError for a value that no run could use."""
    if config.direction not in ("gaussian", "uniform"):
        raise InputError(f"direction={config.direction!r}; expected gaussian or uniform")
    if not 0 <= config.alpha <= 1 or not config.lr > 0:
        raise InputError(f"alpha={config.alpha}, lr={config.lr}; expected alpha in 0..1 and a positive lr")
    if config.epochs < 1 or (config.steps is not None and config.steps < 1):
        raise InputError(f"steps={config.steps}, epochs={config.epochs}; expected at least 1")
    if config.trainable not in ("path", "down", "all"):
        raise InputError(f"trainable={config.trainable!r}; expected path, down or all")


def _order(rng: random.Random, count: int, steps: int) -> list[int]:
    """Epoch after epoch, each shuffled, cut to steps."""
    epochs = -(-steps // count)
    return [i for _ in range(epochs) for i in rng.sample(range(count), count)][:steps]


def _places(path: Neurons, sites: Sites, layer: int, trainable: str) -> tuple[dict[str, list[Slice]], list[str]]:
    """({"stack/layer": slices to train}, path entries above the steering layer, which no loss here can reach)."""
    if trainable == "all":
        everything = {(s.name, i): torch.arange(s.num_neurons) for s in sites.stacks for i in range(s.num_layers)}
        path = {key: index for key, index in everything.items() if key[0] != sites.text.name or key[1] <= layer}
    places, above = {}, []
    for (stack, i), index in path.items():
        if stack == sites.text.name and i > layer:
            above.append(f"{stack}/{i}")
            continue
        rows, columns = neuron_slices(sites, stack, i, index)
        places[f"{stack}/{i}"] = columns if trainable == "down" else [*rows, *columns]
    if not places:
        raise InputError(
            f"nothing to train: the path has {len(path)} layers, {len(above)} of them above the steering layer {layer}"
        )
    if above:
        log.warning("%s lie above the steering layer %d: pruned perhaps, but not trained", ", ".join(above), layer)
    return places, above


def _check_no_hook(model: nn.Module, places: dict[str, list[Slice]]) -> None:
    for handle in active_prunes(model):
        hooked = [
            f"{stack}/{i}" for stack, i in handle.neurons if handle.mode == "activations" and f"{stack}/{i}" in places
        ]
        if hooked:
            raise InputError(
                f"{', '.join(hooked)} are zeroed by prune(mode='activations'): no gradient passes that hook. "
                "Undo it, or prune with mode='weights'"
            )


def _direction(config: RMisUConfig, like: torch.Tensor) -> torch.Tensor:
    """Unit vector [D], drawn on the CPU so that every device gets the same one."""
    generator = torch.Generator().manual_seed(config.seed)
    draw = torch.randn if config.direction == "gaussian" else torch.rand
    u = draw(like.shape[-1], generator=generator, dtype=torch.float64)
    return (u / u.norm()).to(like)


class _Reached(Exception):
    """Carries the steered block's output out of the forward pass."""

    def __init__(self, hidden: torch.Tensor):
        self.hidden = hidden


def _hidden(model: nn.Module, block: nn.Module, batch: Batch, positions: Positions) -> torch.Tensor:
    """Hidden states [T,D] after block at the chosen positions; the forward pass ends there."""

    def stop(module: nn.Module, args: tuple, output: Any) -> None:
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    rows = text_rows(batch, positions)
    handle = block.register_forward_hook(stop)
    try:
        model(**without_labels(batch), use_cache=False)
    except _Reached as reached:
        return reached.hidden.reshape(-1, reached.hidden.shape[-1])[rows.index]
    finally:
        handle.remove()
    raise InputError(
        f"the steered block {type(block).__name__} did not run in a forward pass of {type(model).__name__}"
    )
