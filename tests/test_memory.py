"""Locating in little memory: fewer steps per replay, then fewer samples, and the same scores."""

import logging

import pytest
import torch
from families import Float64, build, text
from tiny import image_batch, split, text_batch, tiny_llama, tiny_llava, tiny_qwen_vl, unchecked_route

import mipfast
from mipfast.model.sites import find_sites
from mipfast.scoring import memory, nodes, replay, search, wave
from mipfast.scoring.capture import capture

F64 = torch.float64


def assert_equal(found, expected):
    largest = expected.scores.abs().amax(2, keepdim=True)
    assert ((found.scores - expected.scores).abs() <= 1e-7 * largest + 1e-30).all()
    assert torch.equal(found.path, expected.path)
    torch.testing.assert_close(
        torch.tensor(found.report["residuals"]), torch.tensor(expected.report["residuals"]), rtol=1e-6, atol=1e-9
    )
    assert found.report["num_labels"] == expected.report["num_labels"]


def case(modality):
    model = tiny_qwen_vl(F64)
    # rows of one, two and (for text) no picture, of different sizes
    sizes = [56, [84, 56], 56, [56] if modality == "vision" else []]
    return model, image_batch(model, 4, 3, sizes)


def running_out(monkeypatch, too_much):
    """Every score over more than is allowed raises, as a GPU would."""
    seen = []
    monkeypatch.setattr(search, "_check_route", unchecked_route)
    for kind in (nodes.ResidualNodes, nodes.HookedNodes, wave.Wave):

        def score(self, *args, _score=kind.score, **kwargs):
            capture = self.clean.capture if isinstance(self, wave.Wave) else self.replay.capture
            seen.append((self.copies, capture.num_samples))
            if too_much(*seen[-1]):
                raise torch.OutOfMemoryError("out of memory")
            return _score(self, *args, **kwargs)

        monkeypatch.setattr(kind, "score", score)
    return seen


@pytest.mark.parametrize("search", ["greedy", "pointwise"])
@pytest.mark.parametrize("modality", ["text", "vision"])
@pytest.mark.parametrize("too_much", [lambda m, n: m > 1, lambda m, n: n > 1, lambda m, n: m * n > 3])
def test_out_of_memory_changes_nothing(monkeypatch, modality, search, too_much):
    model, batch = case(modality)
    settings = dict(modality=modality, search=search, n_steps=5)
    expected = mipfast.locate(model, batch, **settings)
    seen = running_out(monkeypatch, too_much)
    assert_equal(mipfast.locate(model, batch, **settings), expected)
    assert any(too_much(*one) for one in seen)


def test_positions_of_every_sample_go_with_their_half(monkeypatch):
    model, batch = case("text")
    n = len(batch["labels"])
    settings = dict(positions=torch.arange(1, 2 * n + 1).view(n, 2), n_steps=2)
    expected = mipfast.locate(model, batch, **settings)
    running_out(monkeypatch, lambda m, n: n > 1)
    assert_equal(mipfast.locate(model, batch, **settings), expected)
    with pytest.raises(mipfast.InputError, match=f"positions have rows for {n + 1} samples; expected {n}"):
        mipfast.locate(model, batch, positions=torch.arange(2 * n + 2).view(n + 1, 2))


def test_a_layer_is_not_scored_again(monkeypatch):
    """Half of the copies that did not fit go on where they stand."""
    model = tiny_llama(F64)
    seen = running_out(monkeypatch, lambda m, n: m > 2)
    mipfast.locate(model, text_batch(model, [9, 12], [2, 1]), n_steps=4)
    assert seen == [(4, 2), (2, 2), (2, 2), *[(2, 2)] * (2 * 3)]


@pytest.mark.parametrize("rule", [dict(n_steps=5), dict(tol=1e-4)], ids=str)
@pytest.mark.parametrize("search", ["greedy", "pointwise"])
@pytest.mark.parametrize("family", ["llama", "gpt2-lora"])
def test_running_out_within_the_model_changes_nothing(monkeypatch, family, search, rule, caplog):
    """Where a replay stands half-way: the whole model runs, or the copies of a wave."""
    model = tiny_llama(F64) if family == "llama" else build(family)
    batch = text_batch(model, [9, 12], [2, 1]) if family == "llama" else text(family)
    settings = dict(search=search, residuals="all", **rule)
    with Float64():
        expected, run = mipfast.locate(model, batch, **settings), replay.Replay._run

        def short(self, at_labels):
            if self.copies * self.capture.num_samples > 6:
                run(self, at_labels)
                raise torch.OutOfMemoryError("out of memory")
            return run(self, at_labels)

        monkeypatch.setattr(replay.Replay, "_run", short)
        with caplog.at_level(logging.WARNING, "mipfast"):
            found = mipfast.locate(model, batch, **settings)
    assert "out of memory: going on with" in caplog.text
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-9)
    assert found.path.equal(expected.path)


