"""The counterfactual baseline of `mipfast.locate`, against `slow_reference.slow_locate` and its own definition.

Held to `test_locate.compare`: in float64 scores agree to 1e-9 of their layer's largest, and so do paths and residuals.
"""

from functools import cache

import pytest
import torch
from families import Float64, build
from slow_reference import slow_locate
from test_locate import compare
from test_memory import assert_equal, running_out
from tiny import FIRST_WORD, image_batch, text_batch, tiny_llama, tiny_llava, tiny_polynomial, tiny_qwen_vl

import mipfast

F64 = torch.float64
llama, qwen, llava = (cache(lambda make=make: make(F64)) for make in (tiny_llama, tiny_qwen_vl, tiny_llava))
gemma2 = cache(lambda: build("gemma2"))  # normalises behind its FFN: replayed natively


def others(batch, count=3):
    """Batches of the same form: other words in the prompt, other pictures, the same answers."""
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(100 + seed)
        ids = batch["input_ids"]
        words = (ids >= FIRST_WORD) & (batch["labels"] == -100) & batch["attention_mask"].bool()
        drawn = torch.randint(FIRST_WORD, 60, ids.shape, generator=generator)
        found.append({**batch, "input_ids": torch.where(words, drawn, ids)})
        if "pixel_values" in batch:
            pixels = batch["pixel_values"]
            found[-1]["pixel_values"] = torch.randn(pixels.shape, generator=generator, dtype=pixels.dtype)
    return found


def texts(model, seed=1):
    return text_batch(model, [9, 12], [2, 3], "right", seed)


def same(model, batch, **settings):
    settings = {"n_steps": 4 if settings.get("modality", "text") == "text" else 2} | settings
    compared = others(batch)
    found = mipfast.locate(model, batch, counterfactuals=compared, **settings)
    compare(found, slow_locate(model, batch, counterfactuals=compared, **settings))
    return found


def test_reference_is_complete_from_a_baseline():
    """Scores and carry sum to F(clean) - F(baseline) once the quadrature is fine."""
    batch = texts(llama())
    _, _, residual = slow_locate(llama(), batch, positions="prompt", n_steps=24, counterfactuals=others(batch))
    assert residual.max() < 1e-8


@pytest.mark.parametrize("search", ["greedy", "pointwise"])
@pytest.mark.parametrize("score", ["igi", "ifi"])
@pytest.mark.parametrize("positions", ["prompt", "last_prompt", "all"])
def test_text(positions, score, search):
    same(llama(), texts(llama()), positions=positions, score=score, search=search, n_steps=2)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("method", ["gaussradau", "riemann_left"])
def test_text_with_a_clean_and_a_silent_node(method, padding):
    """gaussradau's last node is the clean run, riemann_left's first the baseline."""
    batch = text_batch(llama(), [9, 12, 6], [2, 1, 3], padding, seed=3)
    same(llama(), batch, positions="prompt", method=method, n_steps=3, objective="log_odds")


@pytest.mark.parametrize("search", ["greedy", "pointwise"])
@pytest.mark.parametrize("score", ["igi", "ifi"])
def test_text_where_blocks_run_natively(score, search):
    with Float64():
        batch = texts(gemma2())
        compared, settings = others(batch), dict(positions="prompt", score=score, search=search, n_steps=2)
        found = mipfast.locate(gemma2(), batch, counterfactuals=compared, **settings)
        truth = slow_locate(gemma2(), batch, counterfactuals=compared, **settings)
    found.scores = found.scores.float()
    compare(found, truth)


@pytest.mark.parametrize("positions", ["prompt", "last_prompt"])
def test_text_about_other_pictures(positions):
    """Rows with a small picture, a larger one, two, and none."""
    same(qwen(), image_batch(qwen(), 4, 2, [56, 84, [56, (84, 56)], []]), positions=positions, n_steps=2)


@pytest.mark.parametrize("search", ["greedy", "pointwise"])
@pytest.mark.parametrize("score", ["igi", "ifi"])
def test_vision(score, search):
    batch = image_batch(qwen(), 2, 3, [56, (56, 84)])
    same(qwen(), batch, modality="vision", score=score, search=search, n_steps=2)


