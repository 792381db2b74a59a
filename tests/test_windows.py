"""Windowed attention by one call per length: the same bits, in fewer calls, and undone."""

import pytest
import torch
import transformers
from tiny import image_batch, tiny_llava, tiny_qwen_vl

from mipfast import locate
from mipfast.model.window_attention import NAME, grouped_windows

handed_over = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 cuts at windows itself"
)
SIZES = [56, 84, 140]  # 16, 36 and 100 patches: windows of several lengths


def seen(model):
    """The attention implementations of every module's config."""
    return [getattr(getattr(m, "config", None), "_attn_implementation", None) for m in model.modules()]


def tower(model, batch):
    leaf = batch["pixel_values"].clone().requires_grad_()
    out = model.model.visual(leaf, grid_thw=batch["image_grid_thw"])
    out = out[0] if isinstance(out, tuple) else out.last_hidden_state
    return out.detach(), *torch.autograd.grad(out.square().sum(), leaf)


@pytest.fixture
def calls(monkeypatch):
    """How often torch's attention ran."""
    found = []
    native = torch.nn.functional.scaled_dot_product_attention

    def counted(query, *args, **kwargs):
        found.append(query.shape)
        return native(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return found


@handed_over
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_same_bits_in_fewer_calls(dtype, calls):
    model = tiny_qwen_vl(dtype)
    batch = image_batch(model, 3, size=SIZES)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    expected, before = tower(model, batch), len(calls)
    calls.clear()
    with grouped_windows(model):
        found = tower(model, batch)
    assert len(calls) < before
    assert all(map(torch.equal, found, expected))


def test_the_model_is_left_as_it_was():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = tiny_qwen_vl()
    before, registered = seen(model), list(ALL_ATTENTION_FUNCTIONS)
    with pytest.raises(KeyError), grouped_windows(model):
        inside = {name for name in seen(model) if name}
        # the language model's own stays
        assert "sdpa" in inside and [name.startswith(NAME) for name in inside - {"sdpa"}] == [True]
        raise KeyError
    assert seen(model) == before and list(ALL_ATTENTION_FUNCTIONS) == registered


@pytest.mark.parametrize("make", [tiny_llava, tiny_qwen_vl], ids=["no bounds", "eager"])
def test_what_is_not_cut_at_bounds_or_not_by_sdpa_is_left_alone(make):
    model = make()
    if make is tiny_qwen_vl:
        model.set_attn_implementation("eager")
    before = seen(model)
    with grouped_windows(model):
        assert seen(model) == before


@handed_over
def test_locate_by_either(monkeypatch, calls):
    model = tiny_qwen_vl()
    batch = image_batch(model, 3, size=SIZES)
    found, ours = locate(model, batch, modality="vision"), len(calls)
    monkeypatch.setattr("mipfast.model.window_attention._takes_bounds", lambda kind: False)
    calls.clear()
    expected = locate(model, batch, modality="vision")
    assert ours < len(calls)
    assert ((found.scores - expected.scores).abs() / expected.scores.abs().amax(2, keepdim=True)).max() < 1e-5
    assert found.path.equal(expected.path)
