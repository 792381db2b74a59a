"""Runs side by side: what each of them forgot and kept, and what is wrong with it.

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
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from mipfast.data.records import RECORD_MODALITIES
from mipfast.errors import ArtefactError, InputError
from mipfast.experiment.config import without
from mipfast.experiment.page import line
from mipfast.files import read_json
from mipfast.judge.metrics import forgetting_rate, retention

VANILLA = "vanilla"
KEPT = ("retain", "general")
ROLES = ("forget", *KEPT)
HEADLINE = {"generation": "rouge_l", "cloze": "accuracy", "choice": "accuracy"}  # task: the metric that rates are of
GAP, COLLAPSE = 25.0, 15.0  # percentage points; percent of the vanilla model's score
# in these a rate relative to the vanilla model has a meaning
KNOWLEDGE = {"accuracy", "likelihood_accuracy", "exact_match", "rouge_l", "rouge_l_recall", "bleu"}
KNOWLEDGE |= {"probability", "normalised_probability", "exact_memorisation", "extraction_strength"}
FLAGS = {
    "no_vanilla": "the folder has no vanilla model to compare with, so there are no rates",
    "diverged": "a metric, or a loss in training, is nan or infinite",
    "inconsistent_modality": "text and image questions of the forget set are forgotten at rates more than "
    f"{GAP:.0f} percentage points apart",
    "collapse": f"less than {COLLAPSE:.0f} % of the vanilla model's score is left on a retain or general set",
    "run_note": "what the run itself has to say",
    "missing_metrics": "another row has metrics that this one lacks (–): their mean rates are of different things",
}


FACTS: dict[str, type] = dict.fromkeys(("roles", "config", "versions", "machine", "neurons", "path", "seconds"), dict)
FACTS |= {"title": str, "flags": list}


class Measure(NamedTuple):
    """What one mean of a model is of. role: one of ROLES, or the group's own name where no run gives it a role."""

    role: str
    modality: str
    task: str
    metric: str


@dataclass(frozen=True)
class Scores:
    """What one model of one run scored."""

    means: dict[Measure, float]
    """nan where a mean is not finite."""
    counts: dict[Measure, int]
    """Samples of each mean, absent where unknown."""
    each: dict[str, dict[str, float | None]]
    """{"group/modality/task/metric": {id: value}}, as far as it is on disk."""
    folder: Path
    """Where the answers are."""
    vanilla: dict[Measure, float] | None = None
    """The means of its run's vanilla model, its own where it is that one."""

    def rate(self, measure: Measure) -> float | None:
        """Percent, relative to the vanilla model: forgetting rate on a forget set, else retention; None where neither
        is defined."""
        if not self.vanilla or measure not in self.means or not self.vanilla.get(measure):
            return None
        if measure.metric not in KNOWLEDGE or measure.role not in ROLES:
            return None
        rate = forgetting_rate if measure.role == "forget" else retention
        return rate(self.vanilla[measure], self.means[measure])

    def overall(self, role: str, modality: str) -> float | None:
        """The mean rate over the HEADLINE metrics there are."""
        rates = [self.rate(Measure(role, modality, task, metric)) for task, metric in HEADLINE.items()]
        known = [rate for rate in rates if rate is not None]
        return fmean(known) if known else None


@dataclass(frozen=True)
class Run:
    """A folder: its summary.json without the models, the role of each group, and the scores of each model."""

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
        same = [without(self.facts.get("config"), "seed", "out", "title"), self.facts.get("versions"), self.roles]
        return json.dumps([same, sorted(self.models)], sort_keys=True)


@dataclass(frozen=True)
class ModelRow:
    """A model of one run, or of several that differ in the seed alone; scores and flags have an entry for each run."""

    name: str
    scores: list[Scores]
    flags: list[list[str]]
    """Of "name: words"."""
    is_vanilla: bool = False

    def means(self, measure: Measure) -> list[float]:
        return [scores.means[measure] for scores in self.scores if measure in scores.means]

    def rates(self, measure: Measure) -> list[float]:
        return [rate for scores in self.scores if (rate := scores.rate(measure)) is not None]

    def overall(self, role: str, modality: str) -> list[float]:
        return [rate for scores in self.scores if (rate := scores.overall(role, modality)) is not None]

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
    """What `compare` read."""

    runs: list[Run]
    rows: list[ModelRow]
    """Every distinct vanilla model, then the models of the runs, in the order given."""

    @property
    def title(self) -> str:
        return f"{len(self.runs)} runs compared" if len(self.runs) > 1 else self.runs[0].name

    @cached_property
    def measures(self) -> list[Measure]:
        """All there are, ordered by role and modality."""
        every = dict.fromkeys(measure for row in self.rows for scores in row.scores for measure in scores.means)
        roles = [*ROLES, *sorted({measure.role for measure in every} - set(ROLES))]
        modalities = [*RECORD_MODALITIES, *sorted({measure.modality for measure in every} - set(RECORD_MODALITIES))]
        return sorted(every, key=lambda measure: (roles.index(measure.role), modalities.index(measure.modality)))

    @cached_property
    def headline(self) -> list[tuple[str, str]]:
        """(task, metric) of HEADLINE, as far as there are."""
        return [pair for pair in HEADLINE.items() if any(measure[2:] == pair for measure in self.measures)]


