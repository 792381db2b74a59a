"""Joint scores: NeuronPath's against `slow_joint`, the released code's against bench/released.py."""

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch
from slow_joint import slow_joint
from tiny import image_batch, split, text_batch, tiny_llama, tiny_llava, tiny_qwen_vl

from mipfast.errors import DivergedError, InputError
from mipfast.model.sites import find_sites
from mipfast.scoring.capture import capture
from mipfast.scoring.joint import joint_search, released_vision
from mipfast.scoring.quadrature import quadrature
from mipfast.scoring.search import locate, objective_value

F64 = torch.float64
spec = importlib.util.spec_from_file_location("released", Path(__file__).parents[1] / "bench" / "released.py")
released = importlib.util.module_from_spec(spec)
spec.loader.exec_module(released)


def captured(model, batch, positions="first", modality="text"):
    sites = find_sites(model)
    return capture(model, sites, sites.vision[0] if modality == "vision" else sites.text, batch, positions)


def joint(model, batch, positions="first", modality="text", method="riemann_left", n_steps=4, top_k=5,
          objective="loss", per_replay=None, **settings):  # fmt: skip
    """As `locate` calls it: frozen, at most per_replay steps in one replay."""
    model.requires_grad_(False)
    clean = captured(model, batch, positions, modality)
    rule = [part.split(per_replay or n_steps) for part in quadrature(method, n_steps)]
    value = partial(objective_value, labels=clean.labels, objective=objective)
    return joint_search(clean, *rule, value, top_k, len(clean.activations), **settings)


def assert_same(found, scores, path, tolerance=1e-9):
    """Scores within tolerance of their layer's largest, besides the rounding to float32; equal paths."""
    assert found[0].dtype == torch.float32 and found[1].dtype == torch.int64
    off, largest = (found[0] - scores).abs(), scores.abs().amax(-1, keepdim=True)
    assert (off <= tolerance * largest + 2**-24 * scores.abs()).all(), f"{(off / largest).max():.1e}"
    assert found[1].tolist() == path.tolist()


# ------------------------------------------------------------------------------------------- product


@pytest.mark.parametrize("positions", ["last_prompt", "first", [3]], ids=str)
@pytest.mark.parametrize("objective", ["logprob", "log_odds", "prob"])
def test_product_is_neuronpaths_joint_score(positions, objective):
    model = tiny_llama(F64)
    batch = text_batch(model, [9, 12], [2, 3], "right", seed=1)
    settings = dict(positions=positions, method="gausslegendre", n_steps=3, objective=objective)
    assert_same(joint(model, batch, **settings), *slow_joint(model, batch, **settings))


@pytest.mark.parametrize("top_k, method, n_steps", [(1, "gaussradau", 2), (9, "riemann_trapezoid", 4)])
def test_product_rules_and_path_lengths(top_k, method, n_steps):
    model = tiny_llama(F64)
    batch = text_batch(model, [9, 12], [2, 3], "left", seed=2)
    settings = dict(positions="last_prompt", method=method, n_steps=n_steps, top_k=top_k, objective="logprob")
    assert_same(joint(model, batch, **settings), *slow_joint(model, batch, **settings))


@pytest.mark.parametrize(
    "modality, positions", [("text", "last_prompt"), ("vision", "first"), ("vision", [5])], ids=str
)
def test_product_of_qwen_with_pictures(modality, positions):
    model = tiny_qwen_vl(F64)
    batch = image_batch(model, 2, 4, [56, 84], answer_lengths=[3, 2])
    settings = dict(positions=positions, modality=modality, n_steps=3, objective="logprob")
    assert_same(joint(model, batch, **settings), *slow_joint(model, batch, **settings))


def test_product_does_not_depend_on_the_steps_per_replay():
    model = tiny_llama(F64)
    batch = text_batch(model, [9, 12], [2, 3], "right", seed=1)
    at_once, *_ = joint(model, batch, "last_prompt", n_steps=5)
    in_parts, *_ = joint(model, batch, "last_prompt", n_steps=5, per_replay=2)
    torch.testing.assert_close(in_parts, at_once, rtol=1e-6, atol=0)


def test_product_without_a_path_is_the_integrated_gradient():
    model = tiny_llama(F64)
    batch = text_batch(model, [9, 12], [2, 3], "right", seed=1)
    scores, path = joint(model, batch, "last_prompt", objective="logprob", greedy=False)
    want = locate(model, batch, search="pointwise", method="riemann_left", n_steps=4)
    torch.testing.assert_close(scores, want.scores, rtol=1e-5, atol=1e-7)
    assert path.tolist() == want.path.tolist() and (path >= 0).all()


@pytest.mark.parametrize("positions", ["answer", "all", [1, 3]], ids=str)
def test_product_wants_one_position(positions):
    model = tiny_llama()
    with pytest.raises(InputError, match="positions in 2 samples"):
        joint(model, text_batch(model, [9, 9], [2, 2]), positions)
    model = tiny_qwen_vl()
    with pytest.raises(InputError, match="positions in 1 samples"):
        released_vision(captured(model, image_batch(model, 1), "all", "vision"), 4, 5)


def test_product_reports_a_layer_without_gradient():
    """LLaVA runs its last vision block and leaves it unused."""
    model = tiny_llava(F64)
    scores, path = joint(model, image_batch(model, 2), "first", "vision")
    assert (path[:, :2] >= 0).all() and (path[:, 2] == -1).all() and (scores[:, 2] == 0).all()
    assert (path[:, :2] >= 0).all() and (scores[:, :2] != 0).any(-1).all()


def test_product_names_the_layer_that_diverged():
    model = tiny_llama()
    model.lm_head.weight.data[7] = torch.inf
    with pytest.raises(DivergedError, match="layer 0 are not finite"):
        joint(model, text_batch(model, [9], [2]), "last_prompt")


# ------------------------------------------------------------------------------------------ released


@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-9), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen_vl])
def test_released_text_is_the_released_code(make, steps, dtype, tolerance):
    """Three samples at once against one at a time, with answers of 1, 2 and 4 tokens."""
    model = make(dtype)
    batch = text_batch(model, [9, 12, 10], [1, 2, 4], "right", seed=5)
    want = [released.released_igi(model, split(batch, i), steps) for i in range(3)]
    found = joint(model, batch, n_steps=steps, released=True)
    assert_same(found, *map(torch.stack, zip(*want, strict=True)), tolerance)
    assert (found[1] >= 0).all()


@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-6), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("steps", [4, 20])
def test_released_vision_is_the_released_code(steps, dtype, tolerance):
    model = tiny_qwen_vl(dtype)
    batch = image_batch(model, 3, 6, [56, 84, (84, 56)])
    want = [released.released_ifi(model, split(batch, i), steps) for i in range(3)]
    found = released_vision(captured(model, batch, "first", "vision"), steps, 5)
    assert_same(found, *map(torch.stack, zip(*want, strict=True)), tolerance)
