"""The page: every table and picture, with sentences made from the numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from figures import PLACES, Values, attacks_figure, cross_modal_figure, sweep_figure
from findings import NOT_FORGOTTEN
from probes import NOTES as PROBE_NOTES

from mipfast.demo.report import COLUMNS, accuracy_figure, accuracy_table
from mipfast.demo.run import QUICK, gap
from mipfast.experiment import page
from mipfast.experiment.comparison import FLAGS
from mipfast.experiment.figures import GROUPS, MODALITIES, sample_sd, spread
from mipfast.experiment.page import Bullets, Fold, Grid, Heading, Part, Plot, Verbatim
from mipfast.files import write_json

HEADS = [f"{group} {kind}" for group, kind in COLUMNS]


def write(results: dict[str, Any], folder: Path) -> Path:
    """Write report.json (without the cells, which are files), README.md with pictures/, and report.html; returns the
    path of README.md.

    Raises MipfastError without matplotlib; report.json is on disk by then."""
    write_json(folder / "report.json", {key: value for key, value in results.items() if key != "cells"})
    page.write(folder, results["title"], parts(results), "README.md")
    return folder / "README.md"


def parts(results: dict[str, Any]) -> list[Part]:
    """The whole page of what `cells.run_full` gives."""
    seeds = ", ".join(map(str, results["seeds"]))
    several = "mean ± sample sd over seeds, n where not every seed has a number; " * (len(results["seeds"]) > 1)
    return [
        "python bench/evidence: every method, control, attack and ablation on one tiny vision-language model, a "
        "Qwen2.5-VL of 2.3 M parameters that was trained on 48 invented people (five attributes each, in text and as "
        "drawn portraits) and on general knowledge; 10 % of the people are to be forgotten. Forget sets (seeds) "
        f"{seeds}; {several}accuracy in percent of held-out questions (new wordings, a new view). Sentences beside the "
        "tables are made from their numbers.",
        *_methods(results),
        *_attacks(results),
        *_directions(results),
        *_cross_modal(results),
        *_sweep(results),
        *_flags(results),
        Heading("Limits"),
        Bullets(results["limits"]),
        Heading("Time"),
        Grid("Seconds", ["part", "seconds"], [[part, f"{s:.0f}"] for part, s in results["seconds"].items()]),
        Fold(
            "Configuration, versions, machine",
            [Verbatim(json.dumps({key: results[key] for key in ("config", "versions", "machine")}, indent=1))],
        ),
    ]


def _methods(results: dict[str, Any]) -> list[Part]:
    rows, count = results["rows"], len(results["seeds"])
    lines = [
        [
            row["name"],
            row["stage"],
            "–" if row["neurons"] is None else f"{row['neurons']:,}",
            *(spread(row["accuracy"][group][kind], count) for group, kind in COLUMNS),
            spread(_gaps(row["accuracy"]), count),
        ]
        for row in rows
    ]
    heads = ["method", "stage", "neurons", *HEADS, "gap"]
    note = (
        "gap: mean of retain and general minus mean of forget, in points. neurons: of the first seed. Settings are the "
        "best of eight a row on other forget sets (python bench/tune_demo.py, bench/results/demo_tuning.json)."
    )
    edited = [row for row in rows if row["stage"] not in ("before", "reference") and _gaps(row["accuracy"])]
    return [
        Heading("Methods"),
        Grid("Accuracy after each edit", heads, lines, 1, note, ["stage"]),
        Plot("accuracy.png", "Accuracy by method, group and modality", partial(accuracy_figure, results)),
        *_sentences(_best(edited), _located(rows, count), _nearest(rows)),
        Bullets([f"{row['name']} ({row['stage']}): {row['note']}" for row in rows]),
        Fold("The rows of mipfast demo, one forget set", [_short(results)]),
    ]


def _short(results: dict[str, Any]) -> Grid:
    """The short demo's table, of the first forget set."""
    seeds = results["seeds"]

    def first(values: list[float]) -> list[float]:
        return values[:1] if len(values) == len(seeds) else []  # else nobody knows whose the first is

    rows = [
        row | {"accuracy": {g: {kind: first(row["accuracy"][g][kind]) for kind in MODALITIES} for g in GROUPS}}
        for row in results["rows"]
        if row["key"] in QUICK
    ]
    return accuracy_table(
        {"title": "What mipfast demo shows, retrained with --retrain", "seeds": seeds[:1], "rows": rows}
    )


