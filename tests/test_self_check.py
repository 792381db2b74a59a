"""The first samples against plain autograd: what is seen, and what then happens. And what a call leaves behind that was
interrupted anywhere, that stands inside another, or inside inference_mode."""

import copy

import pytest
import torch
from families import Float64, build, text
from slow_reference import slow_locate
from test_locate import compare
from test_threads import registries, state
from tiny import image_batch, split, text_batch, tiny_llama, tiny_qwen_vl

from mipfast import ModelError, locate
from mipfast.model import families
from mipfast.scoring import capture, nodes, plan, replay, search, self_check, staggered

MODALITIES = pytest.mark.parametrize("modality", ["text", "vision"])
COARSE = dict(n_steps=2, top_k=3)


def inputs(modality, dtype=torch.float32):
    if modality == "text":
        model = tiny_llama(dtype)
        return model, text_batch(model, [9, 12, 7], [2, 3, 1], seed=1)
    model = tiny_qwen_vl(dtype)
    return model, image_batch(model, 3, 1, [56, 84, 56])


def assert_equal(found, expected):
    scale = expected.scores.abs().amax(2, keepdim=True)
    assert ((found.scores - expected.scores).abs() <= 1e-5 * scale).all() and found.path.equal(expected.path)


@MODALITIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_sound_model_agrees(modality, dtype, caplog):
    model, batch = inputs(modality, dtype)
    for settings in ({}, dict(positions=torch.tensor([[1], [2], [3]])), dict(search="one-pass")):
        off = locate(model, batch, modality=modality, **settings).report["self_check"]
        assert off < (1e-5 if dtype == torch.float32 else 1e-6)
    assert "plain autograd" not in caplog.text


@pytest.mark.parametrize("name", ["gemma2", "falcon", "doge"])
def test_so_does_one_that_is_replayed_natively(name):
    with Float64():
        assert locate(build(name), text(name), **COARSE).report["self_check"] < 1e-6


# ------------------------------------------------------------------ a model that does not run as mipfast thinks


def test_attention_that_is_not_in_the_registry_is_seen(monkeypatch, caplog):
    """Falcon's, which takes a mask of True and False for numbers to add: every token would look at all."""
    model, batch = build("falcon"), text("falcon")
    monkeypatch.setattr(families, "USES_REGISTRY", "forward")  # which every model has
    with Float64():
        found = locate(model, batch, **COARSE)
        truth = slow_locate(model, batch, **COARSE)
    assert "replaying natively" in caplog.text and found.report["self_check"] < 1e-6
    found.scores = found.scores.float()
    compare(found, truth)


def doubled(monkeypatch, *names):
    for name in names:
        native = getattr(nodes.ops, name)
        monkeypatch.setattr(nodes.ops, name, lambda *a, _native=native, **k: tuple(2 * s for s in _native(*a, **k)))


@MODALITIES
def test_a_fast_way_that_is_wrong_is_left(modality, monkeypatch, caplog):
    model, batch = inputs(modality)
    expected = locate(model, batch, modality=modality)
    doubled(monkeypatch, "project_accumulate")  # of the fast way alone
    found = locate(copy.deepcopy(model), batch, modality=modality)  # the model itself was checked
    assert "fast scores are off by 100.0% from plain autograd; replaying natively" in caplog.text
    assert_equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_native_way_that_is_wrong_is_refused(dtype, monkeypatch, caplog):
    """In 16 bits it may be rounding alone: said, not refused."""
    model, batch = inputs("text")
    model.to(dtype)
    doubled(monkeypatch, "project_accumulate", "riemann_accumulate")
    if dtype == torch.float32:
        with pytest.raises(ModelError, match=r"LlamaForCausalLM: native scores are off by 100.0% from plain autograd"):
            locate(model, batch)
    else:
        assert locate(model, batch).report["self_check"] == pytest.approx(1, abs=0.2)
        assert "native scores are off by" in caplog.text


