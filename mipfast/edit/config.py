"""How neurons are chosen and edited: the fields of `misdirect` and of `unlearn`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast

from mipfast.edit.neuron_path import Aggregate, check_choice
from mipfast.edit.train import T
from mipfast.errors import InputError
from mipfast.model.positions import TEXT_POSITIONS, Positions, check_name
from mipfast.scoring.config import LocateConfig


@dataclass(frozen=True)
class RMisUConfig:
    """layer: the text block whose output is steered; None is three fifths of the depth. steering_coeff: length of the
    target in units of unit: retain, the retain set's mean hidden norm there; forget, the first forget batch's
    (adaptive RMU, arXiv 2408.06223); none, 1 (RMU, and the released code with a coefficient of 10). alpha: weight of
    the retain loss, 1 - alpha of the forget loss.
    direction: gaussian, uniform on [0,1) as released, or learned before training (`learned_direction`). trainable: path
    (the neurons' gate/up rows and down columns), down (columns only), lora (an adapter of lora_rank and lora_alpha
    restricted to the path, see edit/lora.py), all (every FFN up to the layer: plain RMU). positions: where the losses
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


def check_kind(config: T, kind: type[T]) -> T:
    """The config. Raises InputError for what is none of that dataclass, such as a dict of its fields."""
    if not isinstance(config, kind):
        names = ", ".join(field.name for field in fields(cast(Any, kind)))
        raise InputError(f"the config is a {type(config).__name__}; expected a {kind.__name__}({names})")
    return config


def check_steps(config: Any) -> None:
    """Raises InputError for a learning rate or a length of training that no run could use."""
    if not isinstance(config.lr, int | float) or not config.lr > 0:
        raise InputError(f"lr={config.lr!r}; expected a positive number")
    counts = [config.epochs] if config.steps is None else [config.epochs, config.steps]
    if any(not isinstance(count, int) or count < 1 for count in counts):
        raise InputError(f"steps={config.steps}, epochs={config.epochs}; expected integers of at least 1")


@dataclass(frozen=True)
class MIPConfig:
    """text, vision: how neurons are scored in each tower; vision None leaves the vision towers alone. fraction of the
    neurons per layer. aggregate: of the text scores; snr is what makes the choice selective. The vision path is the
    mean IFI of the forget images. rmisu: the edit."""

    text: LocateConfig = field(default_factory=lambda: LocateConfig("text", positions="prompt", objective="log_odds"))
    vision: LocateConfig | None = field(default_factory=lambda: LocateConfig("vision"))
    fraction: float = 0.1
    aggregate: Aggregate = "snr"
    rmisu: RMisUConfig = field(default_factory=RMisUConfig)
    progress: bool = False

    def check(self) -> None:
        """Raises InputError for a value that no run could use."""
        check_choice(self.aggregate, self.fraction)
        for config in filter(None, (self.text, self.vision)):
            config.resolved()
        check_config(self.rmisu)

    @classmethod
    def paper(cls) -> MIPConfig:
        """The paper's training: Adam 2e-5, 4 epochs, LoRA (its code's rank 8, alpha 16), neurons by mean score; give it
        batches of 4. Ours stay: quadrature, positions, budget per layer, the steering layer and the target's length."""
        edit = RMisUConfig(trainable="lora", lora_rank=8, lora_alpha=16, lr=2e-5, epochs=4)
        return cls(text=LocateConfig("text"), aggregate="mean", rmisu=edit)

    @classmethod
    def released(cls) -> MIPConfig:
        """The released code's numbers where it differs from the paper: its scores, the union of the samples' text
        paths, layer 7, a target of length 10 along a uniform direction, the loss at every token, lr 5e-4, 1 epoch, no
        LoRA; it has batches of 6.

        Not its: columns are zeroed where it hooks token 0 alone (so gate and up rows, all it trains, could not train
        without the columns); padding counts in no loss; Adam is without weight decay (0.01 there) and with a constant
        lr (linear decay there); the vision path is the mean's best fraction and not a union."""
        edit = RMisUConfig(
            layer=7, steering_coeff=10.0, unit="none", direction="uniform", positions="all", lr=5e-4, epochs=1
        )
        text, vision = LocateConfig.released("text"), LocateConfig.released("vision")
        return cls(text=text, vision=vision, aggregate="union", rmisu=edit)