def test_vision_with_a_layer_without_gradient():
    found = same(llava(), image_batch(llava(), 2, 1), modality="vision")
    assert found.report["layers_without_gradient"] == [2]


@pytest.mark.parametrize(("modality", "score"), [("text", "igi"), ("text", "ifi"), ("vision", "ifi")])
def test_one_pass_is_the_clean_gradient(modality, score):
    """Which only IGI multiplies, by how far the activation is from the baseline."""
    batch = image_batch(qwen(), 2, 3, [56, 84])
    compared, settings = others(batch), dict(modality=modality, score=score)
    found = mipfast.locate(qwen(), batch, search="one-pass", counterfactuals=compared, **settings)
    settings |= dict(search="pointwise", method="gaussradau", n_steps=1, counterfactuals=compared)
    compare(found, slow_locate(qwen(), batch, **settings))


@pytest.mark.parametrize("modality", ["text", "vision"])
def test_float32(modality):
    model = tiny_qwen_vl()
    batch = image_batch(model, 2, 6, [56, 84])
    compared = others(batch)
    wide = [{**one, "pixel_values": one["pixel_values"].double()} for one in (batch, *compared)]
    truth = slow_locate(qwen(), wide[0], modality, counterfactuals=wide[1:])
    steps = 4 if modality == "text" else 2
    compare(mipfast.locate(model, batch, modality=modality, n_steps=steps, counterfactuals=compared), truth, 1e-4)


@pytest.mark.parametrize("search", ["greedy", "pointwise"])
def test_completeness_is_exact_on_a_polynomial(search):
    """F is of degree 8 along the line from the baseline as along the one from zero (test_locate says why)."""
    model = tiny_polynomial()
    batch = text_batch(model, [9, 12], [2, 3], seed=1)
    compared = [text_batch(model, [9, 12], [2, 3], seed=seed) for seed in (2, 3)]
    settings = dict(objective="log_odds", positions="prompt", search=search, counterfactuals=compared)
    assert torch.tensor(mipfast.locate(model, batch, n_steps=2, **settings).report["residuals"]).max() > 1e-4
    assert torch.tensor(mipfast.locate(model, batch, n_steps=4, **settings).report["residuals"]).max() < 1e-10


@pytest.mark.parametrize("modality", ["text", "vision"])
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_what_the_batches_share_scores_nothing(modality, dtype):
    model = tiny_qwen_vl(dtype)
    batch = image_batch(model, 2, 4, [56, 84])
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    settings = dict(modality=modality, score="igi", positions="all", counterfactuals=[batch, batch])
    assert not mipfast.locate(model, batch, **settings).scores.any()


def test_positions_before_the_first_difference_score_nothing():
    """The last layer scores nothing at any of them: no answer looks at it there."""
    batch = text_batch(llama(), [9], [2], seed=5)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, 3] = (other["input_ids"][0, 3] + 1) % 50 + FIRST_WORD
    for position in range(3):
        assert not mipfast.locate(llama(), batch, positions=[position], counterfactuals=other).scores.any()
    assert mipfast.locate(llama(), batch, positions=[3], counterfactuals=other).scores[:, :-1].all()


def test_silent_counterfactuals_are_the_zero_baseline():
    """A prompt of one word whose embedding is zero: without biases every activation of it is zero."""
    model = tiny_llama()
    model.model.embed_tokens.weight.data[FIRST_WORD] = 0
    batch = texts(model)
    silent = {**batch, "input_ids": torch.full_like(batch["input_ids"], FIRST_WORD)}
    expected = mipfast.locate(model, batch, positions="prompt")
    found = mipfast.locate(model, batch, positions="prompt", counterfactuals=[silent])
    assert torch.equal(found.scores, expected.scores) and torch.equal(found.path, expected.path)
    assert (expected.report["baseline"], expected.report["counterfactuals"]) == ("zero", 0)
    assert (found.report["baseline"], found.report["counterfactuals"]) == ("counterfactual", 1)


