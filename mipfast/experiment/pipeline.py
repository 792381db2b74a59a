"""The whole experiment, stage after stage: fine-tune, locate, unlearn, evaluate. Each has a folder of its own; killed
at any moment, the same command goes on where it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml

from mipfast.data import Record
from mipfast.data.checkpoint import check_device, load_model, save_model
from mipfast.data.encoder import Batches, Encoder
from mipfast.edit.config import MIPConfig
from mipfast.edit.neuron_path import NeuronPath
from mipfast.edit.unlearn import check_judged, edit, fitted, select_path, text_scoring, weighs_damage
from mipfast.errors import ArtefactError
from mipfast.experiment import finetune as finetuning
from mipfast.experiment import locate_file
from mipfast.experiment.config import EvalStage, Experiment, UnlearnStage, settings_of
from mipfast.files import claim, machine, read_json, versions, write_atomic, write_json
from mipfast.judge.records import Judgement, evaluate_records
from mipfast.model.sites import Sites, find_sites
from mipfast.scoring.config import LocateConfig

log = logging.getLogger("mipfast")
SUMMARY = "MIPFAST_SUMMARY.json"


@dataclass(frozen=True)
class Where:
    """How a stage runs, whatever it does."""

    seed: int = 0
    device: str | None = None
    dtype: str = "auto"
    progress: bool = False

    def load(self, model: str) -> Any:
        """The model of a folder, on a GPU where there is one."""
        return load_model(model, self.device or ("cuda" if torch.cuda.is_available() else "cpu"), self.dtype)


def run(experiment: Experiment, progress: bool = False) -> dict[str, Any]:
    """Every stage of an experiment that is not finished, and then its summary.

    Into experiment.out: config.yaml, run.json, stages.json; finetune/model; locate/<set>; unlearn/{model, path,
    report.json}; eval/{vanilla, unlearned}; summary.json. Killed at any moment, the same call goes on.

    Args:
        experiment: such as `Experiment.from_yaml` reads.
        progress: show bars.

    Returns:
        What summary.json holds: both models' metrics, the neurons edited, seconds, versions, flags.

    Raises:
        InputError: for what is missing or cannot be used, before any stage begins.
        ArtefactError: where the folder is another experiment's.
        MipfastError: whatever else the stages raise.
    """
    experiment.check_ready()
    out, settings, seed = Path(experiment.out), settings_of(experiment), experiment.seed
    if not (out / "stages.json").exists():  # a damaged table shows now, not in hours, and claims no folder
        for part in (experiment.finetune, experiment.unlearn, experiment.eval):
            if part:
                part.data.load(seed)
        Encoder.from_pretrained(experiment.model)
        check_device(experiment.device)
    compared = {name: value for name, value in settings.items() if name not in ("title", "out", "device")}
    compared["eval"] = {name: value for name, value in settings["eval"].items() if name != "batch_size"}
    claim(out, {"config": compared}, {"versions": versions()})
    shown = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    write_atomic(out / "config.yaml", lambda path: path.write_text(shown, encoding="utf-8"))
    stages, vanilla = Stages(out), experiment.model
    where = Where(seed, experiment.device, experiment.dtype, progress)
    if learned := experiment.finetune:
        options = where.device, where.dtype, progress
        stages.do(
            "finetune",
            lambda: finetuning.finetune(vanilla, learned.data.all(seed), out / "finetune", learned, *options),
            out / "finetune" / "model",
        )
    known = str(out / "finetune" / "model") if learned else vanilla
    unlearn_folder(known, experiment.unlearn, out, where)
    stages = Stages(out)
    for name, model in {"vanilla": known, "unlearned": str(out / "unlearn" / "model")}.items():
        into = out / "eval" / name
        stages.do(f"eval/{name}", partial(evaluate_folder, model, experiment.eval, into, where), into / SUMMARY)
    summary = _summary(experiment, out, stages)
    write_json(out / "summary.json", summary)
    return summary


def unlearn_folder(model: str, stage: UnlearnStage, out: str | Path, where: Where) -> dict[str, Any]:
    """Locate on the stage's records into OUT/locate, choose, prune and misdirect into OUT/unlearn: model, a plain
    transformers folder, path and report.json, which is returned. What is there already is not done again."""
    out = Path(out)
    identity = {"config": settings_of(stage), "source": str(model), "dtype": where.dtype, "seed": where.seed}
    claim(out / "unlearn", identity, {"versions": versions()})
    stage, stages = replace(stage, progress=where.progress), Stages(out)

    @cache
    def loaded() -> tuple[Any, Encoder, dict[str, list[Record]]]:
        roles = stage.data.load(where.seed)
        return where.load(model), Encoder.from_pretrained(model), roles

    stages.do("locate", lambda: _locate(*loaded(), stage, out))
    stages.do("unlearn", lambda: _unlearn(*loaded(), stage, out, identity), out / "unlearn" / "model")
    return read_json(out / "unlearn" / "report.json", f"remove {out / 'unlearn'} and run the same again")


def evaluate_folder(model: str, stage: EvalStage, out: str | Path, where: Where) -> Judgement:
    """Evaluate a model's folder on the stage's records, into a folder that `mipfast.evaluation.read_records` reads."""
    records, encoder = stage.data.all(where.seed), Encoder.from_pretrained(model)
    sizes = stage.batch_size, stage.max_new_tokens
    return evaluate_records(where.load(model), encoder, records, out, *sizes, progress=where.progress)


class Stages:
    """OUT/stages.json, {stage: {"seconds", "resumed"}}: seconds of the process that finished it, None before that;
    resumed where an earlier process had begun it."""

    def __init__(self, out: Path):
        self.file = out / "stages.json"
        self.begun: dict[str, dict[str, Any]] = read_json(self.file) if self.file.exists() else {}

    def do(self, stage: str, work: Callable[[], object], made: Path | None = None) -> None:
        """Work, unless it is finished and what it made is still there."""
        if self.begun.get(stage, {}).get("seconds") is not None and (made is None or made.exists()):
            log.info("%s is finished: skipped", stage)
            return
        log.info("%s", stage)
        resumed, started = stage in self.begun, time.monotonic()
        self._write(stage, None, resumed)
        work()
        self._write(stage, round(time.monotonic() - started, 1), resumed)

    def _write(self, stage: str, seconds: float | None, resumed: bool) -> None:
        self.begun[stage] = {"seconds": seconds, "resumed": resumed}
        write_json(self.file, self.begun)


def _sets(
    roles: Mapping[str, list[Record]], config: MIPConfig, sites: Sites
) -> dict[str, tuple[list[Record], LocateConfig]]:
    """What `select_path` needs: {"role-modality": (records, how they are scored)}. IGI is fed the forget set's text,
    IFI its pictures; the damage estimate takes IGI of everything that is to be kept, of every other record where those
    between judge the size of the path."""
    sets: dict[str, tuple[list[Record], LocateConfig]] = {}
    damage = weighs_damage(config) and any(record.modality == "text" for record in roles["forget"])
    if config.fraction == "auto":
        check_judged(len(_kept(roles, slice(1, None, 2))), "records")
    for role, records in roles.items():
        if role != "forget" and config.fraction == "auto":
            records = _kept({role: records}, slice(None, None, 2))
        for modality in ("text", "image"):
            some = [record for record in records if record.modality == modality]
            if role == "forget" and modality == "image":
                how = config.vision if sites.vision else None
            else:
                how = text_scoring(config, sites) if role == "forget" or damage else None
            if some and how:
                sets[f"{role}-{modality}"] = (some, how)
    return sets


def _kept(roles: Mapping[str, list[Record]], part: slice) -> list[Record]:
    """Some records of every role but forget, of each modality alike."""
    others = [records for role, records in roles.items() if role != "forget"]
    sides = ([r for r in records if r.modality == m] for records in others for m in ("text", "image"))
    return [record for side in sides for record in side[part]]


def _locate(model: Any, encoder: Encoder, roles: dict[str, list[Record]], stage: UnlearnStage, out: Path) -> None:
    options: dict[str, Any] = {"batch_size": stage.batch_size, "aggregate": True}
    if not any(record.modality == "text" for record in roles["forget"]):
        log.warning(
            "the forget tables ask about pictures alone, so the text tower is not edited; `names` asks them in text too"
        )
    if stage.rmisu.positions == "subject":  # else a record without one would show when hours of locating are done
        for records in roles.values():
            encoder.encoded(records, subject=True)
    for name, (records, config) in _sets(roles, stage, find_sites(model)).items():
        config = replace(config, progress=stage.progress)
        locate_file.locate_file(model, encoder, records, out / "locate" / name, config, **options)


def _unlearn(
    model: Any,
    encoder: Encoder,
    roles: dict[str, list[Record]],
    stage: UnlearnStage,
    out: Path,
    identity: dict[str, Any],
) -> None:
    folder, sites = out / "unlearn", find_sites(model)
    if (folder / "model").exists():
        return
    names = _sets(roles, stage, sites)
    try:
        located = {name: locate_file.read(out / "locate" / name) for name in names}
    except ArtefactError:  # damaged since
        _locate(model, encoder, roles, stage, out)
        located = {name: locate_file.read(out / "locate" / name) for name in names}
    kept = [one for name, one in located.items() if not name.startswith("forget-")]
    towers = located.get("forget-text"), located.get("forget-image")
    others = [record for role, records in roles.items() if role != "forget" for record in records]
    marked = {"subject": stage.rmisu.positions == "subject"}
    forget, retain = (
        Batches(encoder, some, stage.batch_size, model.device, **marked) for some in (roles["forget"], others)
    )
    if stage.fraction == "auto":
        judged = Batches(encoder, _kept(roles, slice(1, None, 2)), stage.batch_size, model.device)
        path = fitted(model, forget, judged, *towers, kept, stage)
    else:
        path = select_path(sites, *towers, kept, stage)
    path.save_pretrained(folder / "path")
    report = {
        **identity,
        "locate": {name: one.report for name, one in located.items()},
        "path": path.origin,
        "misdirect": edit(model, path, forget, retain, stage),
        "neurons": _neurons(path, sites),
        "versions": versions(),
    }
    write_json(folder / "report.json", report)
    write_atomic(folder / "model", lambda to: save_model(model, identity["source"], to))


def _neurons(path: NeuronPath, sites: Sites) -> dict[str, dict[str, int]]:
    """{stack: how many were edited, of how many, in how many layers}."""
    counts = {}
    for stack in sites.stacks:
        chosen = [len(indices) for (name, _), indices in path.items() if name == stack.name]
        if chosen:
            of = stack.num_layers * stack.num_neurons
            counts[stack.name] = {"neurons": sum(chosen), "of": of, "layers": len(chosen)}
    return counts


def _summary(experiment: Experiment, out: Path, stages: Stages) -> dict[str, Any]:
    report = read_json(out / "unlearn" / "report.json")
    scores = {name: read_json(out / "eval" / name / SUMMARY) for name in ("vanilla", "unlearned")}
    return {
        "title": experiment.title or out.name,
        "config": asdict(experiment),
        "seed": experiment.seed,
        "versions": versions(),
        "machine": machine(),
        "seconds": {name: stage["seconds"] for name, stage in stages.begun.items()},
        "models": scores,
        "roles": {
            # as the metrics' keys have them: a group of another source by its table's name
            role: [str(group).rpartition("/")[2] for group in groups]
            for role, groups in experiment.eval.data.groups.items()
        },
        "neurons": report["neurons"],
        "path": report["path"],
        "flags": _flags(experiment, report, scores, stages),
    }


def _flags(
    experiment: Experiment, report: dict[str, Any], scores: dict[str, dict[str, Any]], stages: Stages
) -> list[str]:
    """What a reader of the numbers should know."""
    flags = []
    if not experiment.finetune:
        flags.append(f"nothing was fine-tuned: {experiment.model} is the vanilla model")
    for name, stage in stages.begun.items():
        if stage["resumed"]:
            flags.append(f"{name} was stopped and resumed: its seconds are the last process's")
    for name, located in report["locate"].items():
        if dead := located["layers_without_gradient"]:
            flags.append(f"no gradient reaches layers {', '.join(map(str, dead))} of {located['stack']} on {name}")
    if note := report["misdirect"].get("note"):
        flags.append(note)
    if idle := report["misdirect"]["without_gradient"]:
        flags.append(f"on the path but never trained: {', '.join(idle)}")
    for name, values in scores.items():
        if bad := [key for key, value in values.items() if value is None]:
            flags.append(f"{name}: {len(bad)} of {len(values)} metrics are not finite, such as {bad[0]}")
    return flags
