"""The one call, the judge, and every kind of bad input."""

from dataclasses import asdict, replace

import pytest
import torch
from tiny import image_batch, marked, text_batch, tiny_llama, tiny_moe, tiny_qwen_vl

from mipfast import (
    InputError,
    LocateConfig,
    MIPConfig,
    MipfastError,
    ModelError,
    RMisUConfig,
    evaluate,
    find_sites,
    locate,
    misdirect,
    unlearn,
)
from mipfast.edit.prune import active_prunes
from mipfast.errors import DivergedError


def test_unlearn_edits_the_located_neurons_of_both_towers_and_no_others():
    model = tiny_qwen_vl()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    forget = [text_batch(model, [9, 8], [1, 2]), image_batch(model, 2)]
    retain = [text_batch(model, [9, 8], [1, 2], seed=5), image_batch(model, 2, seed=5)]
    report = unlearn(model, forget, retain, MIPConfig(fraction=0.2, rmisu=RMisUConfig(steps=2)))
    path = report["path"]
    sites = find_sites(model)
    assert {stack for stack, _ in path} == {sites.text.name, sites.vision[0].name}
    assert all(layer <= report["misdirect"]["config"]["layer"] for stack, layer in path if stack == sites.text.name)
    for stack in sites.stacks:
        for layer in range(stack.num_layers):
            name = f"{stack.name}.{layer}.mlp.down_proj.weight"
            changed = (dict(model.named_parameters())[name] != before[name]).any(0).nonzero().flatten()
            assert changed.tolist() == sorted(path.get((stack.name, layer), torch.tensor([])).tolist())
    assert not active_prunes(model) and report["locate"]["text"]["config"]["objective"] == "log_odds"


def test_unlearn_without_vision():
    model = tiny_llama()
    forget, retain = [text_batch(model, [9, 8], [1, 2])], [text_batch(model, [9, 8], [1, 2], seed=5)]
    config = MIPConfig(LocateConfig(), vision=None, aggregate="mean", rmisu=RMisUConfig(steps=1))
    assert unlearn(model, forget, retain, config)["path"].num_neurons == 5 * 3
    report = unlearn(model, forget, retain, config, fraction=0.25)
    assert report["path"].num_neurons == 12 * 3 and report["config"] == asdict(replace(config, fraction=0.25))


def test_evaluate_counts_a_question_as_right_when_every_token_is():
    model = tiny_llama()
    batch = text_batch(model, [9, 8, 7], [2, 3, 1])
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    best = model(**inputs).logits.argmax(-1)
    labels = batch["labels"].clone()
    scored = labels[:, 1:] != -100
    labels[:, 1:][scored] = best[:, :-1][scored]  # what the model says
    assert evaluate(model, [{**inputs, "labels": labels}]).accuracy == 100
    row, position = scored.nonzero()[0].tolist()
    labels[row, position + 1] = (labels[row, position + 1] + 1) % 61
    found = evaluate(model, [{**inputs, "labels": labels}])
    assert found.hits == [i != row for i in range(3)] and [len(p) for p in found.predicted] == [2, 3, 1]


def without(batch, name):
    return {k: v for k, v in batch.items() if k != name}


@pytest.mark.parametrize(
    ("change", "overrides", "says"),
    [
        (lambda b: without(b, "labels"), {}, "no labels"),
        (lambda b: b | {"labels": torch.full_like(b["labels"], -100)}, {}, "samples \\[0, 1\\] are all -100"),
        (lambda b: b | {"labels": b["labels"][0]}, {}, "expected \\[n,S\\]"),
        (lambda b: b, {"top_k": 49}, "top_k=49 of 48"),
        (lambda b: b, {"top_k": 0}, "top_k=0"),
        (lambda b: b, {"modality": "vision"}, "only the text stack"),
        (lambda b: b, {"modality": "smell"}, "expected text or vision"),
        (lambda b: b, {"objective": "margin"}, "log_odds"),
        (lambda b: b, {"positions": "middle"}, "last_prompt"),
        (lambda b: b, {"positions": [99]}, "outside this batch"),
        (lambda b: b, {"positions": [1, 1]}, "twice"),
        (lambda b: b, {"method": "simpson"}, "gausslegendre"),
        (lambda b: b, {"memory_budget": 0}, "bytes"),
        (lambda b: b, {"stepz": 3}, "stepz"),
    ],
)
def test_bad_batches_and_settings_are_named(change, overrides, says):
    model = tiny_llama()
    with pytest.raises(MipfastError, match=says):
        locate(model, change(text_batch(model, [9, 8], [1, 2])), **overrides)


def test_a_subject_that_is_missing_is_named_before_anything_runs():
    model = tiny_llama()
    batch = text_batch(model, [9, 8], [1, 2])
    retain, steered = [marked(batch, (0, 2), (3, 4)), batch], dict(rmisu=RMisUConfig(positions="subject"))
    with model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran")):
        with pytest.raises(InputError, match="retain batch 1: positions='subject' asks for the batch's subject"):
            unlearn(model, retain[:1], retain, **steered)
    how = LocateConfig(n_steps=1, positions="subject")
    report = unlearn(model, retain[:1], retain[:1], text=how, **steered)
    assert report["misdirect"]["config"]["positions"] == "subject"