def test_joint_scores_run_out_too(monkeypatch):
    model = tiny_llama(F64)
    batch, settings = text_batch(model, [9, 12], [2, 1]), dict(combine="product", n_steps=5)
    expected = mipfast.locate(model, batch, **settings)
    gradients = nodes.HookedNodes.gradients

    def small(self, *args, **kwargs):
        if self.replay.copies > 1:
            raise torch.OutOfMemoryError("out of memory")
        return gradients(self, *args, **kwargs)

    monkeypatch.setattr(nodes.HookedNodes, "gradients", small)
    found = mipfast.locate(model, batch, **settings)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-6, atol=1e-12)


def test_what_never_fits_is_said(monkeypatch, caplog):
    model = tiny_llama(F64)
    running_out(monkeypatch, lambda m, n: True)
    with pytest.raises(mipfast.InputError, match="one step of one sample of 12 tokens does not fit"):
        mipfast.locate(model, text_batch(model, [9, 12], [2, 1]))
    assert "2 samples do not fit" in caplog.text


@pytest.mark.parametrize("modality", ["text", "vision"])
def test_halves_are_the_samples(modality):
    model, batch = case(modality)
    halves = memory.halves(batch, model.config)
    assert [len(half["labels"]) for half in halves] == [2, 2]
    expected = mipfast.locate(model, batch, modality=modality)
    found = [mipfast.locate(model, half, modality=modality) for half in halves]
    torch.testing.assert_close(torch.cat([f.scores for f in found]), expected.scores, rtol=1e-6, atol=1e-12)


def test_a_half_without_pictures_has_no_empty_tensors():
    model = tiny_qwen_vl(F64)
    text = memory.halves(image_batch(model, 2, 3, [56, []]), model.config)[1]
    assert "pixel_values" not in text and "image_grid_thw" not in text


def test_pictures_of_nobody_in_particular():
    model = tiny_llava(F64)
    batch = image_batch(model, 2, 1)
    batch["pixel_values"] = torch.cat([batch["pixel_values"]] * 2)
    with pytest.raises(mipfast.InputError, match=r"divide pixel_values \[4, 3, 56, 56\]"):
        memory.halves(batch, model.config)


@pytest.mark.parametrize("modality", ["text", "vision"])
def test_the_model_of_bytes_is_corrected(modality, monkeypatch):
    """After a first batch, a budget is divided by what a copy was seen to keep, whatever the copies then."""
    batch, fitting = None, []
    for steps in (1, 4):
        model, batch = case(modality)
        sites = find_sites(model)
        stack = sites.text if modality == "text" else sites.vision[0]
        captured = capture(model, sites, stack, batch, "all")
        modelled = memory.copies_that_fit(captured, 2**30)
        mipfast.locate(
            model, batch, modality=modality, positions="all", method="riemann_left", n_steps=steps, residuals="none"
        )
        fitting.append(memory.copies_that_fit(captured, 2**30))
        assert fitting[-1] != modelled
    assert fitting[0] == pytest.approx(fitting[1], rel=0.15)


def test_automatic_budget_leaves_room(monkeypatch):
    model = tiny_llama(F64)
    sites = find_sites(model)
    captured = capture(model, sites, sites.text, split(text_batch(model, [9, 12], [2, 1]), 0), "all")
    monkeypatch.setattr(memory, "_free", lambda device: 1000 * (memory._modelled(captured) + memory._logits(captured)))
    assert memory.copies_that_fit(captured, "auto") == 800


def test_a_budget_is_kept(monkeypatch, caplog):
    """memory_budget in bytes: steps first, samples after."""
    model, batch = case("text")
    caplog.set_level(logging.WARNING)
    seen = running_out(monkeypatch, lambda m, n: False)
    sites = find_sites(model)
    captured = capture(model, sites, sites.text, batch, "last_prompt")
    one = memory._modelled(captured) + memory._logits(captured)
    mipfast.locate(model, batch, memory_budget=3 * one, n_steps=5)
    assert {m for m, _ in seen} <= {3, 2} and {n for _, n in seen} == {4}
    seen.clear()
    mipfast.locate(model, batch, memory_budget=1)
    assert set(seen) == {(1, 1)}
