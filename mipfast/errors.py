"""Every error mipfast raises on purpose: the text says what was found, what was expected and what to do. And the one
check of what the fields of a config hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from importlib.util import find_spec
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
NUMBERS = {int: Integral, float: Real}  # numpy's count too; True and False do not
SHOWN: dict[Any, str] = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "a text",
    Sequence[int]: "a sequence of integers",
    NoneType: "None",
}


class MipfastError(Exception):
    """Base class; catch this one to catch all of them."""


class InputError(MipfastError):
    """A batch, a tensor or an argument that cannot be used."""


class ModelError(MipfastError):
    """A model whose FFN neurons cannot be found or hooked."""


class ArtefactError(MipfastError):
    """A saved file that is missing, damaged, or belongs to another model."""


class BackendError(MipfastError):
    """A kernel backend that was asked for and is not usable here."""


class DivergedError(MipfastError):
    """Training or scoring left the finite numbers."""


def check_fields(config: Any) -> None:
    """Raises InputError for a field of a dataclass whose value is not of its annotation's type or Literal. Ranges are
    for the class itself to check."""
    for name, hint in _hints(type(config)).items():  # type: ignore[arg-type]  # a class is hashable
        check_value(name, getattr(config, name), hint)


def check_counts(config: Any, *names: str) -> None:
    """Raises InputError for a number of things that is less than 1; None is none given."""
    for name in names:
        if (count := getattr(config, name)) is not None and count < 1:
            raise InputError(f"{name}={count}; expected at least 1")


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raises InputError for a value that is not of a type or Literal."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if not any(_fits(value, option) for option in options):
        raise InputError(f"{name}={value!r}; expected {' or '.join(map(_shown, options))}")


def check_installed(what: str, extra: str, *modules: str) -> None:
    """Raises MipfastError where a library that something needs is not there; extra: of ours, which brings it."""
    for module in modules:
        if find_spec(module) is None:
            raise MipfastError(f"{what} needs {module}; run: pip install 'mipfast[{extra}]'")


def configured(kind: type[T], config: T | None, overrides: Mapping[str, Any]) -> T:
    """The config, kind's defaults where it is None, with some fields changed. Raises InputError for what is none of
    that dataclass, such as a dict of its fields, and for a field that it does not have."""
    config = kind() if config is None else config
    if not isinstance(config, kind):
        raise InputError(f"the config is a {type(config).__name__}; expected {_shown(kind)}")
    try:
        return replace(config, **overrides)  # type: ignore[type-var]  # a dataclass, which T cannot say
    except TypeError as error:
        raise InputError(f"{error}; {kind.__name__} has {field_names(kind)}") from error


def field_names(kind: Any) -> str:
    return ", ".join(field.name for field in fields(kind))


_hints = cache(get_type_hints)


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if hint in NUMBERS:
        return isinstance(value, NUMBERS[hint]) and not isinstance(value, bool)
    return hint is Any or isinstance(value, get_origin(hint) or hint)


def _shown(hint: Any) -> str:
    if get_origin(hint) is Literal:
        *others, last = get_args(hint)
        return f"{', '.join(others)} or {last}" if others else repr(last)
    if is_dataclass(hint):
        return f"a {getattr(hint, '__name__', hint)}({field_names(hint)})"
    return SHOWN.get(hint, getattr(hint, "__name__", str(hint)))
