"""The page of a comparison: its tables, its figures, and what the models wrote."""

from __future__ import annotations

import json
import math
import textwrap
from functools import partial
from itertools import chain, product
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from mipfast.data.records import RECORD_MODALITIES
from mipfast.experiment.comparison import FLAGS, HEADLINE, KEPT, KNOWLEDGE, ROLES, VANILLA, Comparison, Measure, Run
from mipfast.experiment.figures import COLOUR, PALE, bars_figure, drawing, sample_sd, size_figure, spread
from mipfast.experiment.page import Bullets, Fold, Grid, Heading, Part, Plot, Verbatim, line, plain
from mipfast.judge.records import ROW_FILES, read_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SHOWN = 3  # answers of each kind
MARKER = {"text": "o", "image": "^"}
UP = dict.fromkeys(KEPT, "↑")
AIMS = {metric: {"forget": "↓"} | UP for metric in KNOWLEDGE} | {
    "legal": {"forget": "↑"} | UP,
    "truth_ratio": {"forget": "→1"} | dict.fromkeys(KEPT, "↓"),
    "truth_ratio_forget": {"forget": "↑"},
    "truth_ratio_retain": UP,
}


def overview(comparison: Comparison) -> Grid:
    """Rates over the headline metrics, and flags, a line for each row."""
    sides = [side for side in product(ROLES, RECORD_MODALITIES) if any(row.overall(*side) for row in comparison.rows)]
    heads = [f"{'forgotten' if role == 'forget' else f'{role} kept'}\n{modality}, %" for role, modality in sides]
    lines = []
    for row in comparison.rows:
        size = len(row.scores)
        rates = [spread(row.overall(*side), size) for side in sides]
        named = [flag if n == size else f"{flag} ({n} of {size})" for flag, n in row.flagged.items()]
        lines.append([row.label, *rates, ", ".join(named)])
    of = ", ".join(f"{task} {metric}" for task, metric in comparison.headline) or "nothing: no headline metric is here"
    note = "forgotten = 100 (vanilla − now) / vanilla on the forget set; kept = 100 now / vanilla. "
    note += f"Each is the mean over {of}, of those in which the vanilla model is above 0. "
    if "choice" in dict(comparison.headline):
        note += "A model that guesses still picks some choices right: of these it never forgets 100 %."
    before = sum(row.is_vanilla for row in comparison.rows)
    return Grid(
        "Forgotten and kept, of what the vanilla model had", ["run", *heads, "flags"], lines, before, note, ["flags"]
    )


def metric_grid(comparison: Comparison, task: str, metric: str) -> Grid:
    """One metric of every row by role and modality; small print: the rate relative to the vanilla model."""
    measures = [measure for measure in comparison.measures if measure[2:] == (task, metric)]
    heads = []
    for measure in measures:
        counts = {s.counts[measure] for row in comparison.rows for s in row.scores if measure in s.counts}
        size = f", n = {'–'.join(map(str, sorted({min(counts), max(counts)})))}" if counts else ""
        aim = AIMS.get(metric, {}).get(measure.role, "")
        heads.append(f"{measure.role} {aim}".strip() + f"\n{measure.modality}{size}")
    lines = []
    for row in comparison.rows:
        cells = []
        for measure in measures:
            rates = [] if row.is_vanilla else row.rates(measure)
            word = "gone" if measure.role == "forget" else "kept"
            small = f"\n{spread(rates, len(row.scores))} % {word}" if rates else ""
            cells.append(spread(row.means(measure), len(row.scores), digits=3) + small)
        lines.append([row.label, *cells])
    before = sum(row.is_vanilla for row in comparison.rows)
    return Grid(f"{task}: {metric}" if task else metric, ["run", *heads], lines, before)


def notes(comparison: Comparison) -> list[str]:
    """Every flag of every row in words, then what their names mean."""
    said = [f"{row.name}: {flag}" for row in comparison.rows for flag in dict.fromkeys(chain(*row.flags))]
    seen = {name for row in comparison.rows for name in row.flagged}
    return said + [f"{name} means: {words}." for name, words in FLAGS.items() if name in seen]


