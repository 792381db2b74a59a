"""A LoRA edit stays on the path and loads in plain PEFT: alone after fold_prune, else on the pruned base."""

import logging
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from tiny import image_batch, text_batch, tiny_llama, tiny_qwen_vl
from transformers import GPT2Config, GPT2LMHeadModel

from mipfast import (
    DivergedError,
    InputError,
    MIPConfig,
    NeuronPath,
    RMisUConfig,
    find_sites,
    misdirect,
    prune,
    unlearn,
)
from mipfast.edit.lora import fold_prune, merge_adapter
from mipfast.edit.prune import active_prunes

CONFIG = dict(layer=1, steps=4, lr=1e-2, trainable="lora", lora_rank=3, lora_alpha=7)


def gpt2(dtype=torch.float32):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).to(dtype).eval()


def case(build, dtype=torch.float64):
    model = build(dtype)
    make = image_batch if build is tiny_qwen_vl else lambda model, n, seed: text_batch(model, [9, 7], [2, 1], seed=seed)
    forget, retain = ([make(model, 2, seed=10 * g + i) for i in range(2)] for g in (1, 2))
    if build is gpt2:
        forget, retain = (
            [{k: v for k, v in b.items() if k != "position_ids"} for b in part] for part in (forget, retain)
        )
    sites = find_sites(model)
    neurons = {(sites.text.name, layer): torch.tensor([7, 2, 30]) for layer in (0, 1, 2)}  # 2 is above the layer
    if sites.vision:
        neurons[sites.vision[0].name, 0] = torch.tensor([5, 1])
    return model, NeuronPath(neurons, sites.fingerprint()), forget, retain


def logits(model, batches):
    with torch.no_grad():
        return torch.cat([model(**{k: v for k, v in b.items() if k != "labels"}).logits.flatten(0, 1) for b in batches])


def adapter_change(model):
    """{projection: scaling · B A}."""
    return {
        name: module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen_vl, gpt2])
def test_the_adapter_moves_the_path_alone_and_it_learns(build):
    model, path, forget, retain = case(build)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = misdirect(model, path, forget, retain, RMisUConfig(**CONFIG | dict(steps=30)))
    text = find_sites(model).text
    for name, change in adapter_change(model).items():
        output = name.rsplit(".", 1)[1] in ("down_proj", "c_proj")
        stack = text.name if name.startswith(text.name) else find_sites(model).vision[0].name
        layer = int(name.removeprefix(stack + ".").split(".")[0])
        moved = change.any(0 if output else 1).nonzero().flatten().tolist()
        assert moved == sorted(path[stack, layer].tolist()), name
    assert sum(report["forget_loss"][-2:]) < 0.9 * sum(report["forget_loss"][:2])
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name.replace("base_layer.", "")])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen_vl, gpt2])
def test_a_folded_adapter_loads_in_plain_peft_on_the_original_base(build, dtype, tmp_path):
    model, path, forget, retain = case(build, dtype)
    untouched = logits(model, forget)
    prune(model, path)
    misdirect(model, path, forget, retain, RMisUConfig(**CONFIG))
    edited = logits(model, forget)
    assert (edited - untouched).abs().max() > 1e-2
    fold_prune(model)
    assert not active_prunes(model)
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    assert (logits(model, forget) - edited).abs().max() <= limit * edited.abs().max()
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {"adapter_model.safetensors"}
    loaded = PeftModel.from_pretrained(build(dtype), tmp_path).eval()
    assert (logits(loaded, forget) - edited).abs().max() <= limit * edited.abs().max()
    merged = loaded.merge_and_unload()
    assert (logits(merged, forget) - edited).abs().max() <= limit * edited.abs().max()


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen_vl])
def test_an_adapter_saved_with_its_path_loads_on_the_pruned_base(build, tmp_path):
    model, path, forget, retain = case(build)
    with prune(model, path):
        misdirect(model, path, forget, retain, RMisUConfig(**CONFIG))
        edited = logits(model, forget)
        model.save_pretrained(tmp_path)
        path.save_pretrained(tmp_path)
    base = build(torch.float64)
    prune(base, NeuronPath.from_pretrained(tmp_path)).commit()
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert (logits(loaded, forget) - edited).abs().max() <= 1e-12 * edited.abs().max()


