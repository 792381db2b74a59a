"""The page of `mipfast demo --real`: what `real.run` found, as tables, pictures and sentences."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mipfast.demo.report import path_figure
from mipfast.edit.fit_path import RISE
from mipfast.experiment import page
from mipfast.experiment.figures import size_figure
from mipfast.experiment.page import Bullets, Fold, Grid, Heading, Part, Plot, Verbatim
from mipfast.files import write_json

HEADS = {"before": "before", "pruned": "located\npruned", "random": "random\npruned"}
WHEN = {"before": "before", "pruned": "with located neurons pruned", "random": "with random ones"}
SAID = ("to forget", "to forget, held-out wordings", "same relation", "other relations")
LIMITS = (
    "One model and one set of facts, not a protocol: other facts and other models may answer otherwise.",
    "Of the first wordings only prompts that the model answers are asked, so that before is 100 by choice; held-out "
    "wordings are asked of the same facts whether it answers them or not.",
    "What stands in this table had no part in any choice, but for the first line: the same relation, held-out wordings "
    "and prose were not scored, and of the other relations other facts were.",
    "Pruned, not trained: whether training brings the facts back was not asked.",
)


def verdict(results: dict[str, Any]) -> list[str]:
    """What was seen, in sentences made of the numbers."""
    path, rows = results["path"], {row["name"]: row for row in results["rows"]}
    size = next(size for size in path["curve"] if size["neurons"] == path["neurons"])
    stacks = [stack for path in results["paths"]["MIP"].values() for stack in path.values()]
    total = sum(stack["num_layers"] * stack["num_neurons"] for stack in stacks)
    said = []
    if not path["forgets"]:
        said.append(
            f"No number of neurons that was tried forgets (by {RISE:g} nats of NLL) and is harmless (damage of at most "
            f"{path['max_damage']:g} nats to what is to be kept). "
            + (
                f"Shown is the smallest that forgets, which does damage: {size['damage']:+.3f} nats."
                if size["damage"] > path["max_damage"]
                else "None that was tried forgets at all; shown is the largest harmless one."
            )
        )
    forget = rows["to forget"]
    if forget["right"]["pruned"] >= forget["right"]["before"]:
        rise = forget["nll"]["pruned"] - forget["nll"]["before"]
        said.append(f"No answer was lost: pruning adds {rise:.2f} nats to the NLL of what is to forget, and no more.")
    said.append(
        f"{path['neurons']:,} of {total:,} neurons pruned: damage to what is to be kept {size['damage']:+.3f} nats "
        f"(allowed: {path['max_damage']:g})."
    )
    for name in SAID:
        if right := rows.get(name, {}).get("right"):
            said.append(
                f"{name}: " + ", ".join(f"{right[state]:.0f} % right {when}" for state, when in WHEN.items()) + "."
            )
    return said


def table(results: dict[str, Any]) -> Grid:
    """A line per group of prompts: answers right, and their NLL, before, with located and with random neurons
    pruned."""
    heads = ["", "prompts", *HEADS.values()]
    rows = [[row["name"], str(row["prompts"]), *(_cell(row, state) for state in HEADS)] for row in results["rows"]]
    note = (
        "Percent of answers whose every token is ranked first / NLL of answers in nats per token; perplexity of prose."
    )
    draws = len(results["config"]["random seeds"])
    return Grid(results["title"], heads, rows, note=f"{note} Random: the mean of {draws} draws of the path's size.")


def _cell(row: dict[str, Any], state: str) -> str:
    nll = row["nll"][state]
    return f"ppl {math.exp(nll):.1f}" if row["name"] == "plain prose" else f"{row['right'][state]:.0f} / {nll:.2f}"


def curve(results: dict[str, Any]) -> Grid:
    """What each number of neurons did, as `fit_path` tried them."""
    rows = [
        [str(size["neurons"]), f"{size['forget']:.3f}", f"{size['damage']:+.4f}"] for size in results["path"]["curve"]
    ]
    return Grid("What each size does", ["neurons", "NLL to forget", "damage"], rows, note="In nats per token.")


def continuations(results: dict[str, Any]) -> Grid:
    heads = ["prompt", *HEADS.values()]
    rows = [[page.line(one[key]) for key in ("prompt", *HEADS)] for one in results["continued"]]
    return Grid("What it writes", heads, rows, words=heads)


def seconds(results: dict[str, Any]) -> Grid:
    return Grid("Seconds", ["stage", "seconds"], [[stage, f"{s:.1f}"] for stage, s in results["seconds"].items()])


def shown(results: dict[str, Any]) -> list[Part]:
    """What a terminal shows, where the last line is the first that is read."""
    sizes = [] if results["path"]["forgets"] else [curve(results)]
    limits = Bullets([*results["limits"], *LIMITS])
    return [continuations(results), *sizes, table(results), seconds(results), limits, Bullets(verdict(results))]


def parts(results: dict[str, Any]) -> list[Part]:
    """The whole page."""
    facts = {key: results[key] for key in ("config", "versions", "machine")}
    return [
        f"To forget: {', '.join(results['to forget'])}.",
        Bullets(verdict(results)),
        table(results),
        Fold("What each size does", [curve(results)]) if results["path"]["forgets"] else curve(results),
        *(Plot(name, alt, partial(draw, results)) for name, (draw, alt) in FIGURES.items()),
        continuations(results),
        seconds(results),
        Heading("Limits"),
        Bullets([*results["limits"], *LIMITS]),
        Fold("Configuration, versions, machine", [Verbatim(json.dumps(facts, indent=1))]),
    ]


def write_report(results: dict[str, Any], folder: Path) -> Path:
    """Write report.json, report.md with pictures/ and report.html; returns the path of report.html."""
    write_json(folder / "report.json", results)
    return page.write(folder, results["title"], parts(results))


FIGURES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "sizes.png": (
        lambda results: size_figure(results["path"]),
        "NLL of what is to be forgotten, and damage to what is to be kept, by the number of neurons pruned",
    ),
    "path.png": (path_figure, "The located and as many random neurons by layer"),
}
