"""The whole experiment, stage after stage: fine-tune, locate, unlearn, evaluate. Each has a folder of its own; killed
at any moment, the same command goes on where it was.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from mipfast import finetuning, streaming
from mipfast.attribution import LocateConfig
from mipfast.data import Record, load_groups
from mipfast.errors import InputError, MipfastError
from mipfast.evaluation import Judgement, evaluate_records
from mipfast.files import claim, machine, versions, write_atomic, write_json
from mipfast.finetuning import FinetuneConfig
from mipfast.misdirection import RMisUConfig
from mipfast.path import NeuronPath
from mipfast.samples import Batches, Encoder, check_device, load_model, save_model
from mipfast.sites import Sites, find_sites
from mipfast.unlearning import MIPConfig, edit, select_path, weighs_damage

log = logging.getLogger("mipfast")
MODALITIES = ("text", "image")


@dataclass(frozen=True)
class Data:
    """Tables by role: {role: groups}. source, names, limit: as `mipfast.data.load_groups` has them."""

    source: str = ""
    groups: dict[str, list[str]] = field(default_factory=dict)
    names: str | None = None
    limit: int | None = None

    def load(self, seed: int) -> dict[str, list[Record]]:
        """{role: records}."""
        options: dict[str, Any] = {"names": self.names, "limit": self.limit, "seed": seed}
        return {role: load_groups(self.source, groups, **options) for role, groups in self.groups.items()}

    def check(self) -> None:
        """Raises InputError for a table with two roles."""
        roles: dict[str, str] = {}
        for role, groups in self.groups.items():
            for group in groups:
                if roles.setdefault(str(group), role) != role:
                    raise InputError(f"table {group} is to {roles[str(group)]} and to {role}; expected one role each")

    def all(self, seed: int) -> list[Record]:
        """Whatever their role."""
        return [record for records in self.load(seed).values() for record in records]


@dataclass(frozen=True)
class FinetuneStage(FinetuneConfig):
    """data: what is learned, whatever the role."""

    data: Data = field(default_factory=Data)


@dataclass(frozen=True)
class UnlearnStage(MIPConfig):
    """data: roles forget, retain and, if there is any, general. batch_size: records of a batch, and so of a step."""

    data: Data = field(default_factory=Data)
    batch_size: int = 8

    def check(self) -> None:
        """Raises InputError for what cannot be used."""
        if missing := [role for role in ("forget", "retain") if not self.data.groups.get(role)]:
            raise InputError(f"unlearning has no tables to {' and to '.join(missing)}; found {self.data.groups}")
        self.data.check()
        super().check()
        if self.rmisu.trainable not in ("path", "down"):
            raise InputError(
                f"rmisu.trainable={self.rmisu.trainable!r}; expected path or down, whose result is a plain folder "
                "(mipfast.unlearn in Python does lora, mipfast.misdirect all)"
            )


@dataclass(frozen=True)
class EvalStage:
    """data: roles of any name."""

    data: Data = field(default_factory=Data)
    batch_size: int = 16
    max_new_tokens: int = 50


@dataclass(frozen=True)
class Experiment:
    """model: folder or Hub id of the model to fine-tune, or, where finetune is left out, of the vanilla model. out: the
    folder for everything. seed: of every stage that names none. device: None is a GPU where there is one. dtype: auto
    (the model's), float32, bfloat16 or float16."""

    title: str = ""
    model: str = ""
    out: str = ""
    seed: int = 0
    device: str | None = None
    dtype: str = "auto"
    finetune: FinetuneStage | None = None
    unlearn: UnlearnStage = field(default_factory=UnlearnStage)
    eval: EvalStage = field(default_factory=EvalStage)

    @classmethod
    def from_yaml(cls, file: str | Path) -> Experiment:
        """Raises InputError for a key or value that cannot be used, naming it."""
        import yaml

        try:
            given = yaml.safe_load(Path(file).read_text())
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(
                f"{file} cannot be read as YAML ({error}); expected a file like examples/*.yaml"
            ) from error
        seed = _typed(given.get("seed", 0), int, "seed") if isinstance(given, dict) else 0
        seeded = cls(finetune=FinetuneStage(seed=seed), unlearn=UnlearnStage(rmisu=RMisUConfig(seed=seed)))
        try:
            return overridden(seeded, {"finetune": None, **given} if isinstance(given, dict) else given, "")
        except InputError as error:
            raise InputError(f"{file}: {error}") from error

    def check(self) -> None:
        """Raises InputError for what is missing or cannot be used, MipfastError without a library: before hours are
        spent."""
        needed: dict[str, Any] = {"model": self.model, "out": self.out}
        for name in ("finetune", "unlearn", "eval"):
            if stage := getattr(self, name):
                needed |= {f"{name}.data.source": stage.data.source, f"{name}.data.groups": stage.data.groups}
        if missing := [name for name, value in needed.items() if not value]:
            raise InputError(f"the experiment has no {', '.join(missing)}; expected a file like examples/*.yaml")
        self.eval.data.check()
        if self.finetune:
            finetuning.check(self.finetune, self.device)
        self.unlearn.check()
        for module in ("rouge_score", "sacrebleu"):
            if find_spec(module) is None:
                raise MipfastError(f"evaluating needs {module}; run: pip install 'mipfast[eval]'")


def run(experiment: Experiment, progress: bool = False) -> dict[str, Any]:
    """Every stage that is not finished, and then OUT/summary.json, which is returned.

    OUT/config.yaml, run.json, stages.json; finetune/model; locate/<set>; unlearn/{model, path, report.json};
    eval/{vanilla, unlearned}. Raises ArtefactError where OUT is another experiment's, and what the stages raise."""
    experiment.check()
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
    write_atomic(out / "config.yaml", lambda path: path.write_text(_yaml(settings)))
    stages, vanilla = Stages(out), experiment.model
    where: dict[str, Any] = {"device": experiment.device, "dtype": experiment.dtype, "progress": progress}
    if learned := experiment.finetune:
        stages.do(
            "finetune", lambda: finetuning.finetune(vanilla, learned.data.all(seed), out / "finetune", learned, **where)
        )
    known = str(out / "finetune" / "model") if learned else vanilla
    unlearn_folder(known, experiment.unlearn, out, seed, **where)
    stages = Stages(out)
    for name, model in {"vanilla": known, "unlearned": str(out / "unlearn" / "model")}.items():
        stages.do(f"eval/{name}", partial(evaluate_folder, model, experiment.eval, out / "eval" / name, seed, **where))
    summary = _summary(experiment, out, stages)
    write_json(out / "summary.json", summary)
    return summary


def unlearn_folder(
    model: str,
    stage: UnlearnStage,
    out: str | Path,
    seed: int = 0,
    device: str | None = None,
    dtype: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Locate on the stage's records into OUT/locate, choose, prune and misdirect into OUT/unlearn: model, a plain
    transformers folder, path and report.json, which is returned. What is there already is not done again."""
    stage.check()
    out = Path(out)
    identity = {"config": settings_of(stage), "source": str(model), "dtype": dtype, "seed": seed}
    claim(out / "unlearn", identity, {"versions": versions()})
    stage, stages = replace(stage, progress=progress), Stages(out)

    @cache
    def loaded() -> tuple[Any, Encoder, dict[str, list[Record]]]:
        roles = stage.data.load(seed)
        return load_model(model, _device(device), dtype), Encoder.from_pretrained(model), roles

    stages.do("locate", lambda: _locate(*loaded(), stage, out))
    stages.do("unlearn", lambda: _unlearn(*loaded(), stage, out, identity))
    return json.loads((out / "unlearn" / "report.json").read_text())


def evaluate_folder(
    model: str,
    stage: EvalStage,
    out: str | Path,
    seed: int = 0,
    device: str | None = None,
    dtype: str = "auto",
    progress: bool = False,
) -> Judgement:
    """Evaluate a model's folder on the stage's records, into a folder that `mipfast.evaluation.read_records` reads."""
    records, encoder = stage.data.all(seed), Encoder.from_pretrained(model)
    loaded = load_model(model, _device(device), dtype)
    return evaluate_records(loaded, encoder, records, out, stage.batch_size, stage.max_new_tokens, progress=progress)


class Stages:
    """OUT/stages.json, {stage: {"seconds", "resumed"}}: seconds of the process that finished it, None before that;
    resumed where an earlier process had begun it."""

    def __init__(self, out: Path):
        self.file = out / "stages.json"
        self.begun: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def do(self, stage: str, work: Callable[[], object]) -> None:
        """Work, unless it is finished."""
        if self.begun.get(stage, {}).get("seconds") is not None:
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
    IFI its pictures; the damage estimate takes IGI of everything that is to be kept."""
    found: dict[str, tuple[list[Record], LocateConfig]] = {}
    damage = weighs_damage(config) and any(record.modality == "text" for record in roles["forget"])
    for role, records in roles.items():
        for modality in MODALITIES:
            some = [record for record in records if record.modality == modality]
            if role == "forget" and modality == "image":
                how = config.vision if sites.vision else None
            else:
                how = config.text if role == "forget" or damage else None
            if some and how:
                found[f"{role}-{modality}"] = (some, how)
    return found


def _locate(model: Any, encoder: Encoder, roles: dict[str, list[Record]], stage: UnlearnStage, out: Path) -> None:
    options: dict[str, Any] = {"batch_size": stage.batch_size, "aggregate": True}
    if not any(record.modality == "text" for record in roles["forget"]):
        log.warning(
            "the forget tables ask about pictures alone, so the text tower is not edited; `names` asks them in text too"
        )
    for name, (records, config) in _sets(roles, stage, find_sites(model)).items():
        config = replace(config, progress=stage.progress)
        streaming.locate_file(model, encoder, records, out / "locate" / name, config, **options)


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
    found = {name: streaming.read(out / "locate" / name) for name in _sets(roles, stage, sites)}
    kept = [one for name, one in found.items() if not name.startswith("forget-")]
    path = select_path(sites, found.get("forget-text"), found.get("forget-image"), kept, stage)
    path.save_pretrained(folder / "path")
    others = [record for role, records in roles.items() if role != "forget" for record in records]
    forget, retain = (Batches(encoder, some, stage.batch_size, model.device) for some in (roles["forget"], others))
    report = {
        **identity,
        "locate": {name: one.report for name, one in found.items()},
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
    report = json.loads((out / "unlearn" / "report.json").read_text())
    scores = {
        name: json.loads((out / "eval" / name / "MIPFAST_SUMMARY.json").read_text())
        for name in ("vanilla", "unlearned")
    }
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
    if idle := report["misdirect"]["without_gradient"]:
        flags.append(f"on the path but never trained: {', '.join(idle)}")
    for name, values in scores.items():
        if bad := [key for key, value in values.items() if value is None]:
            flags.append(f"{name}: {len(bad)} of {len(values)} metrics are not finite, such as {bad[0]}")
    return flags


def _device(given: str | None) -> str:
    return given or ("cuda" if torch.cuda.is_available() else "cpu")


def settings_of(config: Any) -> dict[str, Any]:
    """A config's fields that results depend on, all the way down."""

    def kept(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: kept(one) for name, one in value.items() if name != "progress"}

    return kept(asdict(config))


def _yaml(settings: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def _keys(config: Any) -> str:
    return ", ".join(f.name for f in fields(config) if f.name != "progress")


def overridden(config: Any, given: Any, name: str) -> Any:
    """The dataclass with what a YAML mapping says, all the way down. Raises InputError for a key or a value that cannot
    be used, naming it as name.key."""
    if not isinstance(given, dict):
        raise InputError(f"{name or 'the file'}: found {given!r}; expected keys {_keys(config)}")
    hints = get_type_hints(type(config))
    new = {}
    for key, value in given.items():
        here = f"{name}.{key}" if name else str(key)
        if key not in hints or key == "progress":
            raise InputError(f"{here}: no such key; expected one of {_keys(config)}")
        default = getattr(config, key)
        nested = is_dataclass(default) and value is not None
        new[key] = overridden(default, value, here) if nested else _typed(value, hints[key], here)
    return replace(config, **new)


def _typed(value: Any, hint: Any, name: str) -> Any:
    """The value as a field of that type wants it. Raises InputError for another type."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if float in options and isinstance(value, str | int) and not isinstance(value, bool):
        with suppress(ValueError):
            return float(value)  # YAML 1.1 reads 2e-5 as a text
    for option in options:
        if get_origin(option) is Literal:
            fits = value in get_args(option)
        elif get_origin(option) is dict:
            fits = isinstance(value, dict) and all(isinstance(groups, list) for groups in value.values())
        else:
            fits = isinstance(value, option) and not (option is int and isinstance(value, bool))
        if fits:
            return value
    raise InputError(f"{name}: found {value!r}; expected {' or '.join(map(_shown, options))}")


def _shown(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) is dict:
        return "{role: [tables]}"
    return "null" if hint is NoneType else hint.__name__
