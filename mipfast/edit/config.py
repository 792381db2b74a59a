"""How neurons are chosen and edited: the fields of `misdirect` and of `unlearn`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mipfast.edit.neuron_path import Aggregate, check_fraction, check_ranked
from mipfast.errors import InputError, check_fields
from mipfast.model.positions import TEXT_POSITIONS, Positions, check_name
from mipfast.scoring.config import LocateConfig


@dataclass(frozen=True)
class RMisUConfig:
    """The edit: what is steered where, what trains and for how long: the fields of `misdirect`.

    MIP-Editor, arXiv 2511.06793, section 3.3.

    Raises:
        InputError: for a value that no run could use; the text names the field, what was found and what is expected.

    Example:
        >>> from mipfast import RMisUConfig
        >>> RMisUConfig(trainable="down", steps=20).lr
        0.003
        >>> RMisUConfig(alpha=2)
        Traceback (most recent call last):
        mipfast.errors.InputError: alpha=2; expected 0..1
    """

    layer: int | None = None
    """Text block whose output is steered; None is three fifths of the depth."""
    steering_coeff: float = 1.0
    """Length of the target, in units of `unit`."""
    unit: Literal["retain", "forget", "none"] = "retain"
    """retain: the retain set's mean hidden norm there; forget: the first forget batch's (adaptive RMU, 2408.06223).
    none: 1 (RMU, and the released code with a coefficient of 10)."""
    alpha: float = 0.5
    """Weight of the retain loss, 0 to 1; the forget loss has 1 - alpha."""
    direction: Literal["gaussian", "uniform", "learned"] = "gaussian"
    """Of the target: drawn gaussian, uniform on [0,1) as released, or learned before training (`learned_direction`)."""
    trainable: Literal["path", "down", "lora", "all"] = "path"
    """path: the neurons' gate and up rows and down columns; down: columns only.
    lora: an adapter restricted to the path (edit/lora.py); all: every FFN up to the layer, which is plain RMU."""
    lora_rank: int = 8
    """Of the adapter."""
    lora_alpha: int = 16
    """Of the adapter: its scale is lora_alpha / lora_rank."""
    positions: Positions = "last_prompt"
    """Tokens where the losses look: last_prompt, answer, first, prompt, all, subject, or indices."""
    steps: int | None = None
    """Optimiser steps, instead of epochs."""
    epochs: int = 1
    """Passes over the forget batches."""
    lr: float = 3e-3
    """Learning rate of Adam, without weight decay."""
    seed: int = 0
    """Of the direction and the order of batches."""
    progress: bool = False
    """Show a bar over steps."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_name(self.positions, TEXT_POSITIONS)
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha={self.alpha}; expected 0..1")
        if self.lora_rank < 1 or not self.lora_alpha > 0:
            raise InputError(f"lora_rank={self.lora_rank}, lora_alpha={self.lora_alpha}; expected positive numbers")
        check_steps(self)


def check_steps(config: Any) -> None:
    """Raises InputError for a learning rate or a length of training that no run could use."""
    if not isinstance(config.lr, int | float) or not config.lr > 0:
        raise InputError(f"lr={config.lr!r}; expected a positive number")
    counts = [config.epochs] if config.steps is None else [config.epochs, config.steps]
    if any(not isinstance(count, int) or count < 1 for count in counts):
        raise InputError(f"steps={config.steps}, epochs={config.epochs}; expected integers of at least 1")


@dataclass(frozen=True)
class MIPConfig:
    """The whole method: which neurons, how many, and the edit: the fields of `unlearn`.

    Raises:
        InputError: for a value that no run could use; the text names the field, what was found and what is expected.

    Example:
        >>> from mipfast import MIPConfig, RMisUConfig
        >>> config = MIPConfig(fraction=0.03, vision=None, rmisu=RMisUConfig(steps=20))
        >>> config.text.positions
        'prompt'
    """

    text: LocateConfig = field(
        default_factory=lambda: LocateConfig("text", n_steps=4, positions="prompt", objective="log_odds")
    )
    """How neurons of the text tower are scored: by the fixed rule of four nodes that this edit was measured with. For
    an error that is controlled give it tol, and n_steps=None."""
    vision: LocateConfig | None = field(default_factory=lambda: LocateConfig("vision", n_steps=2))
    """How neurons of the vision towers are scored; None leaves those towers alone."""
    fraction: float | Literal["auto"] = 0.1
    """Share of the neurons that is edited. auto: as many as forget without harm, ranked over the whole stack, whatever
    scope is (`fit_path`)."""
    scope: Literal["layer", "stack"] = "layer"
    """layer: fraction of every layer's neurons. stack: of the whole stack's, wherever they are."""
    aggregate: Aggregate = "snr"
    """How text neurons are chosen from scores (`NeuronPath.select`); snr is what makes the choice selective.
    Vision neurons are those of the largest mean score."""
    rmisu: RMisUConfig = field(default_factory=RMisUConfig)
    """The edit."""
    progress: bool = False
    """Show bars."""

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.fraction, str):
            check_ranked(self.aggregate)
        else:
            check_fraction(self.fraction)

    @classmethod
    def paper(cls) -> MIPConfig:
        """The paper's training: Adam 2e-5, 4 epochs, LoRA (its code's rank 8, alpha 16), neurons by mean score; give it
        batches of 4. Ours stay: quadrature, positions, budget per layer, the steering layer and the target's length."""
        edit = RMisUConfig(trainable="lora", lora_rank=8, lora_alpha=16, lr=2e-5, epochs=4)
        return cls(text=LocateConfig("text", n_steps=4), aggregate="mean", rmisu=edit)

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
