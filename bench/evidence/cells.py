"""Every row, attack and ablation on the demo's model, in cells that a stop leaves behind.

A cell is one edit and all that is asked of it. OUT/cells/NAME.json holds
    key: hash of versions, the base's weights, settings and counts, not of code
    facts: what the cell is, JSON; seconds: float
    result: {"accuracy": {group: {modality: percent}}, "neurons": int or None, "answers": [a word per forget question],
        and as far as asked "attacks": {attack: {modality: float}}, "seen": {where: {modality: percent}}};
        or {"diverged": message}
The same command skips cells whose key is the same, so that a killed run goes on to the results of one that was not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from findings import collect
from probes import PROBES
from torch import nn
from tqdm.auto import tqdm

from mipfast._version import __version__
from mipfast.demo import model as tiny
from mipfast.demo import people, run
from mipfast.demo import trial as trials
from mipfast.demo.people import Question, Split
from mipfast.demo.trial import ROWS, SETTINGS, Trial, rmisu
from mipfast.edit.neuron_path import NeuronPath
from mipfast.errors import DivergedError
from mipfast.experiment.figures import MODALITIES
from mipfast.files import clear_left_over, machine, versions, write_atomic, write_json

log = logging.getLogger("mipfast")

SEEDS = (0, 1, 2)
RATIO = 0.10
# what a retrained reference depends on, beside versions and forget set
RECIPE: dict[str, Any] = {"steps": tiny.TRAIN_STEPS, "lr": tiny.TRAIN_LR, "mix": tiny.TRAIN_MIX}
ATTACKED = (
    *("before", "MIP", "random", "plain RMU", "MIP down", "MIP learned"),
    *("GradDiff", "NPO + retain", "RMU", "retrained"),
)
RELEARNING = (5, 20)  # steps
DIRECTIONS: dict[str, dict[str, Any]] = {f"gaussian {seed}": {"seed": seed} for seed in range(1, 6)}
DIRECTIONS |= {kind: {"direction": kind} for kind in ("uniform", "learned")}
SHARES = (0.0, 0.25, 0.5, 1.0)  # of a modality's facts that the other one has too
SWEPT_LR, SWEPT_BATCH, SWEPT_RATIO = (3e-3, 1e-2, 3e-2), (12, 24, 48), (0.05, 0.10, 0.15)
LIMITS = [
    "Toy scale: 2.3 M parameters, 48 invented people, one base model. Nothing here is evidence about a 3B model.",
    "A seed draws the forget set, the batches, the direction and the random neurons together; under Steering "
    "directions the direction alone differs.",
    "Directions and settings are of one forget set, and the settings are judged on the questions that the best of them "
    "would be chosen by.",
    "Relearning is judged on two of the forget people: 30 questions in a modality and seed.",
]


class Bench:
    """The base model, and the trial of one forget set at a time, located when a cell first needs it."""

    def __init__(self, references: Path) -> None:
        """references: folder of the retrained references."""
        self.references = references
        self.base, self.encoder = run.load_base()
        self._trial: Trial | None = None
        self._is_located = False

    def split(self, seed: int, ratio: float = RATIO) -> Split:
        return self.encoder.world.split(seed, ratio)

    def trial(self, split: Split, seed: int, located: bool = True) -> Trial:
        if self._trial is None or (self._trial.split, self._trial.seed) != (split, seed):
            self._trial = Trial(self.base, self.encoder, split, seed, progress=False)
            self._is_located = False
        if located and not self._is_located:
            self._trial.locate()
            self._is_located = True
        return self._trial

    def reference(self, seed: int) -> nn.Module:
        """The model that never saw the forget people: found in the references' folder, or trained into it."""
        folder = self.references / f"{seed}-{_hash([_common()['versions'], RATIO, RECIPE])}"
        if not folder.exists():
            log.info("training the reference of forget set %d", seed)
            clear_left_over(self.references)
            with torch.random.fork_rng():
                write_atomic(folder, partial(tiny.trained, self.encoder, self.split(seed)))
        return tiny.load(folder)


@dataclass(frozen=True)
class Cell:
    """facts: JSON; what its result depends on beside what all cells have in common, and what it is found by."""

    name: str
    facts: dict[str, Any]
    make: Callable[[Bench], dict[str, Any]]


@dataclass(frozen=True)
class Dealt(Split):
    """A split whose forget questions of a modality are about some (person, topic) alone, in training; the test has
    all of them."""

    facts: dict[str, frozenset[tuple[int, str]]]

    def select(self, group: str, test: bool, modality: str | None = None) -> list[Question]:
        found = super().select(group, test, modality)
        if group != "forget" or test:
            return found
        return [q for q in found if (q.subject, q.topic) in self.facts[q.modality]]

    def where(self, question: Question) -> str:
        """Whether the question's modality had its fact: "same", only the "other" one, or "neither"."""
        fact = (question.subject, question.topic)
        if fact in self.facts[question.modality]:
            return "same"
        return "other" if any(fact in facts for facts in self.facts.values()) else "neither"


