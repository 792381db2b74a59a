"""What the cells say together, as one dict of JSON-only values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from mipfast.demo.people import Question
from mipfast.demo.run import gap, table_row
from mipfast.experiment.comparison import Measure, Scores, flags
from mipfast.experiment.figures import GROUPS, MODALITIES

RATED = ("MIP", "GradDiff", "NPO + retain", "retrained")  # beside the directions
NOT_FORGOTTEN = 50.0  # percent of the forget questions
Cells = Iterable[dict[str, Any]]
Asked = Callable[[int], Sequence[Question]]


def rates(
    questions: Sequence[Question], answers: Sequence[str], options: dict[str, list[str]]
) -> dict[str, dict[str, float]]:
    """Percent of answers that are legal, a value of the asked attribute, and gibberish, a value of no topic at all;
    what is neither is another topic's value."""
    every = set(chain.from_iterable(options.values()))
    found: dict[str, dict[str, float]] = {"legal": {}, "gibberish": {}}
    for kind in MODALITIES:
        pairs = [(q, answer) for q, answer in zip(questions, answers, strict=True) if q.modality == kind]
        found["legal"][kind] = 100 * fmean(answer in options[q.topic] for q, answer in pairs)
        found["gibberish"][kind] = 100 * fmean(answer not in every for _, answer in pairs)
    return found


def agreement(questions: Sequence[Question], each: Sequence[Sequence[str]]) -> dict[str, float]:
    """Percent of questions that two models answer with the same word, mean over all pairs. {} for fewer than two."""
    pairs = list(combinations(each, 2))
    if not pairs:
        return {}
    at = {kind: [i for i, q in enumerate(questions) if q.modality == kind] for kind in MODALITIES}
    return {kind: 100 * fmean(fmean(a[i] == b[i] for i in some) for a, b in pairs) for kind, some in at.items()}


def flagged(accuracy: dict[str, dict[str, float]], before: dict[str, dict[str, float]]) -> list[str]:
    """`flags` of a row, beside the model before."""

    def means(of: dict[str, dict[str, float]]) -> dict[Measure, float]:
        return {Measure(group, kind, "cloze", "accuracy"): of[group][kind] for group in of for kind in of[group]}

    return flags(Scores(means(accuracy), {}, {}, Path(), means(before)))


def region(accuracy: dict[str, dict[str, float]], said: Sequence[str]) -> str:
    """stable, collapsed (flagged collapse or diverged) or not forgotten (more than half of the forget questions)."""
    if any(flag.startswith(("collapse", "diverged")) for flag in said):
        return "collapsed"
    return "not forgotten" if fmean(accuracy["forget"].values()) > NOT_FORGOTTEN else "stable"


def collect(cells: Cells, questions: Asked, options: dict[str, list[str]]) -> dict[str, Any]:
    """cells: as `cells.finish` gives them. questions: of a seed, those that "answers" answer. A cell that diverged
    gives a flag and no number.

    rows: as `report.write_report` takes them, and key, the row's name in ROWS. attacks: {attack: {row: {modality: [per
    seed]}}}. rates: {row: {"legal" and "gibberish": {modality: [per seed]}}}. directions: {"each": [{name, accuracy,
    legal, gibberish}], "agreement": {modality: percent, over the gaussian ones}}. cross_modal: [{share, seen: {where:
    {modality: [per seed]}}, accuracy: as in rows}]. sweep: [{ratio, batch, lr, accuracy and gap or None, region}].
    flags: [{part, row, seed, flags}]."""
    every = list(cells)
    parts: dict[str, list[dict[str, Any]]] = {}
    for cell in every:
        if "diverged" not in cell["result"]:
            parts.setdefault(cell["facts"]["part"], []).append(cell["facts"] | cell["result"])
    methods = parts.get("methods", [])
    before = {cell["seed"]: cell["accuracy"] for cell in methods if cell["row"] == "before"}
    swept = {c["ratio"]: c["accuracy"] for c in parts.get("sweep", []) if "lr" not in c}
    said = []
    for cell in every:
        facts, result = cell["facts"], cell["result"]
        if "diverged" in result:
            found = [f"diverged: {result['diverged']}"]
        else:
            found = flagged(result["accuracy"], swept[facts["ratio"]] if "ratio" in facts else before[facts["seed"]])
        said.append({name: facts[name] for name in ("part", "row", "seed")} | {"flags": found})
    rows = dict.fromkeys(cell["facts"]["row"] for cell in every if cell["facts"]["part"] == "methods")
    return {
        "rows": [{"key": row} | table_row(row, [c for c in methods if c["row"] == row]) for row in rows],
        "attacks": _attacks(methods, questions),
        "rates": _rates(methods, questions, options),
        "directions": _directions(parts.get("directions", []), questions, options),
        "cross_modal": _cross_modal(parts.get("cross-modal", [])),
        "sweep": [_swept(cell, one["flags"]) for cell, one in zip(every, said, strict=True) if "lr" in cell["facts"]],
        "flags": [one for one in said if one["flags"]],
    }


