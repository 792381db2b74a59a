"""The three stages as one call: locate, prune, misdirect."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from mipfast.attribution import Attribution, LocateConfig, locate
from mipfast.errors import InputError
from mipfast.lora import fold_prune
from mipfast.misdirection import RMisUConfig, check_config, misdirect, steering_layer
from mipfast.path import Aggregate, NeuronPath, check_choice
from mipfast.positions import Batch, find_labels
from mipfast.pruning import prune
from mipfast.sites import Sites, find_sites
from mipfast.training import check_kind, take_batches


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


def unlearn(
    model: nn.Module, forget: Iterable[Batch], retain: Iterable[Batch], config: MIPConfig | None = None
) -> dict[str, Any]:
    """Make the model forget, in place: locate on the forget set, prune the path for good, misdirect what it carried.

    forget, retain: re-iterables of batches as model(**batch) takes them, with labels; batches of text questions and
    batches with pixel_values apart, since IGI is fed the first and IFI the second. Put general knowledge beside the
    retain set. With rmisu.trainable="lora" the weights stay and the adapter does the prune's work too
    (`mipfast.lora.fold_prune`). Returns {"path", "locate", "misdirect", "config"}; "path" is the NeuronPath. Raises
    what the three stages raise."""
    config = check_kind(config or MIPConfig(), MIPConfig)
    config.check()
    if config.rmisu.trainable == "all":
        raise InputError("unlearn edits the located neurons; for trainable='all' call misdirect")
    forget, retain = ([*batches] for batches in take_batches(forget, retain))
    for name, batches in (("forget", forget), ("retain", retain)):
        for i, batch in enumerate(batches):  # before hours of locating
            try:
                find_labels(batch)
            except InputError as error:
                raise InputError(f"{name} batch {i}: {error}") from error
    path, located = locate_path(model, forget, retain, config)
    return {
        "path": path,
        "locate": located,
        "misdirect": edit(model, path, forget, retain, config),
        "config": asdict(config),
    }


def edit(
    model: nn.Module, path: NeuronPath, forget: Iterable[Batch], retain: Iterable[Batch], config: MIPConfig
) -> dict[str, Any]:
    """Prune the path for good and misdirect what it carried, in place; misdirect's report. A model that could not be
    misdirected is given back as it was."""
    handle = prune(model, path)
    try:
        report = misdirect(model, path, forget, retain, replace(config.rmisu, progress=config.progress))
    except BaseException:
        handle.undo()
        raise
    if config.rmisu.trainable == "lora":
        fold_prune(model)
    else:
        handle.commit()
    return report


def locate_path(
    model: nn.Module, forget: list[Batch], retain: list[Batch], config: MIPConfig
) -> tuple[NeuronPath, dict[str, Any]]:
    """The path `unlearn` edits, and the reports of the attributions behind it. Every retain batch is one group of the
    damage estimate."""
    sites = find_sites(model)
    text = [b for b in forget if "pixel_values" not in b]
    images = [b for b in forget if "pixel_values" in b]
    found: dict[str, Attribution] = {}
    if text:
        found["text"] = locate(model, text, config.text, progress=config.progress)
    if images and config.vision and sites.vision:
        found["vision"] = locate(model, images, config.vision, progress=config.progress)
    kept = [locate(model, batch, config.text) for batch in retain] if text and weighs_damage(config) else []
    path = select_path(sites, found.get("text"), found.get("vision"), kept, config)
    return path, {name: one.report for name, one in found.items()}


def weighs_damage(config: MIPConfig) -> bool:
    """Whether the choice of text neurons needs attributions of what is to be kept."""
    return config.aggregate in ("snr", "contrast")


def select_path(
    sites: Sites,
    text: Attribution | None,
    vision: Attribution | None,
    kept: Sequence[Attribution],
    config: MIPConfig,
) -> NeuronPath:
    """The neurons to edit. text: of the forget set's questions without pictures. vision: of its questions with them.
    kept: text attributions of what is to be kept, every one a group of the damage estimate (see NeuronPath.select).

    Neurons above the steering layer are left out: they would be pruned and never trained. Raises InputError where
    there are neither."""
    paths = []
    if text:
        paths.append(NeuronPath.select(text, config.fraction, aggregate=config.aggregate, retain=kept))
    if vision:
        paths.append(NeuronPath.select(vision, config.fraction))
    if not paths:
        raise InputError(
            "nothing of the forget set can be scored: questions with pixel_values need a vision tower and "
            "config.vision, the others feed the text tower; expected at least one"
        )
    path = paths[0] | paths[1] if len(paths) == 2 else paths[0]
    return path.up_to(sites.text.name, steering_layer(config.rmisu, sites))
