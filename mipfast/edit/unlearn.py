"""The three stages as one call: locate, prune, misdirect."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from mipfast.edit.config import MIPConfig
from mipfast.edit.fit_path import RISE, fit_size
from mipfast.edit.lora import TRAINABLE, fold_prune, remove_adapter
from mipfast.edit.misdirect import misdirect, steering_layer
from mipfast.edit.neuron_path import NeuronPath
from mipfast.edit.prune import active_prunes, check_prunable, prune
from mipfast.edit.train import take_batches
from mipfast.errors import InputError, configured
from mipfast.model.batch import Batch, read_batch
from mipfast.model.fingerprint import unchanged
from mipfast.model.patching import unwrapped
from mipfast.model.positions import text_rows
from mipfast.model.sites import Sites, find_sites
from mipfast.scoring.attribution import Attribution
from mipfast.scoring.config import LocateConfig
from mipfast.scoring.search import locate

log = logging.getLogger("mipfast")


def unlearn(
    model: nn.Module,
    forget: Iterable[Batch],
    retain: Iterable[Batch],
    config: MIPConfig | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Make the model forget, in place: locate on the forget set, prune the path for good, misdirect what it carried.

    MIP-Editor, arXiv 2511.06793, section 3.

    Args:
        model: a transformers model. With rmisu.trainable="lora" its weights stay, and the adapter does the prune's
            work too (`mipfast.edit.lora.fold_prune`).
        forget: re-iterable of batches as model(**batch) takes them, with labels; batches of text questions and batches
            with pixel_values apart, since IGI is fed the first and IFI the second.
        retain: the same of what is to be kept, with general knowledge beside it. With fraction="auto" every other batch
            is scored, and damage is judged on those between (`fit_path`): mix the kinds, in two batches at least.
        config: the settings; None is MIPConfig().
        overrides: fields of MIPConfig that differ from config's.

    Returns:
        {"path": the NeuronPath, "locate": reports by modality, "misdirect": its report, "config": all settings}. With
        fraction="auto" the path's origin has the curve of sizes. It may then lie above the steering layer: such neurons
        are pruned and not trained, and where all of them do, misdirect's report is one of no steps, with a note.

    Raises:
        InputError: for settings or batches that cannot be used, before anything runs; with fraction="auto", before any
            edit, where no harmless size forgets.
        ModelError: for a model whose neurons cannot be found, or whose weights a prune would not reach (see `prune`),
            before anything runs.
        DivergedError: for scores or a loss that are not finite.

    After any error or interruption the model is what it was, bit for bit.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from mipfast import RMisUConfig, unlearn
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> forget, retain = ({"input_ids": t, "labels": t} for t in torch.arange(12).view(2, 1, 6))
        >>> report = unlearn(model, [forget], [retain], fraction=0.25, rmisu=RMisUConfig(steps=2))
        >>> report["path"].num_neurons  # a quarter of 24, in layers 0 and 1
        12
    """
    config = configured(MIPConfig, config, overrides)
    if config.rmisu.trainable == "all":
        raise InputError("unlearn edits the located neurons; for trainable='all' call misdirect")
    model = unwrapped(model)
    forget, retain = ([*batches] for batches in take_batches(forget, retain))
    for name, batches in (("forget", forget), ("retain", retain)):
        for i, batch in enumerate(batches):  # before hours of locating
            try:
                _, labels = read_batch(model, batch)
                text_rows(batch, config.rmisu.positions, labels)
            except InputError as error:
                raise InputError(f"{name} batch {i}: {error}") from error
    sites = find_sites(model)
    check_prunable(model, sites.stacks if config.vision else [sites.text])
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
    """Prune the path for good and misdirect what it carried, in place; misdirect's report. After any error or
    interruption the model is what it was."""
    model = unwrapped(model)
    adapted, sites = TRAINABLE in vars(model), find_sites(model)
    layer = steering_layer(config.rmisu, sites)
    trains = bool(path.up_to(sites.text.name, layer)) or config.rmisu.trainable == "lora"  # whose adapter is the prune
    handle = prune(model, path)
    try:
        if trains:
            report = misdirect(model, path, forget, retain, replace(config.rmisu, progress=config.progress))
        else:
            report = _not_trained(path, layer)
        if config.rmisu.trainable == "lora":
            fold_prune(model)
        else:
            handle.commit()
    except BaseException:
        if not adapted and TRAINABLE in vars(model):
            remove_adapter(model)
        if handle in active_prunes(model):
            handle.undo()
        raise
    return report


def _not_trained(path: NeuronPath, layer: int) -> dict[str, Any]:
    """The report of a path that no loss at the steering layer reaches."""
    note = f"pruned alone: all {path.num_neurons} neurons of the path lie above the steering layer {layer}, so that "
    note += "nothing was trained"
    log.warning(note)
    above = [f"{stack}/{i}" for stack, i in path]
    return {"steps": 0, "trained": {}, "without_gradient": [], "above_the_steering_layer": above, "note": note}


