"""The cost model: by hand, against speed.md's table, against counted FLOPs, and its growth."""

import math
from dataclasses import replace
from unittest import mock

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import LlamaForCausalLM, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import mipfast
from mipfast import LocateConfig
from mipfast.ops import frozen_linear
from mipfast.scoring import search
from mipfast.scoring.cost import Device, Shape, Tower, estimate

# Qwen2.5-VL-3B: 16 heads on 2 key-value heads of 128; gate, up and down; the vision blocks likewise
QWEN_3B = Shape(
    text=Tower(36, 2 * 2048**2 + 2 * 2048 * 256 + 3 * 2048 * 11008, 2048, 11008),
    vision=Tower(32, 4 * 1280**2 + 3 * 1280 * 3420, 1280, 3420),
    vocab=151_936,
    merge=4,
    weights=3_750_000_000,
    element_size=2,
)
VISION = LocateConfig(modality="vision", n_steps=2)


def total(phases, *names):
    return sum(phases[name] for name in names or phases)


def test_by_hand():
    """2 blocks of 100 weights, 10 wide, 7 words; prompt 3, answer 2, so attention costs 2·5·10 = 100 per row."""
    shape = Shape(Tower(2, 100, 10, 20), None, vocab=7, merge=1, weights=340, element_size=2)
    found = estimate(shape, prompt=3, answer=2, config=LocateConfig(n_steps=4), device=Device("d", 1e3, 1e2))
    row, head = 2 * (100 + 100), 2 * 7 * 10
    assert found.tokens == 5
    # the clean run over 5 tokens, the check over the 2 of the suffix; logits at 2 labels
    assert found.flops["capture"] == 2 * 5 * row + 2 * 2 * row + 2 * head
    # 4 copies of 2 rows: each block silent once, the second one forward and backward for the first one's scores
    assert found.flops["search"] == 8 * row * (2 + 2) + 2 * 2 * 8 * head
    # one more copy, forward only, and the derivative of 4 copies of block 1
    assert found.flops["completeness"] == 2 * row * (2 + 1) + 2 * 2 * head + 8 * row
    assert found.bytes["search"] == 2 * (100 * (2 + 2) + 4 * 70)
    # 2 blocks are 400 bytes, 4 s; their 5 rows are 4000 FLOPs, 4 s, the check's 2 rows only 1.6; the head is 140 bytes
    assert found.seconds["capture"] == pytest.approx(4 + 4 + 1.4)


def test_a_subject_is_counted_from_the_sample_s_first_token_on():
    costs = [
        total(estimate(QWEN_3B, prompt=20, answer=4, config=LocateConfig(positions=at)).flops)
        for at in ("last_prompt", [12], [0], "subject")
    ]
    assert costs == sorted(costs) and costs[1] < costs[2] == costs[3]


def test_samples_batches_and_devices():
    sizes = {"prompt": 104, "answer": 24}
    one = estimate(QWEN_3B, **sizes)
    options = {"samples": 64, "batch_size": 32}
    many = estimate(QWEN_3B, **sizes, **options, config=LocateConfig(residuals="all"))
    assert many.tokens == 64 * 128 and total(many.flops) == pytest.approx(64 * total(one.flops))
    assert total(many.bytes) == pytest.approx(2 * total(one.bytes))  # weights are read once per batch
    for residuals, batches in (("first", 1), ("none", 0)):
        some = estimate(QWEN_3B, **sizes, **options, config=LocateConfig(residuals=residuals))
        assert some.flops["search"] == many.flops["search"]
        assert some.flops["completeness"] == pytest.approx(batches / 2 * many.flops["completeness"])
    slow = estimate(QWEN_3B, **sizes, device=Device("slow", 79e12, 0.43e12))
    assert total(slow.seconds) == pytest.approx(10 * total(one.seconds))
    assert one.memory > QWEN_3B.weights * 2 and many.memory > one.memory
    assert 1e9 < Device.measured().flops < 1e14