def answers(run: Run, model: str) -> list[Part]:
    """A model's answers of the forget set with the highest and the lowest scores, beside target and vanilla answer:
    of the first task of HEADLINE that the folder has texts for. Empty where it has none.

    Raises ArtefactError for a damaged folder."""
    scores, vanilla = run.models[model], _texts(run, VANILLA)
    ranked: dict[str, list[tuple[float, str, dict[str, Any]]]] = {}
    for (group, i), row in _texts(run, model).items():
        cell = "/".join([group, row["modality"], row["task"], HEADLINE[row["task"]]])
        score = scores.each.get(cell, {}).get(i)
        if run.roles.get(group) == "forget" and score is not None:
            ranked.setdefault(row["task"], []).append((-score, i, row))
    task = next((task for task in HEADLINE if task in ranked), None)
    if task is None:
        return []

    def shown(score: float, i: str, row: dict[str, Any]) -> Verbatim:
        before = vanilla.get((row["group"], i))
        lines = [
            f"{row['group']}/{i} ({row['modality']}), {task} {HEADLINE[row['task']]} {abs(score):.3f}",
            f"asked:   {row['prompt']}",
            f"target:  {row['target']}",
            *([f"vanilla: {before['text']}"] if before else []),
            f"wrote:   {row['text']}",
        ]
        return Verbatim(plain("\n".join(lines)))

    order = sorted(ranked[task], key=lambda entry: entry[:2])
    best, least = order[:SHOWN], order[SHOWN:][-SHOWN:][::-1]
    told: list[Part] = ["Highest scores:", *(shown(*entry) for entry in best)]
    return told + (["Lowest scores:", *(shown(*entry) for entry in least)] if least else [])


def parts(comparison: Comparison) -> list[Part]:
    """The whole report. Raises ArtefactError where a run's answers are damaged."""
    report: list[Part] = [overview(comparison)]
    if said := notes(comparison):
        report.append(Bullets(said))
    if dots := _dots(comparison):
        report.append(Plot("forget-retain.png", _dots_alt(dots), partial(forget_retain_figure, dots)))
    for i, run in enumerate(comparison.runs):
        if "curve" in (path := run.facts.get("path", {})):
            alt = f"{run.name}: NLL of forget answers and damage by neurons pruned; chosen {path['neurons']}"
            report.append(Plot(f"size-{i}.png", alt, partial(size_figure, path, run.name)))
    legend = "↓ lower is better, ↑ higher is better, →1 better near one, – not measured, n: number of samples."
    several = any(len(row.scores) > 1 for row in comparison.rows)
    report += [Heading("Every metric"), legend + " ±: sample sd over seeds." * several]
    for task, metric in comparison.headline:
        report.append(metric_grid(comparison, task, metric))
        if roles := [r for r in ROLES if any(p.role == r and p[2:] == (task, metric) for p in comparison.measures)]:
            bars = partial(bars_figure, f"{task}: {metric}, percent", _bars(comparison, task, metric), roles)
            alt = f"Bars of {task} {metric} by run, role and modality; the table above has the numbers"
            report.append(Plot(f"{task}-{metric}.png", alt, bars))
    others = sorted({measure[2:] for measure in comparison.measures} - set(comparison.headline))
    rest = [metric_grid(comparison, task, metric) for task, metric in others]
    report += [Fold(f"{len(rest)} more metrics", rest)] if rest and comparison.headline else rest
    edited = [(run, model) for run in comparison.runs for model in run.models if model != VANILLA]
    if told := [Fold(f"{run.name}: {line(model)}", some) for run, model in edited if (some := answers(run, model))]:
        report += [Heading("What the models write about the forget set"), *told]
    report.append(Heading("Runs"))
    for run in comparison.runs:
        said = [run.facts.get("title", "an evaluation without summary.json")]
        said += [f"seed {run.facts['seed']}"] if run.facts.get("seed") is not None else []
        said += [f"{sum(filter(None, run.facts['seconds'].values())):.0f} s"] if run.facts.get("seconds") else []
        facts = json.dumps({"folder": str(run.folder)} | run.facts, indent=1)
        report.append(Fold(f"{run.name}: {line(', '.join(said))}", [Verbatim(facts)]))
    return report