def locate_path(
    model: nn.Module, forget: list[Batch], retain: list[Batch], config: MIPConfig
) -> tuple[NeuronPath, dict[str, Any]]:
    """The path `unlearn` edits, and the reports of the attributions behind it. Every retain batch is one group of the
    damage estimate; with fraction="auto" every other one is, and the others judge the size."""
    auto = config.fraction == "auto"
    scored, judged = (retain[::2], retain[1::2]) if auto else (retain, [])
    if auto:
        check_judged(len(judged), "batches")
    sites = find_sites(model)
    text = [b for b in forget if "pixel_values" not in b]
    images = [b for b in forget if "pixel_values" in b]
    located: dict[str, Attribution] = {}
    how = text_scoring(config, sites)
    with unchanged(model):
        if text:
            located["text"] = locate(model, text, how, progress=config.progress)
        if images and config.vision and sites.vision:
            located["vision"] = locate(model, images, config.vision, progress=config.progress)
        kept = [locate(model, batch, how) for batch in scored] if text and weighs_damage(config) else []
        towers = located.get("text"), located.get("vision")
        path = (
            fitted(model, forget, judged, *towers, kept, config) if auto else select_path(sites, *towers, kept, config)
        )
    return path, {name: one.report for name, one in located.items()}


def text_scoring(config: MIPConfig, sites: Sites) -> LocateConfig:
    """How text neurons are scored: up to the steering layer, above which none is edited, where every choice stays the
    same to the bit. It does not where layers are compared (snr's floor is a mean over them) or share passes."""
    how, compared = config.text, config.aggregate == "snr" or config.scope == "stack" or config.fraction == "auto"
    if how.layers is not None or how.search != "greedy" or how.combine == "released" or compared:
        return how
    return replace(how, layers=range(steering_layer(config.rmisu, sites) + 1))


def weighs_damage(config: MIPConfig) -> bool:
    """Whether the choice of text neurons needs attributions of what is to be kept."""
    return config.aggregate in ("snr", "contrast")


def check_judged(judged: int, what: str) -> None:
    """Raises InputError where nothing of the retain set is left to judge the size of a path by."""
    if not judged:
        raise InputError(
            f"fraction='auto' scores every other one of the retain {what} and judges damage on those between; found "
            f"none between, expected at least two {what}: give more, or a number for fraction"
        )


def select_path(
    sites: Sites,
    text: Attribution | None,
    vision: Attribution | None,
    kept: Sequence[Attribution],
    config: MIPConfig,
) -> NeuronPath:
    """The neurons to edit where fraction is a number. text: of the forget set's questions without pictures. vision: of
    its questions with them. kept: text attributions of what is to be kept, every one a group of the damage estimate
    (see NeuronPath.select).

    Neurons above the steering layer are left out: they would be pruned and never trained. Raises InputError where
    nothing is left."""
    path, layer = _selected(text, vision, kept, config), steering_layer(config.rmisu, sites)
    below = path.up_to(sites.text.name, layer)
    if not below:
        raise InputError(
            f"all {path.num_neurons} neurons chosen lie above the steering layer {layer}; expected some at or below "
            "it: give a larger fraction, scope='layer', or a higher rmisu.layer"
        )
    return below


def fitted(
    model: nn.Module,
    forget: Iterable[Batch],
    judged: Iterable[Batch],
    text: Attribution | None,
    vision: Attribution | None,
    kept: Sequence[Attribution],
    config: MIPConfig,
) -> NeuronPath:
    """The neurons to edit with fraction="auto", wherever they lie: `fit_path` of what select_path takes. judged: retain
    batches that none of kept is of. Raises InputError where there is nothing to choose from, and where no harmless size
    forgets."""

    def select(share: float) -> NeuronPath:
        return _selected(text, vision, kept, replace(config, fraction=share, scope="stack"))

    path = fit_size(model, forget, judged, select, [one for one in (text, vision) if one])
    if not path.origin["forgets"]:
        before, *sizes = path.origin["curve"]
        harmless = [size for size in sizes if size["damage"] <= path.origin["max_damage"]]
        rise = max(size["forget"] for size in harmless) - before["forget"]
        raise InputError(
            f"no number of neurons that is harmless (damage of at most {path.origin['max_damage']:g} nats to retain "
            f"answers) forgets: of {len(harmless)} sizes up to {path.num_neurons} neurons the best raises the NLL of "
            f"forget answers by {rise:.2g} nats, expected {RISE:g}. Nothing was edited: give a number for fraction, "
            "another aggregate, or retain batches without what shares its neurons with the forget set"
        )
    return path


def _selected(
    text: Attribution | None, vision: Attribution | None, kept: Sequence[Attribution], config: MIPConfig
) -> NeuronPath:
    assert not isinstance(config.fraction, str)
    paths = []
    if text:
        options: Any = {"scope": config.scope, "aggregate": config.aggregate}
        paths.append(NeuronPath.select(text, config.fraction, retain=kept, **options))
    if vision:
        paths.append(NeuronPath.select(vision, config.fraction, scope=config.scope))
    if not paths:
        raise InputError(
            "nothing of the forget set can be scored: questions with pixel_values need a vision tower and "
            "config.vision, the others feed the text tower; expected at least one"
        )
    return paths[0] | paths[1] if len(paths) == 2 else paths[0]
