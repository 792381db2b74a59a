"""Runs side by side: what each of them forgot and kept, with what is wrong beside it.

A run's folder holds eval/<model>/, as `evaluate_records` writes it, and summary.json, JSON-only values:
    models: {model: {"group/modality/task/metric": mean or null}}; "vanilla" is the one that the edits started from
    roles: {"forget", "retain" and "general": [group]}; title: str; config, versions, machine, neurons: dicts;
    seed: int; seconds: {stage: float}; flags: [str]; all but models may be absent
A folder with NAME_SUMMARY.json (and NAME_EVAL.json) alone is one model without vanilla; its groups have the roles that
the other runs give them.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from mipfast.errors import ArtefactError, InputError
from mipfast.experiment.figures import COLOUR, GROUPS, MODALITIES, PALE, bars_figure, drawing, sample_sd, spread
from mipfast.experiment.page import Bullets, Fold, Grid, Heading, Part, Picture, Verbatim, line, plain
from mipfast.judge.metrics import forgetting_rate, retention
from mipfast.judge.records import ROWS, read_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure


VANILLA = "vanilla"
HEADLINE = {"generation": "rouge_l", "cloze": "accuracy", "choice": "accuracy"}  # task: the metric that rates are of
KEPT = ("retain", "general")
GAP, COLLAPSE = 25.0, 15.0  # percentage points; percent of the vanilla model's score
SHOWN = 3  # answers of each kind
MARKER = {"text": "o", "image": "^"}


UP = dict.fromkeys(KEPT, "↑")
# in these a rate relative to the vanilla model has a meaning
KNOWLEDGE = {"accuracy", "likelihood_accuracy", "exact_match", "rouge_l", "rouge_l_recall", "bleu"}
KNOWLEDGE |= {"probability", "normalised_probability"}
AIMS = {metric: {"forget": "↓"} | UP for metric in KNOWLEDGE} | {
    "legal": {"forget": "↑"} | UP,
    "truth_ratio": {"forget": "→1"} | dict.fromkeys(KEPT, "↓"),
    "truth_ratio_forget": {"forget": "↑"},
    "truth_ratio_retain": UP,
}
FLAGS = {
    "no_vanilla": "the folder has no vanilla model to compare with, so there are no rates",
    "diverged": "a metric, or a loss in training, is nan or infinite",
    "inconsistent_modality": "text and image questions of the forget set are forgotten at rates more than "
    f"{GAP:.0f} percentage points apart",
    "collapse": f"less than {COLLAPSE:.0f} % of the vanilla model's score is left on a retain or general set",
    "run_note": "what the run itself has to say",
    "missing_metrics": "another row has metrics that this one lacks (–): their mean rates are of different things",
}


class Place(NamedTuple):
    role: str
    modality: str
    task: str
    metric: str


@dataclass(frozen=True)
class Scores:
    """means: the mean of each place, nan where it is not finite. counts: its number of samples, absent where unknown.
    each: {"group/modality/task/metric": {id: value}}, as far as it is on disk. folder: where the answers are."""

    means: dict[Place, float]
    counts: dict[Place, int]
    each: dict[str, dict[str, float | None]]
    folder: Path

    @property
    def fingerprint(self) -> str:
        return repr(sorted(self.means.items()))  # as text, nan equals nan

    def rate(self, base: Scores | None, place: Place) -> float | None:
        """Percent, relative to base: forgetting rate on a forget set, else retention; None where neither is defined."""
        if base is None or place.metric not in KNOWLEDGE or place.role not in GROUPS or place not in self.means:
            return None
        rate = forgetting_rate if place.role == "forget" else retention
        return rate(base.means[place], self.means[place]) if base.means.get(place) else None

    def overall(self, base: Scores | None, role: str, modality: str) -> float | None:
        """The mean rate over the HEADLINE metrics there are."""
        rates = [self.rate(base, Place(role, modality, *measure)) for measure in HEADLINE.items()]
        known = [rate for rate in rates if rate is not None]
        return fmean(known) if known else None


@dataclass(frozen=True)
class Run:
    name: str
    folder: Path
    facts: dict[str, Any]
    roles: dict[str, str]
    models: dict[str, Scores]

    @property
    def recipe(self) -> str:
        """What runs that differ in the seed alone have in common."""
        if self.facts.get("seed") is None:
            return self.name
        same = [_without(self.facts.get("config"), "seed", "out", "title"), self.facts.get("versions"), self.roles]
        return json.dumps([same, sorted(self.models)], sort_keys=True)


@dataclass(frozen=True)
class Row:
    """A model of one run, or of several that differ in the seed alone; scores, bases and flags have an entry for each.
    bases: the vanilla model's scores or None. flags: of "name: words"."""

    name: str
    scores: list[Scores]
    bases: Sequence[Scores | None]
    flags: list[list[str]]
    is_vanilla: bool = False

    def means(self, place: Place) -> list[float]:
        return [scores.means[place] for scores in self.scores if place in scores.means]

    def rates(self, place: Place) -> list[float]:
        found = [scores.rate(base, place) for scores, base in zip(self.scores, self.bases, strict=True)]
        return [rate for rate in found if rate is not None]

    def overall(self, role: str, modality: str) -> list[float]:
        found = [scores.overall(base, role, modality) for scores, base in zip(self.scores, self.bases, strict=True)]
        return [rate for rate in found if rate is not None]

    @property
    def label(self) -> str:
        return self.name + f"\n{len(self.scores)} seeds" * (len(self.scores) > 1)

    @property
    def flagged(self) -> dict[str, int]:
        """{name of a flag: how many of the runs have it}."""
        names = [{flag.partition(":")[0] for flag in flags} for flags in self.flags]
        return {name: sum(name in some for some in names) for name in sorted(set().union(*names))}


