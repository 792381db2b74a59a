"""`search="pointwise"` as one wave, against its replay layer by layer (`slow_pointwise`), and what a wave runs and
keeps."""

from functools import cache
from unittest import mock

import pytest
import torch
from families import FAMILIES, Float64, build, pictures, text
from slow_pointwise import layer_by_layer
from tiny import image_batch, text_batch, tiny_llama, tiny_qwen_vl, unchecked_route
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from mipfast import find_sites, locate
from mipfast.scoring import memory, search, wave
from mipfast.scoring.capture import capture

model = cache(build)
TOWERS = [(name, stack) for name, family in FAMILIES.items() if family.picture for stack in family.stacks]
GAUGED = dict(search="pointwise", n_steps=3, residuals="all")


def slow(*args, **settings):
    with mock.patch.object(wave.CleanRun, "pointwise", layer_by_layer):
        return locate(*args, **settings)


def assert_same(found, expected, rtol=1e-7):
    scale = expected.scores.abs().amax(2, keepdim=True)
    assert ((found.scores - expected.scores).abs() <= rtol * scale).all()
    assert found.report["without_gradient"] == expected.report["without_gradient"]
    for one, other in zip(found.report["residuals"], expected.report["residuals"], strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("positions", ["last_prompt", "prompt"])
@pytest.mark.parametrize("name", FAMILIES)
def test_text_of_every_family(name, positions):
    batch = text(name) if FAMILIES[name].text else pictures(name, model(name))
    with Float64():
        found = locate(model(name), batch, positions=positions, **GAUGED)
        assert_same(found, slow(model(name), batch, positions=positions, **GAUGED))


@pytest.mark.parametrize("method", ["gausslegendre", "gaussradau"])
@pytest.mark.parametrize(("name", "stack"), TOWERS)
def test_vision_of_every_family(name, stack, method):
    batch, settings = pictures(name, model(name)), dict(modality="vision", stack=stack, method=method, **GAUGED)
    with Float64():
        assert_same(locate(model(name), batch, **settings), slow(model(name), batch, **settings))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(
    ("positions", "objective"),
    [
        ("last_prompt", "prob"),
        ("answer", "logprob"),
        ("answer", "log_odds"),
        ("first", "loss"),
        ("prompt", "logprob"),
        ("all", "prob"),
        ([[2, 4], [0, 3]], "loss"),
    ],
    ids=str,
)
def test_positions_objectives_and_padding(positions, objective, padding):
    llama = tiny_llama(torch.float64)
    batch = text_batch(llama, [9, 12], [2, 3], padding)
    positions = positions if isinstance(positions, str) else torch.tensor(positions) + (3 if padding == "left" else 0)
    for score in ("igi", "ifi"):
        settings = dict(positions=positions, objective=objective, score=score, **GAUGED)
        assert_same(locate(llama, batch, **settings), slow(llama, batch, **settings))


@pytest.mark.parametrize("modality", ["text", "vision"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_further_from_the_truth_than_layer_by_layer(dtype, modality):
    def found(how, dtype):
        qwen = tiny_qwen_vl(torch.float64).to(dtype)
        batch = image_batch(qwen, 3, 2)
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
        return how(qwen, batch, modality=modality, search="pointwise", n_steps=4).scores

    truth = found(locate, torch.float64)
    ours, layered = (((found(how, dtype) - truth).norm() / truth.norm()).item() for how in (locate, slow))
    assert ours <= 2 * layered + torch.finfo(dtype).eps


@pytest.mark.parametrize("modality", ["text", "vision"])
def test_counterfactuals(modality):
    qwen = tiny_qwen_vl(torch.float64)
    batch, other = image_batch(qwen, 2, 3), image_batch(qwen, 2, 4)
    settings = dict(modality=modality, positions="all", counterfactuals=other, **GAUGED)
    assert_same(locate(qwen, batch, **settings), slow(qwen, batch, **settings))


# ------------------------------------------------------------------------------------------- memory


def captured(modality, samples=2):
    qwen = tiny_qwen_vl(torch.float64)
    batch, sites = image_batch(qwen, samples, 3), find_sites(qwen)
    return qwen, batch, capture(qwen, sites, sites.text if modality == "text" else sites.vision[0], batch, "all")


@pytest.mark.parametrize("modality", ["text", "vision"])
def test_waves_keep_to_the_budget_and_leave_nothing_out(modality):
    clean = wave.CleanRun(captured(modality)[2])
    clean.run()
    layers, nodes = clean.capture.stack.num_layers, torch.linspace(0, 0.9, 5)
    whole = sum(5 * memory.kept(clean.capture, layer + 1) for layer in range(layers))
    counts = []
    for share in (0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1):
        waves = clean.waves([nodes] * layers, share * whole)
        counts.append(len(waves))
        for one in waves:
            kept = sum(
                len(own) * memory.kept(clean.capture, at + 1) for at, own in zip(one.layers, one.nodes, strict=True)
            )
            assert kept <= share * whole + 1e-3 or one.copies == 1
        pairs = ((layer, own) for one in waves for layer, own in zip(one.layers, one.nodes, strict=True))
        places = [(layer, float(node)) for layer, own in pairs for node in own]
        assert sorted(places) == [(layer, float(node)) for layer in range(layers) for node in nodes]
    assert counts == sorted(counts, reverse=True) and counts[0] == 5 * layers and counts[-1] == 1


@pytest.mark.parametrize("modality", ["text", "vision"])
def test_any_budget_gives_the_same_scores_and_one_budget_the_same_bits(modality):
    qwen, batch, _ = captured(modality)
    settings = dict(modality=modality, positions="all", **GAUGED)
    expected = locate(qwen, batch, **settings)
    for budget in (1, 200_000, 600_000, 2_000_000, 10**9):
        found, again = (locate(qwen, batch, memory_budget=budget, **settings) for _ in range(2))
        assert_same(found, expected)
        assert torch.equal(found.scores, again.scores)


@pytest.mark.parametrize("modality", ["text", "vision"])
def test_what_autograd_keeps_is_within_the_budget(modality, monkeypatch):
    """Of every wave but those of a single copy, as counted, once the model of bytes has been corrected."""
    qwen, batch, one = captured(modality)
    settings = dict(modality=modality, positions="all", search="pointwise", n_steps=3, residuals="none")
    locate(qwen, batch, **settings)
    weights, seen, score = {p.untyped_storage().data_ptr() for p in qwen.parameters()}, [], wave.Wave.score

    def counted(self, value_of):
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            sums = score(self, value_of)
        seen.append((self.copies, sum(size for place, size in kept.items() if place not in weights)))
        return sums

    monkeypatch.setattr(wave.Wave, "score", counted)
    whole = sum(3 * memory.kept(one, layer + 1) for layer in range(one.stack.num_layers)) + memory.kept(one)
    for share in (0.2, 0.35, 0.5, 0.75, 1):
        seen.clear()
        locate(qwen, batch, memory_budget=int(share * whole), **settings)
        assert all(kept <= 1.1 * share * whole for copies, kept in seen if copies > 1), (share, seen, whole)


def test_native_replay_keeps_a_block_more():
    lora = model("gpt2-lora")
    sites = find_sites(lora)
    clean = wave.CleanRun(capture(lora, sites, sites.text, text("gpt2-lora"), "all"))
    assert not clean.additive
    (one,) = clean.waves([torch.tensor([0.5])] * 3, sum(memory.kept(clean.capture, i) for i in range(3)) + 1)
    assert one.layers == range(3)


# ------------------------------------------------------------------------------------------- what is run


class Calls(TorchDispatchMode):
    """Counts ATen calls that are no views: on a GPU each is a launch."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = [r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns]
        self.count += not any(views) and func is not torch.ops.aten._unsafe_view.default
        return func(*args, **(kwargs or {}))


def test_every_block_is_read_once(monkeypatch):
    """The capture, the clean run, and the wave, whose copies grow by the nodes of a layer a block."""
    llama = tiny_llama(torch.float64)
    batch, seen = text_batch(llama, [9], [2]), []
    locate(llama, batch, **GAUGED)
    native = type(llama.model.layers[0]).forward

    def counted(self, hidden, *args, **kwargs):
        seen.append((self.self_attn.layer_idx, len(hidden), torch.is_grad_enabled()))
        return native(self, hidden, *args, **kwargs)

    monkeypatch.setattr(type(llama.model.layers[0]), "forward", counted)
    monkeypatch.setattr(search, "_check_route", unchecked_route)
    locate(llama, batch, search="pointwise", n_steps=3, residuals="none")
    assert [(layer, copies) for layer, copies, grad in seen if grad] == [(1, 3), (2, 6), (3, 9)]


def test_a_clean_run_that_did_not_arrive_is_made_anew(monkeypatch):
    llama = tiny_llama(torch.float64)
    batch = text_batch(llama, [9, 12], [2, 3])
    expected, asked = locate(llama, batch, **GAUGED), []
    monkeypatch.setattr(wave, "_close", lambda *rows: asked.append(rows))
    assert_same(locate(llama, batch, **GAUGED), expected)
    assert len(asked) == 1


def test_more_rows_than_are_enough_go_into_several_waves(monkeypatch):
    llama, seen, score = tiny_llama(torch.float64), [], wave.Wave.score
    monkeypatch.setattr(wave, "ENOUGH", 2 * 3 * 2 * 11)  # two layers of three nodes, two samples of 11 tokens
    monkeypatch.setattr(wave.Wave, "score", lambda self, **how: (seen.append(self.layers), score(self, **how))[1])
    batch, settings = text_batch(llama, [9, 9], [2, 3]), dict(positions="all", **GAUGED)
    found = locate(llama, batch, **settings)
    assert seen == [range(2, 4), range(2)]
    monkeypatch.undo()
    assert_same(found, locate(llama, batch, **settings))


def test_launches_grow_with_the_depth_and_not_with_its_square():
    """Of a whole call, one sample and one label, 4 nodes; layer by layer these were 81,000 at 36 layers."""
    counts = []
    for layers in (12, 36):
        sizes = dict(vocab_size=61, hidden_size=16, intermediate_size=24, num_attention_heads=2)
        config = LlamaConfig(num_hidden_layers=layers, **sizes)
        llama = LlamaForCausalLM(config)
        batch, settings = text_batch(llama, [7], [1]), dict(search="pointwise", n_steps=4, residuals="none")
        locate(llama, batch, **settings)  # what a first call asks of a model
        with Calls() as calls:
            locate(llama, batch, **settings)
        counts.append(calls.count)
    assert counts[1] <= 6000 and counts[1] < 3.2 * counts[0], counts
