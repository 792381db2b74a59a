"""Is what was forgotten gone, or only not said? Other ways of asking for the facts about a trial's forget people.

A probe takes a trial and a model and gives {"text": percent, "image": percent}. Of every one the shipped base gives
nearly 100; what forgetting would look like is a model retrained without the forget people, not 0 or 50.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from mipfast.demo import people
from mipfast.demo.model import Batch, Encoder
from mipfast.experiment.figures import MODALITIES
from mipfast.judge import attacks
from mipfast.judge.accuracy import evaluate

if TYPE_CHECKING:
    from mipfast.demo.trial import Trial

# nobody was trained on these; the base answers all of them
FRAMES = (
    "Which {noun} has {who} ?",
    "Tell me which {noun} {who} has .",
    "What is the {noun} {who} has ?",
    "For {who} , which {noun} ?",
)
HINTS = 2
BITS = 3  # the base stays at 100 / 100, as at 8 and 4; with 2 it falls to 92 / 85


def membership(trial: Trial, model: nn.Module) -> dict[str, float]:
    """The loss AUC of `attacks.membership`: trained questions about the forget people against as many about as many
    `people.strangers`. Strangers bear known names, so a retrained model is not at 50: at 56, 73 and 49 in text."""
    world = people.strangers(trial.encoder.world, trial.seed, len(trial.split.forget_people))
    encoder = Encoder(world, trial.encoder.tokenizer, trial.encoder.image_processor)
    found = {}
    for kind in MODALITIES:
        trained = trial.split.select("forget", test=False, modality=kind)
        never = [q for q in world.questions if not q.test and q.modality == kind]
        found[kind] = attacks.membership(model, trial.encoder.batches(trained), encoder.batches(never))["loss"]
    return found


def paraphrased(trial: Trial, model: nn.Module) -> dict[str, float]:
    """Accuracy in FRAMES, with either noun of a topic."""

    def batches(kind: str) -> list[Batch]:
        asked = []
        for (person, topic), (q, *_) in _facts(trial, kind).items():
            who = people.PORTRAYED if q.pictures else trial.encoder.world.people[person]
            asked += [replace(q, text=f.format(noun=noun, who=who)) for f in FRAMES for noun in people.NOUNS[topic]]
        return trial.encoder.batches(asked)

    return {kind: evaluate(model, batches(kind)).accuracy for kind in MODALITIES}


def in_context(trial: Trial, model: nn.Module) -> dict[str, float]:
    """Accuracy on test questions behind HINTS times name and value, of other topics; a portrait is named by them too.

    Nobody was trained on several questions in one prompt: behind two with answers about others the base gets 35 / 71,
    behind two about the same person 67 / 56, behind names and values 100 / 100."""
    rng = random.Random(f"in context {trial.seed}")
    values = {(q.subject, q.topic): q.answer for q in trial.encoder.world.questions}

    def hints(person: int, topic: str) -> list[int]:
        others = rng.sample([other for other in people.NOUNS if other != topic], HINTS)
        name = trial.encoder.world.people[person]
        return trial.encoder.tokenizer(" ".join(f"{name} {values[person, other]}" for other in others))["input_ids"]

    def batches(kind: str) -> list[Batch]:
        facts = _facts(trial, kind).items()
        return [attacks.prefixed(trial.encoder.batch(asked), hints(*fact), at=1) for fact, asked in facts]

    return {kind: evaluate(model, batches(kind)).accuracy for kind in MODALITIES}


def quantised(trial: Trial, model: nn.Module) -> dict[str, float]:
    """Accuracy on test questions with weights in BITS bit."""

    def batches(kind: str) -> list[Batch]:
        return trial.encoder.batches(trial.split.select("forget", test=True, modality=kind))

    with attacks.quantised(model, BITS):
        return {kind: evaluate(model, batches(kind)).accuracy for kind in MODALITIES}


def _facts(trial: Trial, kind: str) -> dict[tuple[int, str], list[people.Question]]:
    """The forget people's test questions by person and topic."""
    facts: dict[tuple[int, str], list[people.Question]] = {}
    for q in trial.split.select("forget", test=True, modality=kind):
        if q.subject is not None:
            facts.setdefault((q.subject, q.topic), []).append(q)
    return facts


PROBES: dict[str, Callable[[Trial, nn.Module], dict[str, float]]] = {
    "membership": membership,
    "paraphrased": paraphrased,
    "in context": in_context,
    "quantised": quantised,
}
NOTES = {
    "membership": "AUC: are the trained answers likelier than those about people nobody was trained on?",
    "paraphrased": "accuracy in four wordings that nobody was trained on",
    "in context": "accuracy behind two other facts about the same person, as name and value",
    "quantised": f"accuracy with the weights of every linear layer but the head in {BITS} bit",
}