# research/speed.md section 5, the row Qwen2.5-VL-3B: "exact suffix m=4 TF, s B1 / B32" and "Radau3 TF, s B1 / B32" of
# the text table; "exact left4", "GL2" and "Radau2" of the IFI table. Its prototype had no completeness row.
@pytest.mark.parametrize(
    "method, n_steps, tera, one, of_32",
    [("gausslegendre", 4, 24.4, 0.059, 0.031), ("gaussradau", 3, 12.9, 0.061, 0.016)],
)
def test_text_table(method, n_steps, tera, one, of_32):
    config = LocateConfig(method=method, n_steps=n_steps)
    single = estimate(QWEN_3B, prompt=104, answer=24, config=config)
    batch = estimate(QWEN_3B, prompt=104, answer=24, config=config, samples=32, batch_size=32)
    assert total(single.flops, "capture", "search") == pytest.approx(tera * 1e12, rel=0.15)
    assert total(single.seconds, "capture", "search") == pytest.approx(one, rel=0.15)
    assert total(batch.seconds, "capture", "search") / 32 == pytest.approx(of_32, rel=0.15)


@pytest.mark.parametrize(
    "method, n_steps, seconds", [("riemann_left", 4, 0.79), ("gausslegendre", 2, 0.40), ("gaussradau", 2, 0.22)]
)
def test_vision_table(method, n_steps, seconds):
    config = LocateConfig(modality="vision", method=method, n_steps=n_steps)
    found = estimate(QWEN_3B, prompt=35, answer=24, patches=1024, config=config)
    assert total(found.seconds, "capture", "search") == pytest.approx(seconds, rel=0.15)


@pytest.mark.parametrize("config, tower", [(None, "text"), (VISION, "vision")])
def test_work_grows_with_the_square_of_the_depth_searched(config, tower):
    """At fixed width; the head's share is linear, so the exponent rises towards 2. In vision the language model runs
    once per layer and step: linear in the vision tower's depth."""

    def flops(layers):
        changed = Tower(layers, *list(vars(getattr(QWEN_3B, tower)).values())[1:])
        shape = Shape(**{**vars(QWEN_3B), tower: changed})
        return total(estimate(shape, prompt=104, answer=24, patches=256, config=config).flops)

    exponent = math.log2(flops(80) / flops(40))
    assert 1.8 < exponent <= 2 if tower == "text" else 1 < exponent < 1.6


def test_a_shape_from_a_config_alone_is_the_model_s():
    for model in (tiny.tiny_qwen_vl(), tiny.tiny_llama(), tiny.tiny_llava()):
        made = Shape.of(model)
        model.config.dtype = torch.float32
        assert Shape.of(model.config) == made
    assert made.text == Tower(2, 3 * 32 * 48 + 2 * 32 * 32 + 2 * 32 * 16, 32, 48)


class Counter(TorchDispatchMode):
    """FLOPs of what really runs. (torch's own FlopCounterMode does not work with autograd.grad on leaves.)"""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def counted(model, batch, config):
    with (
        mock.patch.object(frozen_linear, "_faster", lambda: False),
        mock.patch.object(search, "_check_route", tiny.unchecked_route),
        Counter() as counter,
    ):  # torch sees none of ours
        mipfast.locate(model, batch, config)
    return counter.flops


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "gaussradau", "n_steps": 3},
        {"search": "pointwise"},
        {"residuals": "none"},
        {"layers": range(5)},
        {"layers": [3, 7, 8], "search": "pointwise"},
        {"layers": [6, 7], "search": "one-pass"},
    ],
)
def test_counted_flops_of_text(options):
    sizes = {"vocab_size": 61, "num_hidden_layers": 12, "hidden_size": 64, "intermediate_size": 128}
    model = tiny._settle(LlamaForCausalLM(tiny._llama_config(**sizes)), torch.float32)
    config = LocateConfig(**{"n_steps": None if "one-pass" in options.values() else 4, **options})
    expected = estimate(model, prompt=32, answer=8, samples=3, batch_size=3, config=config)
    found = counted(model, tiny.text_batch(model, [40] * 3, [8] * 3), config)
    assert found == pytest.approx(total(expected.flops), rel=0.1)


