"""Short facts by relation, each in several wordings: the shipped file, or a user's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mipfast.data.records import Record
from mipfast.errors import InputError
from mipfast.files import parse_json

SHIPPED = Path(__file__).parent / "facts.json"
SCORED = 2  # the first wordings of a relation; on the others, held out, nothing is chosen


@dataclass(frozen=True)
class Fact:
    """One fact as texts to be continued: in the wordings that are scored, and in those that are held out."""

    subject: str
    scored: tuple[Record, ...]
    held_out: tuple[Record, ...]


@dataclass(frozen=True)
class Facts:
    """What a file holds: facts by relation, paragraphs of plain prose, and the subjects to forget by relation, empty
    where the file does not say."""

    relations: dict[str, list[Fact]]
    prose: list[Record]
    forget: dict[str, list[str]]


def read(path: Path) -> Facts:
    """The facts of a JSON file: {"relations": {name: {"wordings": [texts with one {} each], "facts": [[subject,
    answer], ...]}}, "prose": [paragraphs], "forget": {relation: [subjects]}}; only the shipped one may lack forget.

    Raises InputError for any other.
    """
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); expected a file such as {SHIPPED}") from error
    if problem := next(_problems(found, path == SHIPPED), None):
        raise InputError(f"{path}: {problem}; mend it, {SHIPPED} is an example")
    relations = {name: _facts(name, **relation) for name, relation in found["relations"].items()}
    halves = [text.split(maxsplit=1) for text in found["prose"]]
    prose = [_record(i, "plain prose", first, rest) for i, (first, rest) in enumerate(halves)]
    return Facts(relations, prose, found.get("forget", {}))


def _facts(relation: str, wordings: list[str], facts: list[list[str]]) -> list[Fact]:
    def in_words(subject: str, answer: str) -> Iterator[Record]:
        for i, wording in enumerate(wordings):
            yield _record(f"{subject}/{i}", relation, wording.replace("{}", subject), answer)

    every = ((subject, tuple(in_words(subject, answer))) for subject, answer in facts)
    return [Fact(subject, texts[:SCORED], texts[SCORED:]) for subject, texts in every]


def _record(name: object, group: str, prompt: str, answer: str) -> Record:
    return Record(str(name), group, "text", "generation", prompt, f" {answer}")


def _problems(found: Any, shipped: bool) -> Iterator[str]:
    """What is wrong with a file's content, first things first."""
    if not isinstance(found, dict) or not isinstance(found.get("relations"), dict) or not found["relations"]:
        yield f"it holds {_short(found)}; expected relations, prose and forget"
    for name, relation in found["relations"].items():
        if not isinstance(relation, dict) or relation.keys() != {"wordings", "facts"}:
            yield f"relation {name} is {_short(relation)}; expected wordings and facts"
        wordings, facts = relation["wordings"], relation["facts"]
        if not _is_texts(wordings) or len(wordings) <= SCORED or any(text.count("{}") != 1 for text in wordings):
            yield f"relation {name} has wordings {_short(wordings)}; expected {SCORED + 1} or more, each with one {{}}"
        if not isinstance(facts, list) or not all(_is_texts(fact) and len(fact) == 2 for fact in facts):
            odd = facts if not isinstance(facts, list) else next(f for f in facts if not _is_texts(f) or len(f) != 2)
            yield f"relation {name} has the fact {_short(odd)}; expected [subject, answer]"
        subjects = [subject for subject, _ in facts]
        if twice := next((one for one in subjects if subjects.count(one) > 1), None):
            yield f"relation {name} has {twice} twice; expected one answer a subject"
    if not _is_texts(found.get("prose")) or any(len(text.split()) < 2 for text in found["prose"]):
        yield f"its prose is {_short(found.get('prose'))}; expected a list of paragraphs"
    forget = found.get("forget", {} if shipped else None)
    if not isinstance(forget, dict) or not (forget or shipped) or not all(map(_is_texts, forget.values())):
        yield f"its forget is {_short(forget)}; expected {{relation: [subjects]}}"
    for name, subjects in forget.items():
        there = [subject for subject, _ in found["relations"].get(name, {"facts": []})["facts"]]
        if strange := next((one for one in subjects if one not in there), None):
            yield f"forget names {strange} of relation {name}; expected a relation and subjects of the file"


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text.strip() for text in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
