"""Gated FFNs by one fused op: equal to the model's own, only where they compute what it does, and undone."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from tiny import image_batch, text_batch, tiny_llama, tiny_qwen_vl
from torch import nn

from mipfast import find_sites, locate, ops
from mipfast.model import fused_ffn
from mipfast.model.fused_ffn import fused_ffns


class Gated(nn.Module):
    def __init__(self, act=F.silu, factor=1.0):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(6, 9), nn.Linear(6, 9)
        self.down_proj, self.act_fn, self.factor = nn.Linear(9, 6), act, factor

    def forward(self, x):
        return self.down_proj(self.factor * self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Residual(Gated):
    def forward(self, x, residual):
        return super().forward(x) + residual


@pytest.fixture
def calls(monkeypatch):
    """How often the op ran."""
    seen = []

    def counted(gate, up, _native=ops.swiglu):
        seen.append(gate.shape)
        return _native(gate, up)

    monkeypatch.setattr(ops, "swiglu", counted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_value_and_gradient(dtype, calls):
    model = tiny_llama().to(dtype)
    x = torch.randn(2, 5, 32).to(dtype)
    module = model.model.layers[0].mlp

    def both():
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaf)

    expected = both()
    with fused_ffns([find_sites(model).text]):
        calls.clear()
        found = both()
    assert len(calls) == 1
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 8 * torch.finfo(dtype).eps * b.abs().max()


def test_forward_mode():
    model = tiny_llama()
    module, x, moved = model.model.layers[0].mlp, torch.randn(2, 5, 32), torch.randn(2, 5, 32)

    def tangent():
        with torch.no_grad(), forward_ad.dual_level():
            return forward_ad.unpack_dual(module(forward_ad.make_dual(x, moved))).tangent

    expected = tangent()
    with fused_ffns([find_sites(model).text]):
        torch.testing.assert_close(tangent(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "other",
    [Gated(F.gelu), Gated(factor=0.8), Residual(), nn.Sequential(nn.Linear(6, 6))],
    ids=["gelu", "factor", "residual", "not gated"],
)
def test_what_computes_something_else_is_left_alone(other, dtype):
    assert fused_ffn._is_gated(Gated().to(dtype))
    assert not fused_ffn._is_gated(copy.deepcopy(other).to(dtype))


def test_a_model_is_left_as_it_was():
    model = tiny_llama()
    first, second = (layer.mlp for layer in model.model.layers[:2])
    own = first.forward = lambda x: x
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(KeyError), fused_ffns(find_sites(model).stacks):
        assert first.forward is own and "forward" in vars(second)
        raise KeyError
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("modality", ["text", "vision"])
def test_locate_by_either(modality, monkeypatch, calls):
    model = tiny_qwen_vl()
    batch = text_batch(model, [9, 7], [3, 2]) if modality == "text" else image_batch(model, 2)
    found = locate(model, batch, modality=modality)
    assert len(calls) > 20
    monkeypatch.setattr(fused_ffn, "_is_gated", lambda module: False)
    calls.clear()
    expected = locate(copy.deepcopy(model), batch, modality=modality)  # the model itself remembers its FFNs
    assert not calls
    scale = expected.scores.abs().amax(2, keepdim=True)
    assert ((found.scores - expected.scores).abs() / scale).max() < 1e-5
    assert found.path.equal(expected.path)


def test_an_adapter_stays_in_place(calls):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_llama(), config).eval()
    batch = text_batch(model, [5, 4], [2, 1])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        expected = model(**inputs).logits
        with fused_ffns(find_sites(model).stacks):
            calls.clear()
            torch.testing.assert_close(model(**inputs).logits, expected)
    assert len(calls) == len(find_sites(model).text.blocks)


def _gelu(model):
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU()


def _slope(model):
    """The state of an activation, changed in place."""
    for layer in model.model.layers:
        layer.mlp.act_fn.slope = 0.5


def _projection(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for layer in model.model.layers:
        layer.mlp.up_proj.__class__ = Doubled


def _late_block(model):
    """A block, not the first, does more with its FFN's output than add it."""
    model.model.layers[2].register_forward_hook(lambda module, args, output: 1.5 * output)


class Sloped(nn.Module):
    slope = 1.0

    def forward(self, x):
        return x * torch.sigmoid(self.slope * x)


def _sloped():
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.act_fn = Sloped()
    return model


def assert_changed(used, fresh, batch, before):
    """What `used` scores now is what a model that was never asked before scores, and another thing than before."""
    found, expected = locate(used, batch), locate(fresh, batch)
    assert found.scores.equal(expected.scores) and found.path.equal(expected.path)
    assert found.report["residuals"] == expected.report["residuals"]
    assert (found.scores - before.scores).abs().max() > 0.02 * expected.scores.abs().max()


@pytest.mark.parametrize("change", [_gelu, _slope, _projection, _late_block], ids=lambda change: change.__name__)
def test_a_model_changed_between_two_calls_is_a_new_model(change):
    used, fresh = _sloped(), _sloped()
    batch = text_batch(used, [9, 7], [3, 2])
    before = locate(used, batch)
    change(used)
    change(fresh)
    assert_changed(used, fresh, batch, before)


def test_a_class_patched_between_two_calls(monkeypatch):
    used, fresh = tiny_llama(), tiny_llama()
    batch = text_batch(used, [9, 7], [3, 2])
    before = locate(used, batch)
    kind = type(used.model.layers[0].mlp)
    native = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: native(self, x) / 2)
    assert_changed(used, fresh, batch, before)