def _best(rows: list[dict[str, Any]]) -> str:
    ranked = sorted(rows, key=lambda row: -fmean(_gaps(row["accuracy"])))
    shown = [f"{row['name']} ({row['stage']}) {fmean(_gaps(row['accuracy'])):.1f}" for row in ranked]
    return f"By mean gap: {'; '.join(shown)}." if shown else ""


def _located(rows: list[dict[str, Any]], count: int) -> str:
    """Paired by seed: both rows of a seed share forget set, batches and direction."""
    gaps = {row["key"]: _gaps(row["accuracy"]) for row in rows}
    if not len(gaps.get("MIP", [])) == len(gaps.get("random", [])) == count:
        return ""
    apart = spread([a - b for a, b in zip(gaps["MIP"], gaps["random"], strict=True)], count)
    return f"MIP's gap minus that of as many random neurons, paired by seed, is {apart} points."


def _nearest(rows: list[dict[str, Any]]) -> str:
    """How far the rows are from the retrained model, over the six columns."""
    means = {row["name"]: _means(row["accuracy"]) for row in rows if row["stage"] not in ("before", "prune only")}
    target = means.pop("retrained", None)
    far = {
        name: fmean(abs(a - b) for a, b in zip(mean, target, strict=True))
        for name, mean in means.items()
        if mean and target
    }
    if not far:
        return ""
    shown = [f"{name} {far[name]:.1f}" for name in sorted(far, key=far.__getitem__)]
    return f"Mean distance to the retrained model over the six columns, in points: {'; '.join(shown)}."


def _attacks(results: dict[str, Any]) -> list[Part]:
    found, count = results["attacks"], len(results["seeds"])
    if not found:
        return []
    rows = list(dict.fromkeys(row for values in found.values() for row in values))
    lines = [
        [
            row,
            *(
                " / ".join(spread(found[name].get(row, {}).get(kind, []), count) for kind in MODALITIES)
                for name in found
            ),
        ]
        for row in rows
    ]
    notes = [f"{name}: {PROBE_NOTES[name]}" for name in found if name in PROBE_NOTES]
    notes += [
        f"{name}: accuracy about the last two forget people after so many steps on the others, 0 before them"
        for name in found
        if name.startswith("relearned")
    ]
    alt = "Bars of every attack by method and modality beside the retrained model's lines; the table has the numbers"
    return [
        Heading("Attacks"),
        Grid("What comes back, percent, text / image", ["method", *found], lines, 1),
        Plot("attacks.png", alt, partial(attacks_figure, found)),
        *_sentences(_attack_distance(found), _returned(found)),
        Bullets(notes),
    ]


def _attack_distance(found: dict[str, dict[str, Values]]) -> str:
    """A line for each attack: AUCs and accuracies have no common mean."""
    said = []
    for name, values in found.items():
        target = values.get("retrained", {})
        far = {
            row: fmean(abs(fmean(kinds[kind]) - fmean(target[kind])) for kind in MODALITIES)
            for row, kinds in values.items()
            if row not in ("before", "retrained") and all(kinds.values()) and all(target.get(k) for k in MODALITIES)
        }
        if far:
            ranked = sorted(far, key=far.__getitem__)
            said.append(f"{name}: {', '.join(f'{row} {far[row]:.1f}' for row in ranked)}.")
    return f"Mean distance to the retrained model, text and image, in points. {' '.join(said)}" if said else ""


def _returned(found: dict[str, dict[str, Values]]) -> str:
    """Points gained by relearning, mean over seeds and modalities."""
    start, said = found.get("relearned 0", {}), []
    for name, values in found.items():
        gained = {
            row: fmean(fmean(kinds[kind]) - fmean(start[row][kind]) for kind in MODALITIES)
            for row, kinds in values.items()
            if row != "before" and all(kinds.values()) and all(start.get(row, {}).get(kind) for kind in MODALITIES)
        }
        if gained and name.startswith("relearned") and name != "relearned 0":
            ranked = sorted(gained, key=gained.__getitem__)
            said.append(f"Gained by {name}, points: {', '.join(f'{row} {gained[row]:.1f}' for row in ranked)}.")
    return " ".join(said)