def _each(cells: Cells, *keys: str) -> dict[str, list[float]]:
    """{modality: [per cell]} of what is under the keys."""
    found: dict[str, list[float]] = {kind: [] for kind in MODALITIES}
    for cell in cells:
        value: Any = cell
        for key in keys:
            value = value.get(key, {})
        for kind in value:
            found[kind].append(value[kind])
    return found


def _attacks(methods: Cells, questions: Asked) -> dict[str, dict[str, dict[str, list[float]]]]:
    """And "relearned 0": what the people whom relearning is judged on are known by before it."""
    attacked = [
        cell | {"attacks": _not_yet(questions(cell["seed"]), cell["answers"]) | cell["attacks"]}
        for cell in methods
        if "attacks" in cell
    ]
    rows = dict.fromkeys(cell["row"] for cell in attacked)
    names = dict.fromkeys(chain.from_iterable(cell["attacks"] for cell in attacked))
    return {
        name: {row: _each([c for c in attacked if c["row"] == row], "attacks", name) for row in rows} for name in names
    }


def _not_yet(asked: Sequence[Question], answers: Sequence[str]) -> dict[str, dict[str, float]]:
    judged = sorted({q.subject for q in asked if q.subject is not None})[-2:]
    hits: dict[str, list[bool]] = {kind: [] for kind in MODALITIES}
    for q, answer in zip(asked, answers, strict=True):
        if q.subject in judged:
            hits[q.modality].append(answer == q.answer)
    return {"relearned 0": {kind: 100 * fmean(some) for kind, some in hits.items()}}


def _rates(methods: Cells, questions: Asked, options: dict[str, list[str]]) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in methods:
        if cell["row"] in RATED:
            rated = rates(questions(cell["seed"]), cell["answers"], options)
            found.setdefault(cell["row"], []).append(rated)
    return {row: {rate: _each(some, rate) for rate in ("legal", "gibberish")} for row, some in found.items()}


def _directions(cells: Sequence[dict[str, Any]], questions: Asked, options: Any) -> dict[str, Any]:
    if not cells:
        return {"each": [], "agreement": {}}
    asked = questions(cells[0]["seed"])  # one forget set for all of them
    each = [
        {"name": cell["row"], "accuracy": cell["accuracy"]} | rates(asked, cell["answers"], options) for cell in cells
    ]
    drawn = [cell["answers"] for cell in cells if cell["row"].startswith("gaussian")]
    return {"each": each, "agreement": agreement(asked, drawn)}


def _cross_modal(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for share in dict.fromkeys(cell["share"] for cell in cells):
        mine = [cell for cell in cells if cell["share"] == share]
        seen = {where: _each(mine, "seen", where) for where in ("same", "other", "neither")}
        found.append({"share": share, "seen": seen, "accuracy": {g: _each(mine, "accuracy", g) for g in GROUPS}})
    return found


def _swept(cell: dict[str, Any], said: list[str]) -> dict[str, Any]:
    accuracy = cell["result"].get("accuracy")
    place = {name: cell["facts"][name] for name in ("ratio", "batch", "lr")}
    known = {"accuracy": accuracy, "gap": accuracy and gap(accuracy)}
    return place | known | {"region": region(accuracy or {}, said)}