@dataclass(frozen=True)
class Comparison:
    """rows: every distinct vanilla model, then the models of the runs, in the order given."""

    runs: list[Run]
    rows: list[Row]

    @property
    def title(self) -> str:
        return f"{len(self.runs)} runs compared" if len(self.runs) > 1 else self.runs[0].name

    @cached_property
    def places(self) -> list[Place]:
        found = dict.fromkeys(place for row in self.rows for scores in row.scores for place in scores.means)
        roles = [*GROUPS, *sorted({place.role for place in found} - set(GROUPS))]
        modes = [*MODALITIES, *sorted({place.modality for place in found} - set(MODALITIES))]
        return sorted(found, key=lambda place: (roles.index(place.role), modes.index(place.modality)))

    @cached_property
    def headline(self) -> list[tuple[str, str]]:
        """(task, metric) of HEADLINE, as far as there are."""
        return [measure for measure in HEADLINE.items() if any(place[2:] == measure for place in self.places)]

    @cached_property
    def others(self) -> list[tuple[str, str]]:
        return sorted({place[2:] for place in self.places} - set(self.headline))


def compare(folders: Iterable[str | Path]) -> Comparison:
    """Read runs and put them beside each other.

    Raises InputError for no folder or one given twice, ArtefactError for one that holds no finished run."""
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise InputError("there is nothing to compare; give the folders of one or more runs")
    full = [path.resolve() for path in paths]
    if twice := {str(path) for path in full if full.count(path) > 1}:
        raise InputError(f"{', '.join(sorted(twice))} is given more than once; give every folder once")
    read = [_read(path) for path in paths]
    every: dict[str, str] = {}
    for facts, _ in read:
        every |= _roles(facts)
    last = [path.name for path in full]
    runs = []
    for path, name, (facts, models) in zip(paths, last, read, strict=True):
        roles = _roles(facts) or every
        scores = {model: _scores(means, folder, roles) for model, (means, folder) in models.items()}
        unique = last.count(name) == 1 and name != VANILLA
        runs.append(Run(line(name if unique else path), path, facts, roles, scores))
    return Comparison(runs, _rows(runs))


