"""The demo on a pretrained model: which facts it knows, the neurons that carry eight of them, and what is left without
those."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm

from mipfast.data.checkpoint import load_model, save_model
from mipfast.data.encoder import Batches, Encoder
from mipfast.data.records import Record
from mipfast.demo import smollm2
from mipfast.demo.facts import Fact, Facts
from mipfast.demo.run import path_facts
from mipfast.edit.fit_path import RISE, fit_path
from mipfast.edit.neuron_path import Aggregate, NeuronPath
from mipfast.edit.prune import prune
from mipfast.errors import InputError
from mipfast.files import machine, versions
from mipfast.judge.records import evaluate_records
from mipfast.model.likelihood import log_probs
from mipfast.model.patching import frozen_eval
from mipfast.model.sites import find_sites
from mipfast.scoring.attribution import Attribution
from mipfast.scoring.search import locate

log = logging.getLogger("mipfast")

# how neurons are chosen
LOCATE: dict[str, Any] = {"search": "one-pass", "positions": "prompt", "residuals": "none"}
AGGREGATE: Aggregate = "snr"
MAX_DAMAGE = 0.01  # nats of the NLL of what is to be kept
# what is asked
FORGET = ("capital", 8)  # where the file does not say what to forget
KEPT = 15  # known facts of every other relation: a third each to score, to judge by, and for the table
RANDOM_SEEDS = range(3)
BATCH = 16
SHOWN = {"neighbours": 3, "others": 4}  # continuations beside those of what is forgotten
NEW_TOKENS = 12


class Answer(NamedTuple):
    """Whether every token of an answer is ranked first, and the answer's mean NLL per token."""

    right: bool
    nll: float


class Chosen(NamedTuple):
    """forget and scored are located on; judged says how many neurons are harmless; groups are the table's, where of
    other relations none was scored or judged."""

    forget: list[Record]
    scored: list[Record]
    judged: list[Record]
    groups: dict[str, list[Record]]


def run(folder: Path, facts: Facts, out: Path, progress: bool = True) -> dict[str, Any]:
    """The whole demo on the model of a folder. Writes out/model, the pruned model as a plain transformers folder, and
    returns the results that `real_report.write_report` takes.

    Raises InputError where the model knows too little of the facts, and where not even one neuron is harmless."""
    seconds: dict[str, float] = {}
    with _timed("load", seconds):
        model = load_model(folder, dtype="float32")
        encoder = Encoder.from_pretrained(folder)
        encoder.processor = encoder.tokenizer.chat_template = None  # a fact is continued, not asked of an assistant
    with _timed("ask what it knows", seconds):
        every = [text for known in facts.relations.values() for fact in known for text in fact.scored]
        before = ask(model, encoder, every, progress)
        chosen = choose(facts, before)
        asked = list(dict.fromkeys(text for texts in chosen.groups.values() for text in texts))
        before |= ask(model, encoder, [text for text in asked if text not in before], progress)
        shown = _shown(chosen)
        continued = {"before": _continuations(model, encoder, shown)}
    log.info("%d prompts to forget, %d scored, %d judged", *map(len, chosen[:3]))
    with _timed("locate", seconds):
        located, kept = (
            locate(model, Batches(encoder, texts, BATCH, "cpu"), **LOCATE, progress=progress)
            for texts in (chosen.forget, chosen.scored)
        )
    with _timed("find the size", seconds):
        forget, retain = (Batches(encoder, texts, BATCH, "cpu") for texts in (chosen.forget, chosen.judged))
        options: Any = {"max_damage": MAX_DAMAGE, "aggregate": AGGREGATE}
        path = _smallest_that_forgets(fit_path(model, forget, retain, located, kept, **options), located, kept)
    answers = {"before": [before]}
    sites = find_sites(model)
    with _timed("ask the pruned model", seconds), prune(model, path):
        answers["pruned"] = [ask(model, encoder, asked, progress)]
        continued["pruned"] = _continuations(model, encoder, shown)
        save_model(model, folder, out / "model")
    with _timed("ask with random neurons pruned", seconds):
        controls = [NeuronPath.random(sites, path, seed) for seed in RANDOM_SEEDS]
        answers["random"] = []
        for control in controls:
            with prune(model, control):
                answers["random"].append(ask(model, encoder, asked, progress))
                if control is controls[0]:
                    continued["random"] = _continuations(model, encoder, shown)
    results = {
        "title": f"mipfast demo --real: {folder.name}",
        "seeds": [RANDOM_SEEDS[0]],
        "path": path.origin,
        "paths": {"MIP": path_facts(sites, path), "random": path_facts(sites, controls[0])},
        "to forget": list(dict.fromkeys(text.id.rsplit("/", 1)[0] for text in chosen.forget)),
        "rows": [_row(name, texts, answers) for name, texts in chosen.groups.items()],
        "prompts": [_facts_of(name, text, answers) for name, texts in chosen.groups.items() for text in texts],
        "continued": [
            {"prompt": text.prompt, "answer": text.answer} | {state: said[i] for state, said in continued.items()}
            for i, text in enumerate(shown)
        ],
        "config": {"locate": LOCATE, "aggregate": AGGREGATE, "random seeds": [*RANDOM_SEEDS]},
        "versions": versions(),
        "machine": machine(),
        "limits": [smollm2.QUANTISED] if folder == smollm2.FOLDER else [],
    }
    return results | {"seconds": seconds | {"all": round(sum(seconds.values()), 1)}}


