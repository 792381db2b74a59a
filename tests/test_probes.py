"""The probes of bench/evidence, on the shipped base."""

from types import SimpleNamespace

import pytest
import torch
from bench_evidence import probes

from mipfast.demo import model as tiny
from mipfast.demo import people, run


@pytest.fixture(scope="module")
def base():
    return run.load_base()


@pytest.fixture(scope="module")
def trial(base):
    """Two of forget set 0's people."""
    model, encoder = base
    few = sorted(encoder.world.split(0).forget_people)[:2]
    return SimpleNamespace(model=model, encoder=encoder, split=people.Split(encoder.world, frozenset(few)), seed=0)


def test_strangers_are_like_everybody_and_like_nobody(base):
    _, encoder = base
    world = encoder.world
    a, b, c = (people.strangers(world, seed, 7) for seed in (0, 0, 1))
    assert a.questions == b.questions and [p.tobytes() for p in a.pictures] == [p.tobytes() for p in b.pictures]
    assert a.people != c.people
    assert len(set(a.people)) == 7 and not set(a.people) & set(world.people)
    assert {word for name in a.people for word in name.split()} <= {w for name in world.people for w in name.split()}
    for look in a.looks:
        assert all(sum(look[t] != other[t] for t in look) >= 3 for other in world.looks)
    known = [q for q in world.questions if q.subject is not None]
    assert {q.answer for q in a.questions} <= {q.answer for q in known}
    assert len(a.questions) * len(world.people) == len(known) * 7 and len(a.pictures) == 7 * people.N_VIEWS
    for batch in tiny.Encoder(a, encoder.tokenizer, encoder.image_processor).batches(a.questions):
        assert not (batch["input_ids"] == tiny.UNK).any()


def test_every_probe_finds_what_the_base_knows_and_leaves_it_alone(trial):
    before = {name: tensor.clone() for name, tensor in trial.model.state_dict().items()}
    assert probes.PROBES.keys() == probes.NOTES.keys()
    for name, probe in probes.PROBES.items():
        known = probe(trial, trial.model)
        assert all(known[kind] > 95 for kind in run.MODALITIES), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in trial.model.state_dict().items())


def prompts(monkeypatch, trial, probe):
    """[(what a probe shows the model, the answer it expects)]."""
    shown = []

    def watch(model, batches):
        for batch in batches:
            for row, labels in zip(batch["input_ids"], batch["labels"], strict=True):
                start = int((labels != -100).int().argmax())
                shown.append([trial.encoder.tokenizer.decode(part) for part in (row[:start], row[labels != -100])])
        return SimpleNamespace(accuracy=0.0)

    monkeypatch.setattr(probes, "evaluate", watch)
    probe(trial, trial.model)
    return shown


def test_nobody_was_trained_on_the_paraphrases(monkeypatch, trial):
    trained = {q.text for q in trial.encoder.world.questions}
    shown = prompts(monkeypatch, trial, probes.paraphrased)
    assert len(shown) == 2 * 2 * 5 * 2 * len(probes.FRAMES)
    for prompt, _ in shown:
        words = prompt.split()
        assert "<unk>" not in words and " ".join(w for w in words if not w.startswith("<|")) not in trained


def test_what_stands_in_context_does_not_hold_the_answer(monkeypatch, trial):
    names = [trial.encoder.world.people[i] for i in trial.split.forget_people]
    shown = prompts(monkeypatch, trial, probes.in_context)
    assert len(shown) == 2 * 2 * 5 * people.HELD_OUT
    for prompt, answer in shown:
        assert answer not in prompt.split()
        assert max(prompt.count(name) for name in names) >= probes.HINTS
