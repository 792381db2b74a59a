"""`mipfast.locate` on every supported transformers family, against `slow_reference.slow_locate` in float64.

Scores, paths and residuals are held to `test_locate.compare`'s 1e-9; the rows of every batch differ in length, and in
size or number of pictures, so a sample that got another's rows would show.
"""

from functools import cache

import pytest
import torch
from families import FAMILIES, Float64, build, pictures, text
from slow_reference import slow_locate
from test_locate import compare
from tiny import split

import mipfast
from mipfast.scoring import plan as plans

model = cache(build)
SEEING = [name for name, family in FAMILIES.items() if family.picture]
READING = [name for name, family in FAMILIES.items() if family.text]
MODALITIES = [(name, "text") for name in FAMILIES] + [(name, "vision") for name in SEEING]
TOWERS = [(name, stack) for name in SEEING for stack in FAMILIES[name].stacks]
COARSE = dict(n_steps=2, top_k=3)


def same(name, batch, **settings):
    with Float64():
        found = mipfast.locate(model(name), batch, **COARSE, **settings)
        truth = slow_locate(model(name), batch, **COARSE, **{k: v for k, v in settings.items() if k != "memory_budget"})
    found.scores = found.scores.float()
    if name == "bloom":  # whose GELU has no forward-mode derivative
        assert found.report["residuals"] == [None, None]
        found.report["residuals"] = truth[2].tolist()
    compare(found, truth)
    return found


@pytest.mark.parametrize("positions", ["last_prompt", "all"])
@pytest.mark.parametrize("name", READING)
def test_text(name, positions):
    found = same(name, text(name), positions=positions)
    assert not found.report["layers_without_gradient"]


def test_memory_budget_of_transposed_weights():
    same("gpt2", text("gpt2"), memory_budget=1)


@pytest.mark.parametrize("positions", ["last_prompt", "prompt"])
@pytest.mark.parametrize("name", SEEING)
def test_text_with_pictures(name, positions):
    same(name, pictures(name, model(name)), positions=positions)


@pytest.mark.parametrize(("name", "stack"), TOWERS)
def test_vision(name, stack):
    found = same(name, pictures(name, model(name)), modality="vision", stack=stack)
    assert found.report["layers_without_gradient"] == list(FAMILIES[name].dead)
    assert (found.scores.amax(-1) > 0).sum(1).tolist() == [found.scores.shape[1] - len(FAMILIES[name].dead)] * 2


@pytest.mark.parametrize(("name", "modality"), MODALITIES)
def test_batched_is_one_by_one(name, modality):
    batch = pictures(name, model(name)) if name in SEEING else text(name)
    with Float64():
        found = mipfast.locate(model(name), batch, modality=modality, **COARSE)
        for i in range(2):
            alone = mipfast.locate(model(name), split(batch, i), modality=modality, **COARSE)
            torch.testing.assert_close(alone.scores[0], found.scores[i], rtol=1e-6, atol=1e-9)
            assert torch.equal(alone.path[0], found.path[i])


def test_blocks_that_attend_to_pictures_need_pictures():
    with pytest.raises(mipfast.InputError, match="2 of 3 blocks"):
        mipfast.locate(model("mllama"), text("mllama"))


# ---------------------------------------------------- editing where weights are [in, out], or LoRA reads beside


def a_path(name):
    sites = mipfast.find_sites(model(name))
    index = torch.tensor([1, 3, 4])
    return mipfast.NeuronPath({(s.name, i): index for s in sites.stacks for i in range(s.num_layers)})


def logits(name, batch):
    with torch.no_grad():
        return model(name)(**{k: v for k, v in batch.items() if k != "labels"}).logits


@pytest.mark.parametrize("name", ["gpt2", "gpt2-lora", "llava-lora", "mllama"])
def test_both_prunes_compute_the_same_and_undo_every_bit(name):
    batch = pictures(name, model(name)) if name in SEEING else text(name)
    clean, before = logits(name, batch), {k: v.clone() for k, v in model(name).state_dict().items()}
    with mipfast.prune(model(name), a_path(name)):
        by_weights = logits(name, batch)
    with mipfast.prune(model(name), a_path(name), "activations"):
        by_hooks = logits(name, batch)
    assert (by_weights - clean).abs().max() > 1e-3
    torch.testing.assert_close(by_weights, by_hooks, rtol=0, atol=1e-12)
    assert all(torch.equal(before[k], v) for k, v in model(name).state_dict().items())


@pytest.mark.parametrize(
    ("name", "ffn", "written", "read"),
    [
        # parameter of an FFN: the dimension along which neurons lie
        ("gpt2", "transformer.h.{}.mlp.", {"c_fc.weight": 1, "c_fc.bias": 0}, {"c_proj.weight": 0}),
        (
            "llava-lora",
            "base_model.model.model.language_model.layers.{}.mlp.",
            {"gate_proj.weight": 0, "up_proj.base_layer.weight": 0, "up_proj.lora_B.default.weight": 0},
            {"down_proj.base_layer.weight": 1, "down_proj.lora_A.default.weight": 1},
        ),
    ],
)
def test_misdirect_trains_the_path_and_nothing_else(name, ffn, written, read):
    edited = build(name)
    stack = mipfast.find_sites(edited).text.name
    before = {k: v.clone() for k, v in edited.state_dict().items()}
    path = mipfast.NeuronPath({(stack, layer): torch.tensor([1, 3, 4]) for layer in (0, 1)})
    batch = text(name)
    mipfast.misdirect(edited, path, [batch], [batch], mipfast.RMisUConfig(layer=1, steps=2))
    moves = {ffn.format(layer) + k: dim for layer in (0, 1) for k, dim in {**written, **read}.items()}
    for k, v in edited.state_dict().items():
        moved = (v != before[k]).nonzero()
        assert len(moved) == 0 or k in moves, k
        if k in moves:
            assert moved[:, moves[k]].unique().tolist() == [1, 3, 4], k


def test_a_path_fits_with_and_without_lora():
    """Stacks are named as in the wrapped model; without its adapter the model is another."""
    wrapped = build("llava-lora")
    path = mipfast.find_sites(wrapped).fingerprint()
    assert path["stacks"].keys() == mipfast.find_sites(build("llava")).fingerprint()["stacks"].keys()
    plain = mipfast.find_sites(wrapped.unload())
    assert plain.check(path, weights=False) and not plain.check(path)


# blocks that put a norm or a scale behind their FFN: in bfloat16 that is less than the state's own rounding
BEHIND = {("gemma2", "text"), ("gemma3", "text"), ("internvl", "vision")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("name", "modality"), [*sorted(BEHIND), ("llama", "text"), ("qwen2-vl", "text"), ("qwen3-vl", "vision")]
)
def test_the_route_is_the_same_in_every_dtype(name, modality, dtype, monkeypatch):
    half = build(name).to(dtype)
    batch = text(name) if modality == "text" else pictures(name, half)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    found = []

    def plan(capture, clean_states):
        found.append(plans.plan(capture, clean_states)[1])
        return capture, None

    monkeypatch.setattr("mipfast.scoring.nodes.plan", plan)
    mipfast.locate(half, batch, modality=modality, **COARSE)
    assert [clean is None for clean in found] == [(name, modality) in BEHIND]