def deal(split: Split, seed: int, share: float) -> Dealt:
    """As many facts to text as to pictures, `share` of them to both: 12 of 25 each, so that every share leaves as many.

    Text has the same facts whatever the share."""
    facts = sorted({(q.subject, q.topic) for q in split.select("forget", test=False) if q.subject is not None})
    random.Random(f"deal {seed}").shuffle(facts)
    count = len(facts) // 2 // 4 * 4  # by four: quarters are whole facts
    start = count - round(share * count)
    dealt = {"text": frozenset(facts[:count]), "image": frozenset(facts[start : start + count])}
    return Dealt(split.world, split.forget_people, dealt)


def forget_questions(split: Split) -> list[Question]:
    """What "answers" answer, in order."""
    return [q for kind in MODALITIES for q in split.select("forget", test=True, modality=kind)]


def judged(trial: Trial, model: nn.Module, neurons: int | None) -> dict[str, Any]:
    accuracy, answers = trial.judge(model)
    return {
        "accuracy": accuracy,
        "neurons": neurons,
        "answers": [answers[q] for q in forget_questions(trial.split)],
    }


def attacks(trial: Trial, model: nn.Module) -> dict[str, dict[str, float]]:
    found = {name: probe(trial, model) for name, probe in PROBES.items()}
    return found | {f"relearned {steps}": trial.relearning(model, steps) for steps in RELEARNING}


def method(seed: int, row: str, bench: Bench) -> dict[str, Any]:
    """One row of the demo's table, on one forget set, and what gets it back out."""
    is_edit = ROWS[row].edit is not None
    trial = bench.trial(bench.split(seed), seed, located=is_edit or ROWS[row].stage == "prune only")
    model, path = trial.model, NeuronPath()
    with ExitStack() as applied:
        if is_edit:
            path, _ = applied.enter_context(trial.edited(row, SETTINGS[row]))
        elif ROWS[row].stage == "prune only":
            path = trial.prune_paths()[row]
            applied.enter_context(trial.pruned(path))
        elif row == "retrained":
            model = bench.reference(seed)
        result = judged(trial, model, path.num_neurons or None)
        return result | ({"attacks": attacks(trial, model)} if row in ATTACKED else {})


def direction(seed: int, changes: dict[str, Any], bench: Bench) -> dict[str, Any]:
    """MIP along another direction; the forget set, its neurons, the batches and their order stay."""
    trial = bench.trial(bench.split(seed), seed)
    with trial.applied(rmisu("MIP", **changes), SETTINGS["MIP"]) as (path, _):
        return judged(trial, trial.model, path.num_neurons)


def cross_modal(seed: int, share: float, bench: Bench) -> dict[str, Any]:
    """MIP that sees some facts in text and some in pictures; "seen" has accuracy by `Dealt.where`."""
    split = deal(bench.split(seed), seed, share)
    trial = bench.trial(split, seed)
    with trial.edited("MIP", SETTINGS["MIP"]) as (path, _):
        result = judged(trial, trial.model, path.num_neurons)
    hits: dict[str, dict[str, list[bool]]] = {}
    for question, answer in zip(forget_questions(split), result["answers"], strict=True):
        hits.setdefault(split.where(question), {}).setdefault(question.modality, []).append(answer == question.answer)
    seen = {where: {kind: 100 * fmean(some) for kind, some in kinds.items()} for where, kinds in hits.items()}
    return result | {"seen": seen}


def swept(seed: int, ratio: float, batch: int | None, lr: float | None, bench: Bench) -> dict[str, Any]:
    """MIP with other settings; without them, the model before."""
    split = bench.split(seed, ratio)
    if batch is None or lr is None:
        trial = bench.trial(split, seed, located=False)
        return judged(trial, trial.model, None)
    trial = bench.trial(split, seed)
    sizes = trials.BATCH | {"forget": batch}
    with trial.applied(rmisu("MIP", sizes=sizes), replace(SETTINGS["MIP"], lr=lr)) as (path, _):
        return judged(trial, trial.model, path.num_neurons)


