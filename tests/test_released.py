"""`bench/released.py`, the baseline, against the formulas worked one step at a time, in float64."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from slow_joint import slow_joint
from slow_reference import VISION
from tiny import image_batch, text_batch, tiny_llama, tiny_qwen_vl

F64 = torch.float64


def load(name):
    """A file of bench/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


released = load("released")


def assert_same(found, scores, path, tolerance):
    assert found[0].shape == scores.shape and found[1].shape == path.shape
    largest = scores.abs().amax(1, keepdim=True)
    assert ((found[0] - scores).abs() <= tolerance * largest).all()
    assert found[1].tolist() == path.tolist()


@pytest.mark.parametrize("steps, top_k, labels", [(4, 5, 1), (4, 5, 3), (20, 5, 3), (3, 1, 2), (1, 2, 2)])
def test_text_is_the_formula(steps, top_k, labels):
    model = tiny_llama(F64)
    batch = text_batch(model, [11], [labels], seed=1)
    scores, path = slow_joint(model, batch, n_steps=steps, top_k=top_k, only_last=True)
    assert_same(released.released_igi(model, batch, steps, top_k), scores[0], path[0], 1e-9)


@pytest.mark.parametrize("make", [text_batch, image_batch])
def test_text_of_qwen_is_the_formula(make):
    model = tiny_qwen_vl(F64)
    batch = make(model, [11], [3]) if make is text_batch else make(model, 1, answer_lengths=[3])
    scores, path = slow_joint(model, batch, only_last=True)
    assert_same(released.released_igi(model, batch), scores[0], path[0], 1e-9)


def test_text_scores_only_labels():
    """Two label spans; index 0 is predicted by nothing."""
    model = tiny_llama(F64)
    batch = text_batch(model, [12], [2], seed=2)
    batch["labels"][:, [0, 4, 5]] = batch["input_ids"][:, [0, 4, 5]]
    scores, path = slow_joint(model, batch, only_last=True)
    assert_same(released.released_igi(model, batch), scores[0], path[0], 1e-9)


def vision_activations(model, batch):
    """Inputs of the vision down-projections at the first row that the tower holds: L of [F]."""
    seen = []
    for name, module in model.named_modules():
        if re.fullmatch(VISION, name):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    model(**batch)
    return seen


@pytest.mark.parametrize("steps, size", [(4, 56), (4, 84), (20, 56), (2, (84, 56))])
def test_vision_is_the_closed_form(steps, size):
    """Its z-score leaves nothing of the gradients: (m-1)(l+1)(a_l(j) + sum of a_l'(b)) / m."""
    model = tiny_qwen_vl(F64)
    batch = image_batch(model, 1, seed=3, size=[size])
    scores, path = released.released_ifi(model, batch, steps)
    acts = vision_activations(model, batch)
    assert len(scores) == len(acts) == 3
    entered = 0.0
    for layer, act in enumerate(acts):
        want = (steps - 1) * (layer + 1) * (act + entered) / steps
        assert ((scores[layer] - want).abs() <= 1e-6 * want.abs().max()).all()
        assert path[layer].tolist() == act.topk(5).indices.tolist()  # the largest activations of the first patch
        entered += act[path[layer][-1]]


@pytest.mark.parametrize("modality", ["text", "vision"])
def test_frozen_gives_the_same_and_leaves_no_gradient(modality):
    model = tiny_qwen_vl()
    batch = image_batch(model, 1, answer_lengths=[2])
    search = released.released_igi if modality == "text" else released.released_ifi
    scores, path = search(model, batch)
    assert_same(search(model, batch, frozen=True), scores, path, 1e-5)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