def test_two_samples_are_asked_and_none_where_memory_ends(monkeypatch):
    model, batch = inputs("text")
    expected, asked = locate(model, batch), []
    twice = {name: torch.cat([x[:2], x[:2]]) for name, x in batch.items()}

    def small(model, sites, stack, samples, *others):
        asked.append(len(samples["labels"]))
        return self_check.plain_scores(model, sites, stack, samples, *others)

    def none(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(search, "plain_scores", small)
    fresh = copy.deepcopy(model)
    assert locate(fresh, twice).report["self_check"] < 1e-5 and asked == [2]
    again = locate(fresh, twice)  # a model is asked about once
    assert again.report["self_check"] < 1e-5 and asked == [2] and again.scores[:2].equal(again.scores[2:])
    for name in ("plain_scores", "replayed_scores"):
        monkeypatch.setattr(search, name, none)
        found = locate(copy.deepcopy(model), batch)
        assert found.report["self_check"] is None and found.scores.equal(expected.scores)


# --------------------------------------------------------------------------------- what a call leaves behind


def everything(model):
    return state(model), registries(), [(p.requires_grad, p.grad) for p in model.parameters()], model.training


class Interrupted(BaseException):
    """As KeyboardInterrupt is: no `except Exception` catches it."""


def interrupt(monkeypatch, owner, name, after=0):
    """Raise in a function's call number `after`; how many there were."""
    native, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if after is not None and len(calls) > after:
            raise Interrupted
        return native(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


@MODALITIES
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (self_check, "chosen_rows"),
        (search, "replayed_scores"),
        (capture, "chosen_rows"),
        (plan, "_close"),
        (replay.Replay, "run"),
        (nodes.ops, "project_accumulate"),
        (nodes.CleanNode, "advance"),
        (nodes.ResidualNodes, "advance"),
        (replay.forward_ad, "unpack_dual"),
        (staggered.Staggered, "logits"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_an_interrupted_phase_leaves_nothing(modality, owner, name, monkeypatch):
    model, batch = inputs(modality)
    before, settings = everything(model), dict(modality=modality, method="gaussradau", n_steps=3)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, owner, name)
        locate(model, batch, **settings)
    assert everything(model) == before
    assert_equal(locate(model, batch, **settings), locate(inputs(modality)[0], batch, **settings))


@MODALITIES
def test_a_forward_pass_interrupted_anywhere_leaves_nothing(modality, monkeypatch):
    """The model itself raises, at nine moments spread over the call: inside every hook and every replaced attention."""
    model, batch = inputs(modality)
    norm = type(model.get_decoder().norm)
    before = everything(model)
    with monkeypatch.context() as patch:
        calls = interrupt(patch, norm, "forward", None)
        locate(model, batch, modality=modality)
    for part in range(1, 10):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            interrupt(patch, norm, "forward", len(calls) * part // 10)
            locate(model, batch, modality=modality)
        assert everything(model) == before


@MODALITIES
def test_a_call_inside_a_call(modality):
    """The batches of one locate come from a generator that locates, on the same model and on another."""
    model, batch = inputs(modality)
    other, other_batch = inputs("vision")
    before, expected = everything(model), locate(model, batch, modality=modality)
    inner = []

    def batches():
        for i in range(2):
            inner.append(locate(model, batch, modality=modality))
            inner.append(locate(other, other_batch, modality="vision"))
            yield split(batch, i)

    outer = locate(model, batches(), modality=modality)
    assert_equal(inner[0], expected)
    assert_equal(inner[2], expected)
    assert_equal(inner[3], locate(other, other_batch, modality="vision"))
    scale = expected.scores[:2].abs().amax(2, keepdim=True)
    assert ((outer.scores - expected.scores[:2]).abs() <= 1e-5 * scale).all() and outer.path.equal(expected.path[:2])
    assert everything(model) == before


# ----------------------------------------------------------------------------------------- inference_mode


@MODALITIES
def test_inference_mode_changes_nothing(modality):
    model, batch = inputs(modality)
    expected = locate(model, batch, modality=modality)
    with torch.inference_mode():
        outside = locate(model, batch, modality=modality)
        made_inside = locate(model, {name: x.clone() for name, x in batch.items()}, modality=modality)
        assert torch.is_inference_mode_enabled()
    for found in (outside, made_inside):
        assert found.scores.equal(expected.scores) and found.path.equal(expected.path)
        assert found.report == expected.report and not found.scores.is_inference()


def test_weights_made_inside_inference_mode_are_refused():
    with torch.inference_mode():
        model = tiny_llama()
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode(), pytest.raises(ModelError, match=r"inside torch.inference_mode\(\).* load it outside"):
            locate(model, text_batch(model, [9], [2]))