class Dot(NamedTuple):
    """number, name: of the row. forgotten, kept: percent, one for each seed."""

    number: int
    name: str
    modality: str
    forgotten: list[float]
    kept: list[float]


@drawing
def forget_retain_figure(dots: list[Dot]) -> Figure:
    """Forgotten against kept, a dot for each row and modality with the sample sd over seeds."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(9, 4.8), layout="constrained")
    figure.suptitle("Forgotten against kept: up and to the right is better")
    axes = figure.subplots()
    axes.plot(0, 100, marker="D", ms=9, color=COLOUR["retain"], ls="none", zorder=1)
    axes.annotate("vanilla", (0, 100), (8, 8), textcoords="offset points")
    ends: dict[int, list[tuple[float, float]]] = {}
    for dot in dots:
        x, y, marker = fmean(dot.forgotten), fmean(dot.kept), MARKER[dot.modality]
        xerr, yerr = sample_sd(dot.forgotten) or None, sample_sd(dot.kept) or None
        axes.errorbar(x, y, yerr, xerr, marker=marker, ms=9, color=COLOUR[dot.modality], ls="none", elinewidth=0.9)
        side = {"xytext": (6, 5)} if dot.modality == "text" else {"xytext": (-6, -5), "ha": "right", "va": "top"}
        axes.annotate(str(dot.number), (x, y), textcoords="offset points", **side)
        ends.setdefault(dot.number, []).append((x, y))
    for points in ends.values():
        axes.plot(*zip(*points, strict=True), color=PALE, linewidth=1, zorder=0)
    xs, ys = zip((0, 100), *chain(*ends.values()), strict=True)
    axes.set(xlim=(min(xs) - 8, max(100, *xs) + 8), ylim=(min(0, *ys) - 4, max(ys) + 10))
    axes.set(xlabel="forgotten of the forget set, percent", ylabel="kept of the retain set, percent")
    names = {dot.number: dot.name for dot in dots}
    handles = [
        *(Line2D([], [], marker=how, ls="none", color=COLOUR[m], label=f"{m} questions") for m, how in MARKER.items()),
        *(Line2D([], [], ls="none", label=textwrap.fill(f"{i}  {name}", 30)) for i, name in names.items()),
    ]
    figure.legend(handles=handles, loc="outside right upper")
    return figure


def _dots(comparison: Comparison) -> list[Dot]:
    dots = []
    for number, row in enumerate((row for row in comparison.rows if not row.is_vanilla), start=1):
        for modality in RECORD_MODALITIES:
            forgotten, kept = row.overall("forget", modality), row.overall("retain", modality)
            if forgotten and kept and all(map(math.isfinite, forgotten + kept)):
                dots.append(Dot(number, row.name, modality, forgotten, kept))
    return dots


def _dots_alt(dots: list[Dot]) -> str:
    each = (f"{d.name} {d.modality} {fmean(d.forgotten):.0f} and {fmean(d.kept):.0f}" for d in dots)
    return f"Percent forgotten and percent kept, where vanilla is 0 and 100: {'; '.join(each)}"


def _bars(comparison: Comparison, task: str, metric: str) -> dict[str, Any]:
    """The metric in percent, as `bars_figure` takes it."""
    rows = []
    for row in comparison.rows:
        shares = {
            role: {m: [100 * mean for mean in row.means(Measure(role, m, task, metric))] for m in RECORD_MODALITIES}
            for role in ROLES
        }
        stage = "before" if row.is_vanilla else "after"
        rows.append({"name": textwrap.fill(row.name, 26), "stage": stage, "accuracy": shares})
    return {"rows": rows}


def _texts(run: Run, model: str) -> dict[tuple[str, str], dict[str, Any]]:
    """{(group, id): row} of what the model wrote, empty where that is not in the folder."""
    folder = run.models[model].folder if model in run.models else None
    rows = read_records(folder).rows if folder and any(folder.glob(ROW_FILES)) else []
    return {(row["group"], row["id"]): row for row in rows}