@pytest.mark.parametrize("modality", ["text", "vision"])
@pytest.mark.parametrize("too_much", [lambda m, n: m > 1, lambda m, n: n > 1])
def test_out_of_memory_changes_nothing(monkeypatch, modality, too_much):
    batch = image_batch(qwen(), 4, 3, [56, [84, 56], 56, [56]])
    settings = dict(modality=modality, n_steps=3, counterfactuals=iter(others(batch)))
    expected = mipfast.locate(qwen(), batch, **settings)
    seen = running_out(monkeypatch, too_much)
    assert_equal(mipfast.locate(qwen(), batch, **{**settings, "counterfactuals": iter(others(batch))}), expected)
    assert any(too_much(*one) for one in seen)


def test_snr_from_a_counterfactual_mean_and_zero_damage(tmp_path):
    batch, retain = texts(llama()), texts(llama(), seed=6)
    zero, damage = mipfast.locate(llama(), batch), mipfast.locate(llama(), retain)
    away = mipfast.locate(llama(), batch, counterfactuals=others(batch))
    away.save_pretrained(tmp_path)
    away = mipfast.Attribution.from_pretrained(tmp_path)
    path = mipfast.NeuronPath.select(away, per_layer=5, aggregate="snr", retain=damage)
    labels = torch.tensor([2.0, 3.0])[:, None, None]
    noise = (damage.scores / labels).square().mean(0).sqrt()
    ratio = (away.scores / labels).mean(0) / (noise + 0.1 * noise.mean())
    assert {layer: kept.tolist() for (_, layer), kept in path.items()} == {
        layer: row.topk(5).indices.tolist() for layer, row in enumerate(ratio)
    }
    assert path.origin["baseline"] == "counterfactual"
    assert "baseline" not in mipfast.NeuronPath.select(zero).origin
    assert mipfast.NeuronPath.select([away, zero]).origin["baseline"] == "counterfactual and zero"


def test_the_weights_are_left_as_they_were():
    model = tiny_qwen_vl()
    batch = image_batch(model, 2, 10, [56, 84])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compared = others(batch)
    inputs = [{name: value.clone() for name, value in one.items()} for one in (batch, *compared)]
    mipfast.locate(model, batch, modality="vision", counterfactuals=compared)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for one, was in zip((batch, *compared), inputs, strict=True):
        assert all(torch.equal(one[name], was[name]) for name in was)
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize(
    ("other", "settings", "said"),
    [
        (lambda b: [texts(llama())], dict(combine="product"), "combine='product' is defined from zero"),
        (lambda b: [texts(llama())], dict(config=mipfast.LocateConfig.released("text")), "combine='released'"),
        (lambda b: [], {}, "no counterfactual batch"),
        (lambda b: [b, text_batch(llama(), [9, 10], [2, 3])], {}, r"batch 1 has labels \[2, 10\]"),
        (lambda b: [text_batch(llama(), [12, 12], [2, 3])], dict(positions="prompt"), r"\[10, 9\] chosen"),
        (lambda b: [text_batch(llama(), [12], [2])], {}, r"labels \[1, 12\]"),
        (lambda b: [{k: v for k, v in b.items() if k != "labels"}], {}, "counterfactual batch 0: .* no labels"),
    ],
    ids=["product", "released", "empty", "length", "positions", "samples", "labels"],
)
def test_what_cannot_be_compared_is_refused(other, settings, said):
    batch = texts(llama())
    with pytest.raises(mipfast.InputError, match=said):
        mipfast.locate(llama(), batch, counterfactuals=other(batch), **settings)


def test_pictures_of_another_size_are_refused():
    batch = image_batch(qwen(), 2, 3, [56, 84])
    with pytest.raises(mipfast.InputError, match="pictures of the same size"):
        mipfast.locate(qwen(), batch, modality="vision", counterfactuals=image_batch(qwen(), 2, 3, [84, 56]))


def test_counterfactuals_are_of_one_batch():
    batch = texts(llama())
    with pytest.raises(mipfast.InputError, match="call locate once for each"):
        mipfast.locate(llama(), [batch, batch], counterfactuals=others(batch))