def test_nothing_to_locate_on():
    with pytest.raises(InputError, match="empty"):
        locate(tiny_llama(), [])


def test_images_missing_from_some_or_all_samples():
    model = tiny_qwen_vl()
    with pytest.raises(InputError, match="no images"):
        locate(model, text_batch(model, [9], [1]), modality="vision")
    with pytest.raises(InputError, match="at least one image in every sample"):
        locate(model, image_batch(model, 2, size=[56, []]), modality="vision")


def test_non_finite_activations_name_the_layer_and_the_samples():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(float("nan"))
    with pytest.raises(DivergedError, match="layer 1 .* samples \\[0, 1\\]"):
        locate(model, text_batch(model, [9, 8], [1, 2]))


def test_models_without_usable_ffns():
    with pytest.raises(ModelError, match="mixture of experts"):
        find_sites(tiny_moe())
    with pytest.raises(ModelError, match="get_decoder"):
        find_sites(torch.nn.Linear(2, 2))
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp = torch.nn.Identity()
    with pytest.raises(ModelError, match="found none"):
        find_sites(model)


def test_locate_leaves_no_trace_on_the_model():
    model = tiny_qwen_vl().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.lm_head.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    for modality in ("text", "vision"):
        locate(model, image_batch(model, 2), modality=modality)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [p.requires_grad for p in model.parameters()] == flags and all(m.training for m in model.modules())
    for module in model.modules():
        assert "forward" not in module.__dict__ and not module._forward_pre_hooks and not module._forward_hooks


def test_a_failure_inside_a_replay_leaves_no_trace_either(monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(
        "mipfast.scoring.search.objective_value", lambda *a: (_ for _ in ()).throw(RuntimeError("boom"))
    )
    with pytest.raises(RuntimeError, match="boom"):
        locate(model, text_batch(model, [9], [1]))
    assert all(p.requires_grad for p in model.parameters())
    assert not any("forward" in m.__dict__ or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("budget", [1, 200_000, "auto"])
def test_the_memory_budget_does_not_change_the_result(budget):
    model = tiny_llama()
    batch = text_batch(model, [9, 8], [1, 2])
    whole = locate(model, batch, n_steps=5)
    found = locate(model, batch, n_steps=5, memory_budget=budget)
    torch.testing.assert_close(found.scores, whole.scores, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.path, whole.path)


def test_a_failing_unlearn_leaves_the_model_unpruned(monkeypatch):
    model = tiny_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    forget, retain = [text_batch(model, [9, 8], [1, 2])], [text_batch(model, [9, 8], [1, 2], seed=5)]
    with pytest.raises(InputError, match="gaussian"):
        unlearn(model, forget, retain, MIPConfig(rmisu=RMisUConfig(direction="north")))
    with pytest.raises(DivergedError):
        unlearn(model, forget, retain, MIPConfig(rmisu=RMisUConfig(steering_coeff=float("nan"))))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()) and not active_prunes(model)


def test_evaluate_leaves_each_module_in_its_own_mode():
    model = tiny_llama().train()
    model.model.layers[1].eval()
    evaluate(model, [text_batch(model, [9], [1])])
    assert model.training and not model.model.layers[1].training and model.model.layers[0].training


def test_residuals_are_measured_on_the_first_batch_on_all_or_on_none():
    model = tiny_llama()
    batches = [text_batch(model, [9, 8], [1, 2], seed=seed) for seed in (0, 1)]
    found = {which: locate(model, batches, residuals=which) for which in ("first", "all", "none")}
    measured = {which: [row is not None for row in one.report["residuals"]] for which, one in found.items()}
    assert measured == {"first": [True, True, False, False], "all": [True] * 4, "none": [False] * 4}
    for which in ("first", "none"):
        assert torch.equal(found[which].path, found["all"].path)
        torch.testing.assert_close(found[which].scores, found["all"].scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("modality", ["text", "vision"])
def test_half_precision_models_are_scored_in_float32(dtype, modality):
    model, half = tiny_qwen_vl(), tiny_qwen_vl().to(dtype)
    batch = image_batch(model, 2)
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    settings = dict(modality=modality, n_steps=4 if modality == "text" else 2)  # to tol each might take its own nodes
    want, found = locate(model, batch, **settings), locate(half, cast, **settings)
    off = (found.scores - want.scores).abs().amax(-1) / want.scores.abs().amax(-1)
    assert found.scores.dtype == torch.float32 and off.max() < 16 * torch.finfo(dtype).eps
    assert torch.tensor(found.report["residuals"]).isfinite().all()


def test_pictures_that_do_not_match_their_placeholders_are_counted():
    model = tiny_qwen_vl()
    batch = image_batch(model, 2)
    for broken in (
        batch | {"pixel_values": batch["pixel_values"][:-1]},
        batch | {"image_grid_thw": batch["image_grid_thw"][:1]},
        batch | {"input_ids": batch["input_ids"].clamp_min(6)},
    ):
        with pytest.raises(InputError, match="rows of pixel_values and"):
            locate(model, broken)


def test_a_path_in_the_wrong_place_is_named():
    model = tiny_llama()
    batches = [text_batch(model, [9], [1])]
    with pytest.raises(InputError, match="expected a NeuronPath"):
        misdirect(model, batches, batches, {})