def flags(scores: Scores, base: Scores | None, places: Iterable[Place] = ()) -> list[str]:
    """What is wrong with a model, as "name: words". base: the vanilla model. places: what other rows have.

    no_vanilla: base is None. diverged: a mean is not finite. inconsistent_modality: on the forget set, the mean
    forgetting rates of text and of image questions, over the HEADLINE metrics that both have, are more than GAP = 25
    percentage points apart. collapse: a HEADLINE metric's retention on a retain or general set is below COLLAPSE =
    15 %. missing_metrics: one of places has no value."""
    found = ["no_vanilla: nothing to compare with"] if base is None else []
    if bad := [place for place, mean in scores.means.items() if not math.isfinite(mean)]:
        found.append(f"diverged: not finite is {_listed(map(_named, bad))}")
    rates = {place: scores.rate(base, place) for place in scores.means if HEADLINE.get(place.task) == place.metric}
    known = {place: rate for place, rate in rates.items() if rate is not None}
    both = [
        (known[p], known[q])
        for p in known
        if p[:2] == ("forget", "text") and (q := p._replace(modality="image")) in known
    ]
    if both:
        text, image = (fmean(side) for side in zip(*both, strict=True))
        if abs(text - image) > GAP:
            found.append(f"inconsistent_modality: {text:.0f} % forgotten in text, {image:.0f} % in images")
    if low := sorted((rate, place) for place, rate in known.items() if place.role in KEPT and rate < COLLAPSE):
        found.append(f"collapse: left is {_listed([f'{rate:.0f} % of {_named(place)}' for rate, place in low])}")
    if missing := [place for place in places if place not in scores.means]:
        found.append(f"missing_metrics: {_listed(map(_named, missing))}")
    return found


def overview(comparison: Comparison) -> Grid:
    """Rates over the headline metrics, and flags, a line for each row."""
    sides = [(role, modality) for role in GROUPS for modality in MODALITIES]
    sides = [side for side in sides if any(row.overall(*side) for row in comparison.rows)]
    heads = [f"{'forgotten' if role == 'forget' else f'{role} kept'}\n{modality}, %" for role, modality in sides]
    lines = []
    for row in comparison.rows:
        rates = [spread(row.overall(*side), len(row.scores)) for side in sides]
        size = len(row.scores)
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
    places = [place for place in comparison.places if place[2:] == (task, metric)]
    heads = []
    for place in places:
        counts = {s.counts[place] for row in comparison.rows for s in row.scores if place in s.counts}
        size = f", n = {'–'.join(map(str, sorted({min(counts), max(counts)})))}" if counts else ""
        heads.append(f"{place.role} {AIMS.get(metric, {}).get(place.role, '')}".strip() + f"\n{place.modality}{size}")
    lines = []
    for row in comparison.rows:
        cells = []
        for place in places:
            rates = [] if row.is_vanilla else row.rates(place)
            word = "gone" if place.role == "forget" else "kept"
            small = f"\n{spread(rates, len(row.scores))} % {word}" if rates else ""
            cells.append(spread(row.means(place), len(row.scores), digits=3) + small)
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
    found: list[Part] = ["Highest scores:", *(shown(*entry) for entry in best)]
    return found + (["Lowest scores:", *(shown(*entry) for entry in least)] if least else [])