def _directions(results: dict[str, Any]) -> list[Part]:
    each, count = results["directions"]["each"], len(results["seeds"])
    lines = [
        [
            one["name"],
            *(f"{one['accuracy'][group][kind]:.1f}" for group, kind in COLUMNS),
            *(_pair(one[rate]) for rate in ("legal", "gibberish")),
        ]
        for one in each
    ]
    rated = [
        [row, *(" / ".join(spread(kinds[kind], count) for kind in MODALITIES) for kinds in found.values())]
        for row, found in results["rates"].items()
    ]
    heads = ["legal text / image", "gibberish text / image"]
    note = (
        "legal: the answer is a value of the asked attribute, right or wrong. gibberish: it is a value of no topic at "
        "all. What is neither is another topic's value."
    )
    return [
        Heading("Steering directions"),
        Grid("MIP along other directions, one forget set, the same batches", ["direction", *HEADS, *heads], lines),
        *_sentences(_direction_spread(results), _direction_agreement(results)),
        Grid("Which words are answered, percent of forget questions", ["method", *heads], rated, 0, note),
    ]


def _direction_spread(results: dict[str, Any]) -> str:
    drawn = [one["accuracy"] for one in results["directions"]["each"] if one["name"].startswith("gaussian")]
    if len(drawn) < 2:
        return ""
    said = f"Sample sd over {len(drawn)} gaussian directions: " + _columns(
        sample_sd([accuracy[group][kind] for accuracy in drawn]) for group, kind in COLUMNS
    )
    mip = next((row["accuracy"] for row in results["rows"] if row["key"] == "MIP"), None)
    if mip is None or len(mip["forget"]["text"]) < 2:
        return said + "."
    over = _columns(sample_sd(mip[group][kind]) for group, kind in COLUMNS)
    return (
        f"{said}. Over the {len(mip['forget']['text'])} forget sets of MIP's row, each with its own direction: {over}."
    )


def _direction_agreement(results: dict[str, Any]) -> str:
    same = results["directions"]["agreement"]
    if not same:
        return ""
    return (
        f"Two gaussian directions give the same word to {same['text']:.0f} percent of the forget questions in text and "
        f"{same['image']:.0f} percent in pictures, mean over all pairs."
    )


def _cross_modal(results: dict[str, Any]) -> list[Part]:
    arms, count = results["cross_modal"], len(results["seeds"])
    lines = [
        [
            f"{100 * arm['share']:.0f} %",
            *(spread(arm["seen"][where][kind], count) for kind in MODALITIES for where in PLACES),
            *(spread(arm["accuracy"][group][kind], count) for group, kind in COLUMNS[2:]),
        ]
        for arm in arms
    ]
    heads = ["shared", *(f"{kind} of facts used in {PLACES[w]}" for kind in MODALITIES for w in PLACES), *HEADS[2:]]
    note = (
        "The forget people's facts are dealt to text and to pictures, equally many to each in every row; shared ones "
        "go to both. The edit sees, and MIP locates with, only what was dealt. Asked are all facts in both modalities: "
        "what goes in a modality that the edit did not use is transfer; where neither was used, spill from the same "
        "people's other facts. A dash: there is no such fact. The more is shared, the fewer facts are edited in all, "
        "from 24 to 12 of 25, and spill falls with them."
    )
    alt = "Accuracy on the forget questions by share of facts in both modalities; the table has the numbers"
    return [
        Heading("Across modalities"),
        Grid("MIP on facts in text, in pictures, or both", heads, lines, 0, note),
        Plot("cross_modal.png", alt, partial(cross_modal_figure, arms)),
        *_sentences(*map(_transfer, arms)),
    ]


def _transfer(arm: dict[str, Any]) -> str:
    said = []
    for kind in MODALITIES:
        known = [f"{fmean(arm['seen'][w][kind]):.0f} ({PLACES[w]})" for w in PLACES if arm["seen"][w][kind]]
        said.append(f"{kind} {', '.join(known)}")
    return f"{100 * arm['share']:.0f} percent shared, accuracy by where the edit used the fact: {'; '.join(said)}."