def test_equal_seeds_give_equal_adapters_and_the_random_state_stays():
    changes = []
    for seed in (0, 0, 1):
        model, path, forget, retain = case(tiny_llama)
        state = torch.get_rng_state()
        misdirect(model, path, forget, retain, RMisUConfig(**CONFIG, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        changes.append(adapter_change(model)["model.layers.0.mlp.down_proj"])
    assert torch.equal(changes[0], changes[1]) and not torch.equal(changes[0], changes[2])


def test_a_failure_leaves_no_adapter_behind():
    model, path, forget, retain = case(tiny_llama)
    model.lm_head.weight.requires_grad_(False)
    names, wanted = [(name, p.requires_grad) for name, p in model.named_parameters()], logits(model, forget)
    with pytest.raises(DivergedError):
        misdirect(model, path, forget, retain, RMisUConfig(**CONFIG, steering_coeff=float("inf")))
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == names
    assert torch.equal(logits(model, forget), wanted)
    misdirect(model, path, forget, retain, RMisUConfig(**CONFIG))
    with pytest.raises(InputError, match="merge_and_unload"):
        misdirect(model, path, forget, retain, RMisUConfig(**CONFIG))
    assert adapter_change(model)


def test_a_merged_adapter_leaves_a_plain_model_that_computes_the_same():
    model, path, forget, retain = case(tiny_llama)
    names = [(name, p.requires_grad) for name, p in model.named_parameters()]
    prune(model, path)
    misdirect(model, path, forget, retain, RMisUConfig(**CONFIG))
    fold_prune(model)
    wanted = logits(model, forget)
    merge_adapter(model)
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == names
    torch.testing.assert_close(logits(model, forget), wanted, rtol=1e-4, atol=1e-5)


def test_folding_needs_a_prune_and_an_adapter(caplog):
    caplog.set_level(logging.ERROR)
    model, path, forget, retain = case(tiny_llama)
    with pytest.raises(InputError, match="0 prunes in force and no adapter"):
        fold_prune(model)
    with prune(model, path), pytest.raises(InputError, match="1 prunes in force and no adapter"):
        fold_prune(model)


def test_the_paper_s_preset_leaves_the_weights_and_an_adapter(tmp_path):
    model, _, forget, retain = case(tiny_qwen_vl)
    words = [text_batch(model, [9, 8], [1, 2], seed=i) for i in range(2)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = unlearn(model, [*words, *forget], retain, MIPConfig.paper())
    edit = report["misdirect"]["config"]
    assert (edit["lr"], edit["epochs"], edit["trainable"]) == (2e-5, 4, "lora") and report["misdirect"]["steps"] == 16
    assert {stack for stack, _ in report["path"]} == {s.name for s in find_sites(model).stacks}
    for name, parameter in model.named_parameters():
        assert "lora_" in name or torch.equal(parameter, before[name.replace("base_layer.", "")])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_qwen_vl(torch.float64), tmp_path)
    torch.testing.assert_close(logits(loaded, forget), logits(model, forget), rtol=1e-10, atol=1e-12)


def test_the_released_preset_runs():
    model, _, forget, retain = case(tiny_qwen_vl, torch.float32)
    words = [text_batch(model, [9, 8], [1, 2])]
    with pytest.raises(InputError, match="layer=7"):
        unlearn(model, [*words, *forget], retain, MIPConfig.released())
    config = MIPConfig.released()
    report = unlearn(model, [*words, *forget], retain, replace(config, rmisu=replace(config.rmisu, layer=1)))
    assert report["misdirect"]["target_norm"] == pytest.approx(10)
    assert report["locate"]["text"]["config"]["positions"] == "first" and report["misdirect"]["steps"] == 3
