"""An experiment as YAML says it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mipfast.data import Record, load_groups
from mipfast.edit.config import MIPConfig, RMisUConfig
from mipfast.errors import InputError, MipfastError
from mipfast.experiment import finetune as finetuning
from mipfast.experiment.finetune import FinetuneConfig

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
