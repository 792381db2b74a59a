"""`LocateConfig.released` and `combine="product"` through `locate`."""

import importlib.util
from pathlib import Path

import pytest
import torch
from slow_joint import slow_joint
from tiny import image_batch, split, text_batch, tiny_llama, tiny_qwen_vl

from mipfast import LocateConfig, locate
from mipfast.errors import InputError

spec = importlib.util.spec_from_file_location("released", Path(__file__).parents[1] / "bench" / "released.py")
released = importlib.util.module_from_spec(spec)
spec.loader.exec_module(released)


@pytest.mark.parametrize("make, modality", [(tiny_llama, "text"), (tiny_qwen_vl, "text"), (tiny_qwen_vl, "vision")])
def test_preset_is_the_released_code(make, modality):
    model = make()
    batch = text_batch(model, [9, 12], [1, 3]) if modality == "text" else image_batch(model, 2, 6, [56, 84])
    search = released.released_igi if modality == "text" else released.released_ifi
    want = [search(model, split(batch, i)) for i in range(2)]
    found = locate(model, batch, LocateConfig.released(modality), memory_budget=1)
    for scores, path, (want_scores, want_path) in zip(found.scores, found.path, want, strict=True):
        assert ((scores - want_scores).abs() <= 1e-5 * want_scores.abs().amax(1, keepdim=True)).all()
        assert path.tolist() == want_path.tolist()
    assert found.report["residuals"] == [None, None]
    assert found.report["objective"] == "larger opposes the answer"


@pytest.mark.parametrize(
    "change",
    [
        dict(method="riemann_right"),
        dict(method="gausslegendre"),
        dict(positions="all"),
        dict(positions=torch.tensor([0])),
        dict(objective="logprob"),
        dict(search="pointwise"),
        dict(search="pointwise"),
        dict(score="ifi"),
        dict(modality="vision"),
    ],
    ids=str,
)
def test_nothing_is_mixed_into_the_preset(change):
    model = tiny_llama()
    with pytest.raises(InputError, match="cannot be mixed"):
        locate(model, text_batch(model, [9], [2]), LocateConfig.released("text"), **change)
    with pytest.raises(InputError, match="cannot be mixed"):
        locate(model, text_batch(model, [9], [2]), combine="released")


@pytest.mark.parametrize("positions", ["last_prompt", "first"])
def test_product(positions):
    model = tiny_llama(torch.float64)
    batch = text_batch(model, [9, 12], [2, 3], "right", seed=1)
    found = locate(model, batch, combine="product", positions=positions)
    scores, path = slow_joint(model, batch, positions=positions, method="gausslegendre", objective="logprob")
    torch.testing.assert_close(found.scores.double(), scores, rtol=1e-6, atol=1e-9)
    assert found.path.tolist() == path.tolist()


def test_product_is_not_for_ifi():
    model = tiny_qwen_vl()
    with pytest.raises(InputError, match="ifi"):
        locate(model, image_batch(model, 1), modality="vision", combine="product")
