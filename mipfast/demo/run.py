"""The demo: one forget set after another through locate, prune, RMisU and their controls."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from mipfast.demo import model as tiny
from mipfast.demo import people
from mipfast.demo.trial import (
    BATCH,
    PRUNE_FRACTION,
    RELEARN_STEPS,
    ROWS,
    SETTINGS,
    STEERING_LAYER,
    STEPS,
    Trial,
)
from mipfast.edit.neuron_path import NeuronPath
from mipfast.errors import ArtefactError
from mipfast.experiment.figures import GROUPS, MODALITIES
from mipfast.files import machine, versions, write_atomic
from mipfast.model.sites import Sites

log = logging.getLogger("mipfast")

WEIGHTS = Path(__file__).parent / "weights"
QUICK = (  # the rows that take two minutes; "random prune" is shown as "random"
    "before",
    "snr",
    "mean",
    "random prune",
    "MIP",
    "random",
    "IGI only",
    "IFI only",
    "plain RMU",
    "retrained",
)
RELEARNED = ("MIP", "random", "plain RMU", "retrained")


def run(seeds: list[int], ratio: float, out: Path, retrain: bool = False, progress: bool = True) -> dict[str, Any]:
    """The whole demo on the forget sets of some seeds; `ratio` of the people are forgotten.

    Writes out/model (the first seed's MIP-edited model), out/pictures, and returns the results `report.write_report`
    takes. retrain: train the base (out/base) and, for every forget set, a model that never saw its people
    (out/retrained-SEED) from nothing; without it the row "retrained" is not measured."""
    started = time.monotonic()
    base, encoder = load_base()
    if retrain:
        encoder.tokenizer = tiny.build_tokenizer(encoder.world)
        base = tiny.trained(encoder, None, out / "base")
    results: dict[str, Any] = {
        "title": "mipfast demo",
        "seeds": seeds,
        "steering_layer": STEERING_LAYER,
        "config": {
            "forget ratio": ratio,
            "retrained base": retrain,
            "prune fraction": PRUNE_FRACTION,
            "RMisU steps": STEPS,
            "questions per step": BATCH,
            "settings": {row: asdict(SETTINGS[row]) for row in QUICK if row in SETTINGS},
        },
        "versions": versions(),
        "machine": machine(),
        "runs": [],
    }
    for seed in seeds:
        log.info("forget set %d (%d of %d)", seed, seeds.index(seed) + 1, len(seeds))
        trial = Trial(base, encoder, encoder.world.split(seed, ratio), seed, progress)
        results["runs"].append(_run_seed(trial, out, results, retrain, first=seed == seeds[0]))
    results["rows"] = [table_row(name, _measured(name, results["runs"])) for name in QUICK]
    results["limits"] = _limits(results["runs"])
    if ratio > 0.05:
        results["limits"].append(_relearning(results["runs"]))
    stages = [run["seconds"] for run in results["runs"]]
    results["seconds"] = {stage: round(sum(s[stage] for s in stages), 1) for stage in stages[0]}
    results["seconds"]["all"] = round(time.monotonic() - started, 1)
    return results


def _run_seed(trial: Trial, out: Path, results: dict[str, Any], retrain: bool, first: bool) -> dict[str, Any]:
    """Every row of one forget set; of the first one also what the pictures need."""
    rows: dict[str, dict[str, Any]] = {}
    predictions: dict[str, list[str]] = {}

    def judge(row: str, neurons: int | None, model: nn.Module | None = None, edit: dict | None = None) -> None:
        accuracy, answers = trial.judge(model)
        rows[row] = {"accuracy": accuracy, "neurons": neurons, "edit": edit}
        if len(trial.split.forget_people) > 2 and row in RELEARNED:
            rows[row]["relearned"] = trial.relearning(model)
        predictions[row] = [answers[q] for q in trial.questions]
        shown = "  ".join(f"{g} {accuracy[g]['text']:5.1f} /{accuracy[g]['image']:5.1f}" for g in GROUPS)
        log.info("%-12s text / image  %s", row, shown)

    judge("before", None)
    trial.locate()
    for row, path in trial.prune_paths().items():
        with trial.pruned(path):
            judge(row, path.num_neurons)
    hidden = {"before": trial.hidden()} if first else {}
    shown: dict[str, NeuronPath] = {}
    for row in filter(SETTINGS.__contains__, QUICK):
        with trial.edited(row, SETTINGS[row]) as (path, edit):
            judge(row, path.num_neurons or None, edit=edit)
            if first and row in ("MIP", "random"):
                shown[row], hidden[row] = path, trial.hidden()
            if first and row == "MIP":
                tiny.save(trial.model, trial.encoder, out / "model", torch.float32)
    if retrain:
        judge("retrained", None, tiny.trained(trial.encoder, trial.split, out / f"retrained-{trial.seed}"))
    if first:
        results["paths"] = {row: path_facts(trial.sites, path) for row, path in shown.items()}
        results["residuals"] = _residuals(trial, hidden)
        results["locate"] = {"text": trial.forget_snr.report, "vision": trial.forget_vision.report}
        _save_pictures(trial, out / "pictures")
    return {
        "seed": trial.seed,
        "forget people": sorted(trial.encoder.world.people[i] for i in trial.split.forget_people),
        "rows": rows,
        "questions": [_question_facts(trial.split, q) for q in trial.questions],
        "predictions": predictions,
        "seconds": trial.seconds,
    }


def _measured(name: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run["rows"][name] for run in runs if name in run["rows"]]


def table_row(name: str, measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A line of the table, as `report.write_report` takes it. measured: of each seed, {"accuracy": as `Trial.judge`
    gives it, "neurons"}."""
    return {
        "name": name.removesuffix(" prune"),
        "stage": ROWS[name].stage,
        "note": ROWS[name].note,
        "neurons": measured[0]["neurons"] if measured else None,
        "accuracy": {g: {kind: [one["accuracy"][g][kind] for one in measured] for kind in MODALITIES} for g in GROUPS},
    }


def gap(accuracy: dict[str, dict[str, float]], kept: Sequence[str] = GROUPS[1:]) -> float:
    """Mean accuracy of the kept groups minus mean forget accuracy, in points. accuracy: as `Trial.judge` gives it."""
    return fmean(accuracy[group][kind] for group in kept for kind in MODALITIES) - fmean(accuracy["forget"].values())


def _limits(runs: list[dict[str, Any]]) -> list[str]:
    """What the table does not show, and how located neurons did against random ones, from the numbers themselves."""
    located, random_ = (
        fmean(gap(one["accuracy"], ["retain"]) for one in _measured(row, runs)) for row in ("MIP", "random")
    )
    limits = [
        "Toy scale: 2.3 M parameters, 48 invented people. Nothing here is evidence about a 3B model.",
        f"After RMisU, retain minus forget is {located:.1f} points with located neurons and {random_:.1f} with "
        "random ones of the same budget.",
    ]
    if not _measured("retrained", runs):
        limits.append(
            "retrained is not measured: a model that never saw the forget people has to be trained first, minutes for "
            "each forget set. `mipfast demo --retrain` does, and `python bench/evidence` in the source tree."
        )
    return limits


def _relearning(runs: list[dict[str, Any]]) -> str:
    """What comes back about two forget people when the model is shown the others again."""
    shown = []
    for row in RELEARNED:
        if found := [one["relearned"] for one in _measured(row, runs)]:
            text, image = (fmean(one[kind] for one in found) for kind in MODALITIES)
            shown.append(f"{row} {text:.0f} / {image:.0f}")
    return (
        f"{RELEARN_STEPS} steps of relearning on the other forget people bring back, "
        f"for the last two (text / image, percent): {'; '.join(shown)}."
    )


def path_facts(sites: Sites, path: NeuronPath) -> dict[str, Any]:
    """The neurons of a path by stack and layer, as `report.path_figure` takes them."""
    stacks = {}
    for stack in sites.stacks:
        neurons = {str(layer): sorted(index.tolist()) for (name, layer), index in path.items() if name == stack.name}
        stacks[stack.name] = {
            "num_layers": stack.num_layers,
            "num_neurons": stack.num_neurons,
            "neurons": neurons,
        }
    return {"stacks": stacks}


def _residuals(trial: Trial, hidden: dict[str, dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Edited minus original hidden states: relative length per layer, and two principal axes at the steering layer."""
    edits = [row for row in hidden if row != "before"]
    moved = {(row, g): hidden[row][g] - hidden["before"][g] for row in edits for g in ("forget", "retain")}
    stacked = torch.cat([m[STEERING_LAYER] for m in moved.values()]).double()
    axes = torch.linalg.svd(stacked, full_matrices=False).Vh[:2].T  # not centred: the origin is "did not move"
    out: dict[str, Any] = {row: {} for row in edits}
    for (row, group), m in moved.items():
        relative = m.norm(dim=-1) / hidden["before"][group].norm(dim=-1)
        points = m[STEERING_LAYER].double() @ axes
        out[row][group] = {
            "relative_norm": [round(v, 4) for v in relative.mean(1).tolist()],
            "points": [[round(x, 3) for x in p] for p in points.tolist()],
        }
    return out


def _question_facts(split: people.Split, q: people.Question) -> dict[str, Any]:
    group = "general" if q.subject is None else "forget" if q.subject in split.forget_people else "retain"
    picture = f"pictures/{q.pictures[0]}.png" if q.pictures else None
    return {
        "group": group,
        "modality": q.modality,
        "topic": q.topic,
        "text": q.text,
        "answer": q.answer,
        "picture": picture,
    }


def _save_pictures(trial: Trial, folder: Path) -> None:
    for index in sorted({q.pictures[0] for q in trial.questions if q.pictures}):
        write_atomic(folder / f"{index}.png", trial.encoder.world.pictures[index].save)


def load_base() -> tuple[nn.Module, tiny.Encoder]:
    """The shipped model in fp32, and the world's encoder with the tokenizer and image processor shipped beside it."""
    from transformers import AutoTokenizer

    folder = WEIGHTS / "base"
    if not (folder / "model.safetensors").is_file():
        raise ArtefactError(
            f"{folder} holds no model.safetensors: the demo's shipped weights are missing; reinstall mipfast"
        )
    world = people.build(seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = tiny.image_processor_class().from_pretrained(folder)
    return tiny.load(folder), tiny.Encoder(world, tokenizer, processor)