def _sweep(results: dict[str, Any]) -> list[Part]:
    cells = results["sweep"]
    lines = []
    for cell in cells:
        accuracy = cell["accuracy"]
        numbers = ["–"] * 7
        if accuracy:
            numbers = [f"{accuracy[group][kind]:.1f}" for group, kind in COLUMNS] + [f"{cell['gap']:.1f}"]
        lines.append([f"{100 * cell['ratio']:.0f} %", str(cell["batch"]), f"{cell['lr']:g}", *numbers, cell["region"]])
    note = (
        "collapsed: diverged, or a retain or general accuracy is flagged collapse (below). not forgotten: more than "
        f"{NOT_FORGOTTEN:.0f} percent of the forget questions are still answered. stable: neither. One seed."
    )
    heads = ["forgotten people", "forget batch", "lr", *HEADS, "gap", "region"]
    alt = "Heat maps of the gap by learning rate and forget batch, one for each forget ratio; the table has the numbers"
    return [
        Heading("Settings"),
        Plot("sweep.png", alt, partial(sweep_figure, cells)),
        *_sentences(_regions(cells)),
        Fold(f"The {len(cells)} settings", [Grid("MIP by setting", heads, lines, 0, note, ["region"])]),
    ]


def _regions(cells: list[dict[str, Any]]) -> str:
    names = [cell["region"] for cell in cells]
    known = [cell for cell in cells if cell["accuracy"]]
    if not known:
        return ""
    counted = ", ".join(f"{names.count(name)} {name}" for name in ("stable", "collapsed", "not forgotten"))
    best, worst = max(known, key=lambda cell: cell["gap"]), min(known, key=lambda cell: cell["gap"])
    ends = [
        f"{word} gap is {cell['gap']:.1f} points, with lr {cell['lr']:g} and {cell['batch']} forget questions a step "
        f"at {100 * cell['ratio']:.0f} percent of the people"
        for word, cell in (("largest", best), ("smallest", worst))
    ]
    return f"Of {len(cells)} settings: {counted}. The {ends[0]}; the {ends[1]}."


def _flags(results: dict[str, Any]) -> list[Part]:
    found: dict[tuple[str, str, str], list[int]] = {}
    for one in results["flags"]:
        for name in dict.fromkeys(flag.partition(":")[0] for flag in one["flags"]):
            found.setdefault((one["part"], one["row"], name), []).append(one["seed"])
    lines = [[part, row, name, ", ".join(map(str, seeds))] for (part, row, name), seeds in found.items()]
    names = dict.fromkeys(name for _, _, name in found)
    return [
        Heading("Flags"),
        Grid("What is wrong with which row", ["part", "row", "flag", "seeds"], lines, words=["row", "flag", "seeds"]),
        Bullets([f"{name} means: {FLAGS[name]}." for name in names]),
        Bullets(
            [
                f"{one['row']}, seed {one['seed']}: {flag}"
                for one in results["flags"]
                for flag in one["flags"]
                if flag.startswith("diverged")
            ]
        ),
    ]


def _gaps(accuracy: dict[str, Values]) -> list[float]:
    """Per seed."""
    count = len(accuracy["forget"]["text"])
    return [gap({g: {kind: accuracy[g][kind][i] for kind in MODALITIES} for g in GROUPS}) for i in range(count)]


def _means(accuracy: dict[str, Values]) -> list[float]:
    """Of the six columns, or [] where nothing was measured."""
    return [fmean(accuracy[g][kind]) for g, kind in COLUMNS] if accuracy["forget"]["text"] else []


def _columns(numbers: Iterable[float]) -> str:
    return ", ".join(f"{head} {number:.1f}" for head, number in zip(HEADS, numbers, strict=True))


def _pair(kinds: dict[str, float]) -> str:
    return " / ".join(f"{kinds[kind]:.1f}" for kind in MODALITIES)


def _sentences(*said: str) -> list[Part]:
    text = " ".join(filter(None, said))
    return [text] if text else []