@pytest.mark.parametrize("layers", [None, range(3)])
def test_counted_flops_of_vision(layers, monkeypatch):
    """Patches of 4 pixels, so that embedding them, which the model leaves out, weighs as little as in a large model."""
    monkeypatch.setattr(tiny, "PATCH", 4)
    ids = {"image_token_id": tiny.IMAGE, "vision_start_token_id": tiny.VISION_START, "video_token_id": 63}
    text = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    vision = {"depth": 8, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": list(range(8))}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
    model = tiny._settle(model, torch.float32)
    batch = tiny.image_batch(model, 2, size=32, answer_lengths=[4, 4])
    prompt = batch["input_ids"].shape[1] - 4 - 16
    sizes = {"prompt": prompt, "answer": 4, "patches": 64, "samples": 2, "batch_size": 2}
    config = replace(VISION, layers=layers)
    expected = estimate(model, **sizes, config=config)
    assert counted(model, batch, config) == pytest.approx(total(expected.flops), rel=0.12)


@pytest.mark.parametrize("modality", ["text", "vision"])
def test_a_wave_computes_what_layer_by_layer_does_and_reads_every_block_twice(modality):
    def of(search, **size):
        config = LocateConfig(modality=modality, search=search, residuals="none", method="riemann_left", n_steps=4)
        return estimate(QWEN_3B, prompt=6, **({"answer": 1, "patches": 16} | size), config=config)

    greedy, wave = of("greedy"), of("pointwise")
    assert wave.flops["search"] == greedy.flops["search"]
    text, tower = QWEN_3B.text, getattr(QWEN_3B, modality)
    weights = (2 * (tower.layers - 1) + tower.layers) * tower.block + 2 * QWEN_3B.head
    if modality == "vision":
        weights += 2 * text.layers * text.block
    assert wave.bytes["search"] == weights * QWEN_3B.element_size
    assert greedy.bytes["search"] > 5 * wave.bytes["search"]
    many = dict(answer=512) if modality == "text" else dict(patches=1024)  # a layer's rows are enough for a wave
    assert of("pointwise", **many).bytes == of("greedy", **many).bytes


@pytest.mark.parametrize("modality", ["text", "vision"])
def test_only_the_layers_that_are_scored_are_counted(modality):
    sizes = dict(prompt=35, answer=9, patches=256 if modality == "vision" else 0)

    def of(layers, **settings):
        settings = dict(modality=modality, search="pointwise", n_steps=4, method="riemann_left") | settings
        return estimate(QWEN_3B, **sizes, config=LocateConfig(layers=layers, **settings))

    for settings in (dict(residuals="none"), dict(residuals="none", search="greedy")):
        every, depth = of(None, **settings), getattr(QWEN_3B, modality).layers
        assert of(range(depth), **settings) == every
        assert of(range(depth - 1), **settings).flops["search"] < every.flops["search"]
    one = [of([layer], residuals="none") for layer in range(depth)]
    assert math.fsum(found.flops["search"] for found in one) == pytest.approx(of(None).flops["search"])
    assert [found.memory for found in one] == sorted((found.memory for found in one), reverse=True)


def test_impossible_questions_are_refused():
    with pytest.raises(mipfast.InputError, match="answer=0; expected at least 1"):
        mipfast.estimate(QWEN_3B, prompt=1, answer=0)
    with pytest.raises(mipfast.InputError, match="'A100'; expected one of H100, H200"):
        mipfast.estimate(QWEN_3B, prompt=1, answer=1, device="A100")
    with pytest.raises(mipfast.InputError, match=r"the stack has no 36; expected indices in 0..35"):
        mipfast.estimate(QWEN_3B, prompt=1, answer=1, config=LocateConfig(search="pointwise", layers=[36]))
    with pytest.raises(mipfast.InputError, match="patches > 0"):
        mipfast.estimate(QWEN_3B, prompt=1, answer=1, config=VISION)
