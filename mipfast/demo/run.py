"""The demo: one forget set after another through locate, prune, RMisU and their controls."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mipfast.demo import model as tiny
from mipfast.demo import people
from mipfast.demo.trial import (
    BATCH,
    GROUPS,
    MODALITIES,
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
from mipfast.files import machine, versions, write_atomic

log = logging.getLogger("mipfast")

WEIGHTS = Path(__file__).parent / "weights"
REFERENCE_SEEDS, REFERENCE_RATIO = (0, 1, 2), 0.10  # forget sets the shipped retrained references never saw
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
    takes. retrain: train the base from nothing first (out/base) and use that."""
    started = time.monotonic()
    base, encoder = load_base()
    if retrain:
        encoder.tokenizer = tiny.build_tokenizer(encoder.world)
        base = tiny.build_model(len(encoder.tokenizer))
        tiny.train(base, encoder, None)
        tiny.save(base, encoder, out / "base")
        base = tiny.load(out / "base")  # what is judged has been rounded to bf16, like the shipped weights
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
        results["runs"].append(_run_seed(trial, ratio, out, results, first=seed == seeds[0]))
    results["rows"] = [_row(name, results["runs"]) for name in QUICK]
    results["limits"] = _limits(results["rows"])
    if ratio > 0.05:
        results["limits"].append(_relearning(results["runs"]))
    stages = [run["seconds"] for run in results["runs"]]
    results["seconds"] = {stage: round(sum(s[stage] for s in stages), 1) for stage in stages[0]}
    results["seconds"]["all"] = round(time.monotonic() - started, 1)
    return results


def _run_seed(trial: Trial, ratio: float, out: Path, results: dict[str, Any], first: bool) -> dict[str, Any]:
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
    if ratio == REFERENCE_RATIO and trial.seed in REFERENCE_SEEDS:
        judge("retrained", None, tiny.load(WEIGHTS / f"retrained-{trial.seed}"))
    if first:
        results["paths"] = {row: _path_facts(trial, path) for row, path in shown.items()}
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


def _row(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    found = [run["rows"][name] for run in runs if name in run["rows"]]
    return {
        "name": name.removesuffix(" prune"),
        "stage": ROWS[name].stage,
        "note": ROWS[name].note,
        "neurons": found[0]["neurons"] if found else None,
        "accuracy": {g: {kind: [row["accuracy"][g][kind] for row in found] for kind in MODALITIES} for g in GROUPS},
    }


def _limits(rows: list[dict[str, Any]]) -> list[str]:
    """What the table does not show, and how located neurons did against random ones, from the numbers themselves."""
    after = {row["name"]: row for row in rows if row["stage"] == "RMisU"}

    def gap(row: dict[str, Any]) -> float:
        def mean(group: str) -> float:
            values = [v for kind in MODALITIES for v in row["accuracy"][group][kind]]
            return sum(values) / len(values)

        return mean("retain") - mean("forget")

    located, random_ = gap(after["MIP"]), gap(after["random"])
    return [
        "Toy scale: 2.3 M parameters, 48 invented people. Nothing here is evidence about a 3B model.",
        f"After RMisU, retain minus forget is {located:.1f} points with located neurons and {random_:.1f} with "
        "random ones of the same budget.",
    ]


def _relearning(runs: list[dict[str, Any]]) -> str:
    """What comes back about two forget people when the model is shown the others again."""
    shown = []
    for row in RELEARNED:
        found = [run["rows"][row]["relearned"] for run in runs if row in run["rows"]]
        if found:
            text, image = (sum(f[kind] for f in found) / len(found) for kind in MODALITIES)
            shown.append(f"{row} {text:.0f} / {image:.0f}")
    return (
        f"{RELEARN_STEPS} steps of relearning on the other forget people bring back, "
        f"for the last two (text / image, percent): {'; '.join(shown)}."
    )


def _path_facts(trial: Trial, path: NeuronPath) -> dict[str, Any]:
    stacks = {}
    for stack in trial.sites.stacks:
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