def parts(comparison: Comparison) -> list[Part]:
    """The whole report. Raises ArtefactError where a run's answers are damaged."""
    found: list[Part] = [overview(comparison)]
    if said := notes(comparison):
        found.append(Bullets(said))
    if dots := _dots(comparison):
        found.append(Picture("forget-retain.png", _dots_alt(dots), partial(forget_retain_figure, dots)))
    legend = "↓ lower is better, ↑ higher is better, →1 better near one, – not measured, n: number of samples."
    several = any(len(row.scores) > 1 for row in comparison.rows)
    found += [Heading("Every metric"), legend + " ±: sample sd over seeds." * several]
    for task, metric in comparison.headline:
        found.append(metric_grid(comparison, task, metric))
        if roles := [r for r in GROUPS if any(p.role == r and p[2:] == (task, metric) for p in comparison.places)]:
            bars = partial(bars_figure, f"{task}: {metric}, percent", _bars(comparison, task, metric), roles)
            alt = f"Bars of {task} {metric} by run, role and modality; the table above has the numbers"
            found.append(Picture(f"{task}-{metric}.png", alt, bars))
    rest = [metric_grid(comparison, *measure) for measure in comparison.others]
    found += [Fold(f"{len(rest)} more metrics", rest)] if rest and comparison.headline else rest
    edited = [(run, model) for run in comparison.runs for model in run.models if model != VANILLA]
    if told := [Fold(f"{run.name}: {line(model)}", some) for run, model in edited if (some := answers(run, model))]:
        found += [Heading("What the models write about the forget set"), *told]
    found.append(Heading("Runs"))
    for run in comparison.runs:
        said = [run.facts.get("title", "an evaluation without summary.json")]
        said += [f"seed {run.facts['seed']}"] if run.facts.get("seed") is not None else []
        said += [f"{sum(filter(None, run.facts['seconds'].values())):.0f} s"] if run.facts.get("seconds") else []
        facts = json.dumps({"folder": str(run.folder)} | run.facts, indent=1)
        found.append(Fold(f"{run.name}: {line(', '.join(said))}", [Verbatim(facts)]))
    return found


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
        *(Line2D([], [], marker=MARKER[m], ls="none", color=COLOUR[m], label=f"{m} questions") for m in MODALITIES),
        *(Line2D([], [], ls="none", label=textwrap.fill(f"{i}  {name}", 30)) for i, name in names.items()),
    ]
    figure.legend(handles=handles, loc="outside right upper")
    return figure


def _dots(comparison: Comparison) -> list[Dot]:
    found = []
    for number, row in enumerate((row for row in comparison.rows if not row.is_vanilla), start=1):
        for modality in MODALITIES:
            forgotten, kept = row.overall("forget", modality), row.overall("retain", modality)
            if forgotten and kept and all(map(math.isfinite, forgotten + kept)):
                found.append(Dot(number, row.name, modality, forgotten, kept))
    return found


def _dots_alt(dots: list[Dot]) -> str:
    each = (f"{d.name} {d.modality} {fmean(d.forgotten):.0f} and {fmean(d.kept):.0f}" for d in dots)
    return f"Percent forgotten and percent kept, where vanilla is 0 and 100: {'; '.join(each)}"


def _bars(comparison: Comparison, task: str, metric: str) -> dict[str, Any]:
    """The metric in percent, as `bars_figure` takes it."""
    rows = []
    for row in comparison.rows:
        shares: dict[str, dict[str, list[float]]] = {role: {} for role in GROUPS}
        for role in GROUPS:
            for modality in MODALITIES:
                means = row.means(Place(role, modality, task, metric))
                shares[role][modality] = [100 * mean for mean in means]
        stage = "before" if row.is_vanilla else "after"
        rows.append({"name": textwrap.fill(row.name, 26), "stage": stage, "accuracy": shares})
    return {"rows": rows}


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[dict[str, Any], Path]]]:
    """(summary.json without its models, {model: (its means, the folder of its answers)})."""
    if (folder / "summary.json").is_file():
        facts = _json(folder / "summary.json")
        models = facts.pop("models", None)
        if not isinstance(models, dict) or not models or not all(isinstance(means, dict) for means in models.values()):
            raise ArtefactError(f"{folder / 'summary.json'} has no models, {{name: {{metric: mean}}}}; run again")
        return facts, {model: (means, folder / "eval" / model) for model, means in models.items()}
    if summaries := sorted(folder.glob("*_SUMMARY.json")):
        return {}, {"model": ({key: value for path in summaries for key, value in _json(path).items()}, folder)}
    found = f"{folder} has neither summary.json nor NAME_SUMMARY.json"
    if (folder / "run.json").exists() or (folder / "eval").exists():
        raise ArtefactError(f"{found}: its run has not finished; give the command that began it again, and it goes on")
    raise ArtefactError(f"{found}; expected the folder of a finished run or evaluation")