def compare(folders: Iterable[str | Path]) -> Comparison:
    """Read runs and put them beside each other.

    Args:
        folders: of finished runs (`mipfast run`) or evaluations (`evaluate_records`), each once.

    Returns:
        Rows of models with their scores, their vanilla model's, and flags; runs that differ in the seed alone share a
        row.

    Raises:
        InputError: for no folder, or one given twice.
        ArtefactError: for a folder that holds no finished run.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from mipfast.experiment.comparison import compare
        >>> folder = Path(tempfile.mkdtemp())
        >>> models = {model: {"forget_5/text/cloze/accuracy": mean} for model, mean in (("vanilla", 0.8), ("mip", 0.2))}
        >>> summary = {"models": models, "roles": {"forget": ["forget_5"]}}
        >>> _ = (folder / "summary.json").write_text(json.dumps(summary))
        >>> vanilla, edited = compare([folder]).rows
        >>> [round(rate) for rate in edited.overall("forget", "text")]  # percent forgotten
        [75]
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise InputError("there is nothing to compare; give the folders of one or more runs")
    full = [path.resolve() for path in paths]
    if twice := {str(path) for path in full if full.count(path) > 1}:
        raise InputError(f"{', '.join(sorted(twice))} is given more than once; give every folder once")
    read = [_read(path) for path in paths]
    every = {group: role for facts, _ in read for group, role in _roles(facts).items()}
    last = [path.name for path in full]
    runs = []
    for path, name, (facts, models) in zip(paths, last, read, strict=True):
        roles = _roles(facts) or every
        scores = {model: _scores(means, folder, roles) for model, (means, folder) in models.items()}
        vanilla = scores[VANILLA].means if VANILLA in scores else None
        scores = {model: replace(one, vanilla=vanilla) for model, one in scores.items()}
        unique = last.count(name) == 1 and name != VANILLA
        runs.append(Run(line(name if unique else path), path, facts, roles, scores))
    return Comparison(runs, _rows(runs))


def flags(scores: Scores, measures: Iterable[Measure] = ()) -> list[str]:
    """What is wrong with a model, as "name: words".

    no_vanilla: there is none. diverged: a mean is not finite. inconsistent_modality: on the forget set, the mean
    forgetting rates of text and of image questions, over the HEADLINE metrics that both have, are more than GAP = 25
    percentage points apart. collapse: a HEADLINE metric's retention on a retain or general set is below COLLAPSE =
    15 %. missing_metrics: one of measures has no value.

    Args:
        scores: the model's.
        measures: what other rows have."""
    said = ["no_vanilla: nothing to compare with"] if scores.vanilla is None else []
    if bad := [measure for measure, mean in scores.means.items() if not math.isfinite(mean)]:
        said.append(f"diverged: not finite is {_listed(map(_named, bad))}")
    rates = {measure: scores.rate(measure) for measure in scores.means}
    known = {p: rate for p, rate in rates.items() if rate is not None and HEADLINE.get(p.task) == p.metric}
    both = [
        (known[p], known[q])
        for p in known
        if p[:2] == ("forget", "text") and (q := p._replace(modality="image")) in known
    ]
    if both:
        text, image = (fmean(side) for side in zip(*both, strict=True))
        if abs(text - image) > GAP:
            said.append(f"inconsistent_modality: {text:.0f} % forgotten in text, {image:.0f} % in images")
    if low := sorted((rate, measure) for measure, rate in known.items() if measure.role in KEPT and rate < COLLAPSE):
        said.append(f"collapse: left is {_listed(f'{rate:.0f} % of {_named(measure)}' for rate, measure in low)}")
    if missing := [measure for measure in measures if measure not in scores.means]:
        said.append(f"missing_metrics: {_listed(map(_named, missing))}")
    return said


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[dict[str, Any], Path]]]:
    """(summary.json without its models, {model: (its means, the folder of its answers)})."""
    if (folder / "summary.json").is_file():
        facts = read_json(folder / "summary.json")
        for name, kind in FACTS.items():
            if not isinstance(found := facts.get(name, kind()), kind):
                raise ArtefactError(f"{folder / 'summary.json'}: {name} is {found!r}; expected a {kind.__name__}")
        models = facts.pop("models", None)
        if not isinstance(models, dict) or not models or not all(isinstance(means, dict) for means in models.values()):
            raise ArtefactError(f"{folder / 'summary.json'} has no models, {{name: {{metric: mean}}}}; run again")
        return facts, {model: (means, folder / "eval" / model) for model, means in models.items()}
    if summaries := sorted(folder.glob("*_SUMMARY.json")):
        return {}, {"model": ({key: value for path in summaries for key, value in read_json(path).items()}, folder)}
    problem = f"{folder} has neither summary.json nor NAME_SUMMARY.json"
    if (folder / "run.json").exists() or (folder / "eval").exists():
        raise ArtefactError(
            f"{problem}: its run has not finished; give the command that began it again, and it goes on"
        )
    raise ArtefactError(f"{problem}; expected the folder of a finished run or evaluation")


def _roles(facts: dict[str, Any]) -> dict[str, str]:
    """{group: its role}."""
    return {group: role for role, groups in facts.get("roles", {}).items() for group in groups}


def _scores(means: dict[str, Any], folder: Path, roles: dict[str, str]) -> Scores:
    """The groups of a role are pooled, by their numbers of samples or, where one is not known, alike."""
    each: dict[str, dict[str, float | None]] = {}
    for path in sorted(folder.glob("*_EVAL.json")):
        for key, scored in read_json(path).items():
            metric, values = key.rsplit("/", 1)[-1], scored.get("value_by_index") if isinstance(scored, dict) else None
            each[key] = {i: value.get(metric) for i, value in (values or {}).items() if isinstance(value, dict)}
    pools: dict[Measure, list[tuple[float, int]]] = {}
    for key, mean in means.items():
        if mean is not None and not isinstance(mean, int | float):
            raise ArtefactError(f"{folder}: {key} is {mean!r}; expected a number or null")
        names = line(key).rsplit("/", 3)
        group, *rest = names if len(names) == 4 else ["all", "", "", line(key)]
        value = math.nan if mean is None or not math.isfinite(mean) else float(mean)
        pools.setdefault(Measure(roles.get(group, group), *rest), []).append((value, len(each.get(key, ()))))
    pooled, counts = {}, {}
    for measure, pool in pools.items():
        values, sizes = zip(*pool, strict=True)
        pooled[measure] = fmean(values, sizes if all(sizes) else None)
        if all(sizes):
            counts[measure] = sum(sizes)
    return Scores(pooled, counts, each, folder)


def _rows(runs: list[Run]) -> list[ModelRow]:
    measures = list(dict.fromkeys(chain.from_iterable(scores.means for run in runs for scores in run.models.values())))
    joined: dict[str, list[Run]] = {}
    for run in runs:
        recipe = run.recipe
        while run.facts.get("seed") in [other.facts.get("seed") for other in joined.get(recipe, [])]:
            recipe += " again"  # one seed twice is not two draws
        joined.setdefault(recipe, []).append(run)
    vanillas: dict[tuple[str, ...], tuple[list[Scores], list[str]]] = {}
    rows = []
    for some in joined.values():
        name = ", ".join(run.name for run in some)
        if known := [run.models[VANILLA] for run in some if VANILLA in run.models]:
            prints = [repr(sorted(scores.means.items())) for scores in known]  # as text, nan equals nan
            if len(set(prints)) == 1:  # one model, not a draw for each seed
                known, prints = known[:1], prints[:1]
            vanillas.setdefault(tuple(prints), (known, []))[1].append(name)
        edited = [model for model in some[0].models if model != VANILLA]
        for model in edited:
            every = [run.models[model] for run in some]
            said = [
                [*flags(scores, measures), *(f"run_note: {line(flag)}" for flag in run.facts.get("flags", []))]
                for run, scores in zip(some, every, strict=True)
            ]
            rows.append(ModelRow(name if len(edited) == 1 else f"{name}: {line(model)}", every, said))
    before = []
    for known, names in vanillas.values():
        name = VANILLA if len(vanillas) == 1 else f"{VANILLA} of {'; '.join(names)}"
        said = [flags(scores, measures) for scores in known]
        before.append(ModelRow(name, known, said, is_vanilla=True))
    return before + rows


def _named(measure: Measure) -> str:
    return "/".join(filter(None, measure))


def _listed(items: Iterable[str]) -> str:
    every = [*items]
    return ", ".join(every[:3]) + f" and {len(every) - 3} more" * (len(every) > 3)
