"""An experiment as YAML says it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from mipfast.data import Record, load_groups
from mipfast.edit.config import MIPConfig, RMisUConfig
from mipfast.errors import InputError, check_counts, check_fields, check_installed, check_value
from mipfast.experiment.finetune import FinetuneConfig, check_machine

T = TypeVar("T")


@dataclass(frozen=True)
class Data:
    """Tables by what they are for."""

    source: str = ""
    """Benchmark: a folder of TABLE/*.parquet, or its Hub id."""
    groups: dict[str, list[str]] = field(default_factory=dict)
    """{role: tables}; a table is one of the source's, or SOURCE/TABLE for one elsewhere."""
    names: str | None = None
    """MLLMU-Bench source with the people's names: tables of picture questions are asked in text too."""
    limit: int | None = None
    """Records of each table and modality, drawn by the seed; None is all."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_counts(self, "limit")
        roles: dict[str, str] = {}
        for role, groups in self.groups.items():
            if not isinstance(groups, list):
                raise InputError(f"groups={self.groups!r}; expected {{role: [tables]}}")
            for group in groups:
                if roles.setdefault(str(group), role) != role:
                    raise InputError(
                        f"groups: table {group} is to {roles[str(group)]} and to {role}; expected one role each"
                    )

    def load(self, seed: int) -> dict[str, list[Record]]:
        """{role: records}."""
        options: dict[str, Any] = {"names": self.names, "limit": self.limit, "seed": seed}
        return {role: load_groups(self.source, groups, **options) for role, groups in self.groups.items()}

    def all(self, seed: int) -> list[Record]:
        """Whatever their role."""
        return [record for records in self.load(seed).values() for record in records]


@dataclass(frozen=True)
class FinetuneStage(FinetuneConfig):
    """How the model learns what it is to forget."""

    data: Data = field(default_factory=Data)
    """What is learned, whatever the role."""


@dataclass(frozen=True)
class UnlearnStage(MIPConfig):
    """How it forgets."""

    data: Data = field(default_factory=Data)
    """Roles forget, retain and, if there is any, general."""
    batch_size: int = 8
    """Records of a batch, and so of a step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "batch_size")
        missing = [role for role in ("forget", "retain") if not self.data.groups.get(role)]
        if self.data.groups and missing:
            raise InputError(f"data.groups: no tables to {' and to '.join(missing)}; found {self.data.groups}")
        if self.rmisu.trainable not in ("path", "down"):
            raise InputError(
                f"rmisu.trainable={self.rmisu.trainable!r}; expected path or down, whose result is a plain folder "
                "(mipfast.unlearn in Python does lora, mipfast.misdirect all)"
            )


@dataclass(frozen=True)
class EvalStage:
    """How the models are judged, before and after."""

    data: Data = field(default_factory=Data)
    """Roles of any name."""
    batch_size: int = 16
    """Records of a batch."""
    max_new_tokens: int = 50
    """The longest answer."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_counts(self, "batch_size", "max_new_tokens")


@dataclass(frozen=True)
class Experiment:
    """Fine-tune, locate, unlearn, evaluate: what `mipfast run` takes."""

    title: str = ""
    """For the report."""
    model: str = ""
    """Folder or Hub id of the model to fine-tune, or, where finetune is left out, of the vanilla model."""
    out: str = ""
    """Folder for everything."""
    seed: int = 0
    """Of every stage that names none."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; None is a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights; auto is the model's."""
    finetune: FinetuneStage | None = None
    """None where the model knows already what it is to forget."""
    unlearn: UnlearnStage = field(default_factory=UnlearnStage)
    """Locate, prune, misdirect."""
    eval: EvalStage = field(default_factory=EvalStage)
    """Of the vanilla model and of the unlearned one."""

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def from_yaml(cls, file: str | Path) -> Experiment:
        """Read an experiment such as examples/*.yaml.

        Raises:
            InputError: for a file, a key or a value that cannot be used; the text has the key's path.
        """
        try:
            given = yaml.load(Path(file).read_text(encoding="utf-8"), _Loader)  # a SafeLoader
        except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(
                f"{file} cannot be read as YAML ({error}); expected a file like examples/*.yaml"
            ) from error
        try:
            seed = given.get("seed", 0) if isinstance(given, dict) else 0
            check_value("seed", seed, int)
            seeded = cls(finetune=FinetuneStage(seed=seed), unlearn=UnlearnStage(rmisu=RMisUConfig(seed=seed)))
            return overlaid(seeded, {"finetune": None, **given} if isinstance(given, dict) else given)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error

    def check_ready(self) -> None:
        """Before hours are spent. Raises InputError for what is missing, MipfastError without a library."""
        needed: dict[str, Any] = {"model": self.model, "out": self.out}
        for name in ("finetune", "unlearn", "eval"):
            if stage := getattr(self, name):
                needed |= {f"{name}.data.source": stage.data.source, f"{name}.data.groups": stage.data.groups}
        if missing := [name for name, value in needed.items() if not value]:
            raise InputError(f"the experiment has no {', '.join(missing)}; expected a file like examples/*.yaml")
        if self.finetune:
            check_machine(self.finetune, self.device)
        check_installed("evaluating", "eval", "rouge_score", "sacrebleu")


def settings_of(config: Any) -> dict[str, Any]:
    """A config's fields that results depend on, all the way down."""
    return without(asdict(config), "progress")


def without(value: Any, *names: str) -> Any:
    """Settings but for some fields, all the way down."""
    if isinstance(value, dict):
        return {name: without(one, *names) for name, one in value.items() if name not in names}
    return value


# Why no library: pydantic fills what is left out from the class's defaults, which would turn the vision tower's scoring
# into the text tower's, and jsonargparse passes over `eval: 3` in silence.
def overlaid(config: T, given: Any, path: str = "") -> T:
    """The config with what a mapping says, all the way down; what it leaves out stays the config's, so that
    `vision: {n_steps: 2}` is still the vision tower's. Types and ranges are the dataclasses' to check. Raises
    InputError for a key or a value that cannot be used, naming it as path.key."""
    names = [f.name for f in fields(config) if f.name != "progress"]  # type: ignore[arg-type]  # a dataclass
    if not isinstance(given, Mapping):
        raise InputError(f"{path or 'the file'}: found {given!r}; expected keys {', '.join(names)}")
    changes = {}
    for key, value in given.items():
        here, default = f"{path}.{key}" if path else str(key), getattr(config, str(key), None)
        if key not in names:
            raise InputError(f"{here}: no such key; expected one of {', '.join(names)}")
        changes[key] = overlaid(default, value, here) if is_dataclass(default) and value is not None else value
    try:
        return replace(config, **changes)  # type: ignore[type-var]
    except InputError as error:
        raise InputError(f"{path}.{error}" if path else str(error)) from error


class _Loader(yaml.SafeLoader):
    """PyYAML's, to which 2e-5 is a number, as YAML 1.2 has it, and not a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