def _json(path: Path) -> dict[str, Any]:
    """Raises ArtefactError for what is no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtefactError(f"{path} is damaged ({error}); remove it and run again") from error
    if not isinstance(found, dict):
        raise ArtefactError(f"{path} holds {type(found).__name__}, expected a JSON object; remove it and run again")
    return found


def _roles(facts: dict[str, Any]) -> dict[str, str]:
    return {group: role for role, groups in facts.get("roles", {}).items() for group in groups}


def _scores(means: dict[str, Any], folder: Path, roles: dict[str, str]) -> Scores:
    """The groups of a role are pooled, by their numbers of samples or, where one is not known, alike."""
    each: dict[str, dict[str, float | None]] = {}
    for path in sorted(folder.glob("*_EVAL.json")):
        for key, found in _json(path).items():
            metric, values = key.rsplit("/", 1)[-1], found.get("value_by_index") if isinstance(found, dict) else None
            each[key] = {i: value.get(metric) for i, value in (values or {}).items() if isinstance(value, dict)}
    pools: dict[Place, list[tuple[float, int]]] = {}
    for key, mean in means.items():
        if mean is not None and not isinstance(mean, int | float):
            raise ArtefactError(f"{folder}: {key} is {mean!r}; expected a number or null")
        names = line(key).rsplit("/", 3)
        group, *rest = names if len(names) == 4 else ["all", "", "", line(key)]
        value = math.nan if mean is None or not math.isfinite(mean) else float(mean)
        pools.setdefault(Place(roles.get(group, group), *rest), []).append((value, len(each.get(key, ()))))
    pooled, counts = {}, {}
    for place, pool in pools.items():
        values, sizes = zip(*pool, strict=True)
        pooled[place] = fmean(values, sizes if all(sizes) else None)
        if all(sizes):
            counts[place] = sum(sizes)
    return Scores(pooled, counts, each, folder)


def _rows(runs: list[Run]) -> list[Row]:
    places = list(dict.fromkeys(chain.from_iterable(scores.means for run in runs for scores in run.models.values())))
    joined: dict[str, list[Run]] = {}
    for run in runs:
        recipe = run.recipe
        while run.facts.get("seed") in [other.facts.get("seed") for other in joined.get(recipe, [])]:
            recipe += " again"  # one seed twice is not two draws
        joined.setdefault(recipe, []).append(run)
    vanillas: dict[tuple[str, ...], tuple[list[Scores], list[str]]] = {}
    rows = []
    for some in joined.values():
        name, bases = ", ".join(run.name for run in some), [run.models.get(VANILLA) for run in some]
        if known := [base for base in bases if base]:
            prints = [base.fingerprint for base in known]
            if len(set(prints)) == 1:  # one model, not a draw for each seed
                known, prints = known[:1], prints[:1]
            vanillas.setdefault(tuple(prints), (known, []))[1].append(name)
        edited = [model for model in some[0].models if model != VANILLA]
        for model in edited:
            every = [run.models[model] for run in some]
            said = [
                [*flags(scores, base, places), *(f"run_note: {line(flag)}" for flag in run.facts.get("flags", []))]
                for run, scores, base in zip(some, every, bases, strict=True)
            ]
            rows.append(Row(name if len(edited) == 1 else f"{name}: {line(model)}", every, bases, said))
    before = []
    for known, names in vanillas.values():
        name = VANILLA if len(vanillas) == 1 else f"{VANILLA} of {'; '.join(names)}"
        before.append(Row(name, known, known, [flags(scores, scores, places) for scores in known], is_vanilla=True))
    return before + rows


def _texts(run: Run, model: str) -> dict[tuple[str, str], dict[str, Any]]:
    """{(group, id): row} of what the model wrote, empty where that is not in the folder."""
    folder = run.models[model].folder if model in run.models else None
    rows = read_records(folder).rows if folder and any(folder.glob(ROWS)) else []
    return {(row["group"], row["id"]): row for row in rows}


def _named(place: Place) -> str:
    return "/".join(filter(None, place))


def _listed(items: Iterable[str]) -> str:
    found = [*items]
    return ", ".join(found[:3]) + f" and {len(found) - 3} more" * (len(found) > 3)


def _without(value: Any, *names: str) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner, *names) for key, inner in value.items() if key not in names}
    return value