def choose(facts: Facts, before: dict[Record, Answer]) -> Chosen:
    """What to forget and what to judge it by, of the facts that the model knows: that it answers in one of their scored
    wordings. Raises InputError where it knows nothing to forget, or nothing to keep."""

    def known(texts: Sequence[Record]) -> list[Record]:
        return [text for text in texts if before[text].right]

    there = {name: [fact for fact in every if known(fact.scored)] for name, every in facts.relations.items()}
    name, count = FORGET
    best = sorted(there.get(name, []), key=lambda fact: -len(known(fact.scored)))
    wanted = facts.forget or {name: [fact.subject for fact in best[:count]]}
    for name, subjects in wanted.items():
        if unknown := set(subjects) - {fact.subject for fact in there[name]}:
            log.warning("the model does not know the %s of %s; left out", name, ", ".join(sorted(unknown)))
    forget, neighbours, scored, judged = list[Fact](), list[Fact](), list[Record](), list[Record]()
    groups: dict[str, list[Record]] = {}
    for name, some in there.items():
        if name in wanted:
            forget += [fact for fact in some if fact.subject in wanted[name]]
            neighbours += [fact for fact in some if fact.subject not in wanted[name]]
        else:
            parts = ([text for fact in some[i:KEPT:3] for text in known(fact.scored)] for i in range(3))
            for own, texts in zip((scored, judged, groups.setdefault(name, [])), parts, strict=True):
                own.extend(texts)
    if not (forget and scored and judged):
        raise InputError(
            f"the model knows {len(forget)} of the facts to forget, and of other relations {len(scored)} to score and "
            f"{len(judged)} to judge by; expected some of each: give facts that it knows"
        )
    asked = {
        "to forget": [text for fact in forget for text in known(fact.scored)],
        "to forget, held-out wordings": _held_out(forget),
        "same relation": [text for fact in neighbours for text in known(fact.scored)],
        "same relation, held-out wordings": _held_out(neighbours),
        "other relations": [text for texts in groups.values() for text in texts],
        **groups,
        "plain prose": facts.prose,
    }
    return Chosen(asked["to forget"], scored, judged, {name: texts for name, texts in asked.items() if texts})


def ask(model: nn.Module, encoder: Encoder, records: Sequence[Record], progress: bool) -> dict[Record, Answer]:
    """The model's answer to every record, in one forward pass."""
    batches = Batches(encoder, records, BATCH, "cpu")
    found: dict[Record, Answer] = {}
    with frozen_eval(model), torch.no_grad():
        for order, batch in zip(batches.order, tqdm(batches, "ask", leave=False, disable=not progress), strict=True):
            scores, targets = log_probs(model, batch)
            counts = (batch["labels"] != -100).sum(1).tolist()
            nll = -scores.gather(1, targets[:, None])[:, 0]
            parts = zip(order, nll.split(counts), (scores.argmax(1) == targets).split(counts), strict=True)
            found |= {records[i]: Answer(bool(hits.all()), tokens.mean().item()) for i, tokens, hits in parts}
    return found


def _smallest_that_forgets(path: NeuronPath, located: Attribution, kept: Attribution) -> NeuronPath:
    """The path itself where it forgets; else that of the smallest size on its curve that does, harmful as it is; where
    none does, the path."""
    before, *sizes = path.origin["curve"]
    forgetting = [size["neurons"] for size in sizes if size["forget"] - before["forget"] >= RISE]
    if path.origin["forgets"] or not forgetting:
        return path
    share = min(forgetting) / located.scores[0].numel()
    larger = NeuronPath.select(located, share, aggregate=AGGREGATE, retain=kept, scope="stack")
    return NeuronPath(larger, larger.fingerprint, path.origin | larger.origin | {"neurons": larger.num_neurons})


def _held_out(facts: Sequence[Fact]) -> list[Record]:
    return [text for fact in facts for text in fact.held_out]


def _shown(chosen: Chosen) -> list[Record]:
    """Prompts whose continuations are shown: the first of each subject to forget, then some of the same relation and of
    others."""
    firsts = {text.id.rsplit("/", 1)[0]: text for text in reversed(chosen.forget)}
    neighbours = chosen.groups.get("same relation", [])
    return [
        *reversed(firsts.values()),
        *_spread(neighbours, SHOWN["neighbours"]),
        *_spread(chosen.groups["other relations"], SHOWN["others"]),
    ]


def _spread(texts: list[Record], count: int) -> list[Record]:
    return texts[:: max(1, len(texts) // count)][:count]


def _continuations(model: nn.Module, encoder: Encoder, records: Sequence[Record]) -> list[str]:
    return [row["text"] for row in evaluate_records(model, encoder, records, max_new_tokens=NEW_TOKENS).rows]


def _row(name: str, texts: list[Record], answers: dict[str, list[dict[Record, Answer]]]) -> dict[str, Any]:
    """A line of the table: percent right and mean NLL in every state, averaged over its seeds."""
    found = {state: [said[text] for said in some for text in texts] for state, some in answers.items()}
    return {
        "name": name,
        "prompts": len(texts),
        "right": {state: 100 * fmean(answer.right for answer in some) for state, some in found.items()},
        "nll": {state: fmean(answer.nll for answer in some) for state, some in found.items()},
    }


def _facts_of(name: str, text: Record, answers: dict[str, list[dict[Record, Answer]]]) -> dict[str, Any]:
    """A prompt of the table with its answer in every state, of the first seed."""
    said = {state: some[0][text]._asdict() for state, some in answers.items()}
    return {"group": name, "prompt": text.prompt, "answer": text.answer, **said}


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    started = time.monotonic()
    log.info("%s", stage)
    yield
    seconds[stage] = round(time.monotonic() - started, 1)
    log.info("%s: %.0f s", stage, seconds[stage])