def cells(seeds: Sequence[int]) -> list[Cell]:
    """In the order they are made: what shares a trial follows one another."""
    found: list[Cell] = []
    first, mip = seeds[0], asdict(SETTINGS["MIP"])

    def add(part: str, seed: int, row: str, make: Callable[..., dict[str, Any]], **facts: Any) -> None:
        name = "-".join([part, str(seed), *"".join(c if c.isalnum() or c == "." else " " for c in row).split()])
        found.append(Cell(name, {"part": part, "seed": seed, "row": row, **facts}, make))

    for seed in seeds:
        for row in ROWS:
            facts: dict[str, Any] = {"setting": asdict(SETTINGS[row])} if row in SETTINGS else {}
            if row == "retrained":
                facts["recipe"] = RECIPE
            if row in ATTACKED:
                facts |= {"probes": list(PROBES), "relearning": RELEARNING}
            add("methods", seed, row, partial(method, seed, row), **facts)
        if seed == first:
            for row, changes in DIRECTIONS.items():
                add("directions", seed, row, partial(direction, seed, changes), setting=mip, changes=changes)
        for share in SHARES:
            row = f"{100 * share:.0f} %"
            add("cross-modal", seed, row, partial(cross_modal, seed, share), setting=mip, share=share)
    for ratio in SWEPT_RATIO:
        place: dict[str, Any] = {"ratio": ratio}
        add("sweep", first, f"{100 * ratio:.0f} before", partial(swept, first, ratio, None, None), **place)
        for batch in SWEPT_BATCH:
            for lr in SWEPT_LR:
                place = {"ratio": ratio, "batch": batch, "lr": lr}
                row = f"{100 * ratio:.0f} % batch {batch} lr {lr:g}"
                add("sweep", first, row, partial(swept, first, ratio, batch, lr), setting=mip, **place)
    return found


def run_full(seeds: Sequence[int], out: Path, progress: bool = True) -> dict[str, Any]:
    """Every cell, in out/cells, and what they say together: what `page.write` takes. "cells" holds them all."""
    found = finish(cells(seeds), out, progress)
    world = people.build(seed=0)

    def asked(seed: int) -> list[Question]:
        return forget_questions(world.split(seed, RATIO))

    seconds: dict[str, float] = {}
    for entry in found.values():
        part = entry["facts"]["part"]
        seconds[part] = seconds.get(part, 0.0) + entry["seconds"]
    return {
        "title": "What the demo shows, in full",
        "seeds": list(seeds),
        "config": _common() | {"settings": {row: asdict(setting) for row, setting in SETTINGS.items()}},
        "versions": versions(),
        "machine": machine(),
        **collect(found.values(), asked, world.options),
        "seconds": seconds | {"all": sum(seconds.values())},
        "limits": LIMITS,
        "cells": found,
    }


def finish(wanted: Sequence[Cell], out: Path, progress: bool) -> dict[str, dict[str, Any]]:
    """Make the cells that out/cells does not hold yet; {name: what is on disk} of all of them, in order."""
    folder = out / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    clear_left_over(folder)
    common = _common()
    keys = {cell.name: _hash([common, cell.facts]) for cell in wanted}
    found = {cell.name: _read(folder / f"{cell.name}.json", keys[cell.name]) for cell in wanted}
    missing = [cell for cell in wanted if found[cell.name] is None]
    if len(missing) < len(wanted):
        log.info("%d of %d cells are in %s", len(wanted) - len(missing), len(wanted), folder)
    bench = Bench(out / "references") if missing else None
    with tqdm(total=len(wanted), initial=len(wanted) - len(missing), unit="cell", disable=not progress) as bar:
        for cell in missing:
            assert bench is not None
            bar.set_description(cell.name)
            started = time.monotonic()
            torch.manual_seed(cell.facts["seed"])  # whatever ran before it, in this process or another
            try:
                result = cell.make(bench)
            except DivergedError as error:
                result = {"diverged": str(error)}
            seconds = round(time.monotonic() - started, 2)
            entry = {"key": keys[cell.name], "facts": cell.facts, "seconds": seconds, "result": result}
            write_json(folder / f"{cell.name}.json", entry)
            found[cell.name] = json.loads(json.dumps(entry))  # as it will be read back
            bar.update()
            if not progress:
                log.info("%s: %.0f s", cell.name, seconds)
    return {name: entry for name, entry in found.items() if entry}


def _common() -> dict[str, Any]:
    """What every cell depends on."""
    return {
        "versions": {"mipfast": __version__, "torch": torch.__version__, "transformers": version("transformers")},
        "base": _digest(run.WEIGHTS / "base" / "model.safetensors"),
        "forget ratio": RATIO,
        "steps": trials.STEPS,
        "batch": trials.BATCH,
        "located": [trials.LOCATE_FORGET, trials.LOCATE_RETAIN],
        "layer": trials.STEERING_LAYER,
        "pruned": trials.PRUNE_FRACTION,
    }


def _read(path: Path, key: str) -> dict[str, Any] | None:
    """A finished cell of this key, or None."""
    try:
        entry = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        log.warning("%s is damaged; made again", path)
        return None
    return entry if isinstance(entry, dict) and entry.get("key") == key else None


def _hash(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
