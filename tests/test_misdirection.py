"""RMisU trains what it says it trains, towards what it says, and nothing else."""

import pytest
import torch
from tiny import image_batch, text_batch, tiny_llama, tiny_qwen_vl

from mipfast import NeuronPath, RMisUConfig, find_sites, misdirect, prune
from mipfast.errors import DivergedError, InputError


def llama():
    model = tiny_llama()
    forget = [text_batch(model, [9, 7], [2, 1], seed=i) for i in range(3)]
    retain = [text_batch(model, [8, 10], [1, 1], seed=10 + i) for i in range(3)]
    return model, forget, retain


def path_of(model, layers=(0, 1, 2), k=4):
    sites = find_sites(model)
    return NeuronPath({(sites.text.name, layer): torch.arange(2, 2 + k) for layer in layers}, sites.fingerprint())


def hidden_after(model, layer, batch):
    """At the first position that predicts a label."""
    with torch.no_grad():
        out = model(**{k: v for k, v in batch.items() if k != "labels"}, output_hidden_states=True).hidden_states
    first = (batch["labels"] != -100).int().argmax(1) - 1
    return out[layer + 1][torch.arange(len(first)), first]


@pytest.mark.parametrize("trainable", ["path", "down"])
def test_only_the_path_s_rows_and_columns_move(trainable):
    model, forget, retain = llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    path = path_of(model)
    report = misdirect(model, path, forget, retain, RMisUConfig(layer=2, steps=4, trainable=trainable))
    moved = {}
    for name, p in model.named_parameters():
        if not torch.equal(p, before[name]):
            changed = (p != before[name]).nonzero()
            dim = 1 if "down_proj" in name else 0
            moved[name] = sorted(changed[:, dim].unique().tolist())
    kinds = ["down_proj"] if trainable == "down" else ["down_proj", "gate_proj", "up_proj"]
    assert moved == {f"model.layers.{i}.mlp.{kind}.weight": [2, 3, 4, 5] for i in (0, 1, 2) for kind in kinds}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert report["trained"] == {f"model.layers/{i}": 4 * 32 * len(kinds) for i in (0, 1, 2)}
    assert report["without_gradient"] == [] and len(report["forget_loss"]) == 4


def test_forget_goes_to_the_target_and_retain_stays():
    model, forget, retain = llama()
    start_f, start_r = (hidden_after(model, 2, b[0]) for b in (forget, retain))
    config = RMisUConfig(layer=2, steps=150, trainable="all", lr=1e-2, seed=3)
    report = misdirect(model, NeuronPath(), forget, retain, config)
    u = torch.randn(32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    target = report["target_norm"] * (u / u.norm())
    end_f, end_r = (hidden_after(model, 2, b[0]) for b in (forget, retain))
    assert (end_f - target).norm(dim=-1).mean() < 0.3 * (start_f - target).norm(dim=-1).mean()
    assert (end_r - start_r).norm(dim=-1).mean() < 0.3 * start_r.norm(dim=-1).mean()
    assert report["forget_loss"][-1] < 0.2 * report["forget_loss"][0]


def test_retain_targets_are_those_of_the_unpruned_model():
    model, forget, retain = llama()
    clean = [hidden_after(model, 2, batch) for batch in retain]
    path = path_of(model)
    with prune(model, path):
        pruned = [hidden_after(model, 2, batch) for batch in retain]
        report = misdirect(model, path, forget, retain, RMisUConfig(layer=2, steps=1, epochs=1))
    # before its first step the pruned model is as far from the targets as pruning moved it
    expected = [((p - c) ** 2).mean().item() for p, c in zip(pruned, clean, strict=True)]
    assert min(abs(report["retain_loss"][0] - e) for e in expected) < 1e-6 * max(expected)
    assert report["retain_loss"][0] > 0
    assert report["target_norm"] == pytest.approx(
        clean[expected.index(min(expected, key=lambda e: abs(e - report["retain_loss"][0])))]
        .norm(dim=-1)
        .mean()
        .item(),
        rel=1e-5,
    )


def test_after_a_weight_prune_columns_train_first_and_rows_follow():
    model, forget, retain = llama()
    stack, path = find_sites(model).text, path_of(model)
    prune(model, path)
    rows = stack.inputs[0][0].weight[2:6].detach().clone()
    misdirect(model, path, forget, retain, RMisUConfig(layer=2, steps=1))
    assert torch.equal(stack.inputs[0][0].weight[2:6], rows), "behind zero columns rows get no gradient at step 0"
    assert stack.outputs[0].weight[:, 2:6].abs().sum() > 0
    misdirect(model, path, forget, retain, RMisUConfig(layer=2, steps=2))
    assert not torch.equal(stack.inputs[0][0].weight[2:6], rows)


def test_neurons_behind_an_activation_hook_are_refused():
    model, forget, retain = llama()
    path = path_of(model)
    with prune(model, path, "activations"), pytest.raises(InputError, match="no gradient passes that hook"):
        misdirect(model, path, forget, retain)


def test_neurons_above_the_steering_layer_are_named_and_left_alone(caplog):
    model, forget, retain = llama()
    top = find_sites(model).text.outputs[3].weight
    before = top.detach().clone()
    report = misdirect(model, path_of(model, layers=(1, 3)), forget, retain, RMisUConfig(layer=2, steps=2))
    assert report["above_the_steering_layer"] == ["model.layers/3"] and "above the steering layer" in caplog.text
    assert torch.equal(top, before)
    with pytest.raises(InputError, match="nothing to train"):
        misdirect(model, path_of(model, layers=(3,)), forget, retain, RMisUConfig(layer=2))


def test_a_vision_path_needs_pictures():
    model = tiny_qwen_vl()
    sites = find_sites(model)
    seeing = NeuronPath({(sites.vision[0].name, 1): torch.arange(4)}, sites.fingerprint())
    words = [text_batch(model, [9], [2])]
    with pytest.raises(InputError, match="pixel_values"):
        misdirect(model, seeing, words, words, RMisUConfig(steps=1))
    pictures = [image_batch(model, 2)]
    report = misdirect(model, seeing, pictures, words, RMisUConfig(steps=2))
    # gate and up have biases there, which belong to the neurons too
    assert report["trained"] == {f"{sites.vision[0].name}/1": 4 * (3 * 32 + 2)}
    both = NeuronPath({**seeing, (sites.text.name, 0): torch.arange(4)}, sites.fingerprint())
    assert misdirect(model, both, words, words, RMisUConfig(steps=1))["without_gradient"] == [
        f"{sites.vision[0].name}/1"
    ]


def test_equal_seeds_give_equal_edits_and_directions_differ():
    def edited(**changes):
        model, forget, retain = llama()
        misdirect(model, path_of(model), forget, retain, RMisUConfig(**{"layer": 2, "steps": 3, **changes}))
        return find_sites(model).text.outputs[0].weight.detach().clone()

    assert torch.equal(edited(seed=1), edited(seed=1))
    assert not torch.equal(edited(seed=1), edited(seed=2))
    assert not torch.equal(edited(direction="uniform"), edited())


def test_bfloat16_weights_train_through_float32_masters():
    model, forget, retain = llama()
    model = model.bfloat16()
    before = find_sites(model).text.outputs[0].weight.detach().clone()
    # each step is far below a bfloat16 ulp of most weights: only the masters can add them up
    report = misdirect(model, path_of(model), forget, retain, RMisUConfig(layer=2, steps=60, lr=2e-4))
    after = find_sites(model).text.outputs[0].weight
    assert after.dtype == torch.bfloat16
    moved = (after != before)[:, 2:6].float().mean()
    losses = report["forget_loss"]  # three batches an epoch
    assert moved > 0.9 and sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (dict(layer=4), "0..3"),
        (dict(direction="north"), "gaussian"),
        (dict(trainable="lora"), "expected path, down or all"),
        (dict(positions="last"), "last_prompt"),
    ],
)
def test_bad_configs_are_named(config, says):
    model, forget, retain = llama()
    with pytest.raises(InputError, match=says):
        misdirect(model, path_of(model), forget, retain, RMisUConfig(**config))


def test_no_batches_and_broken_numbers_are_named():
    model, forget, retain = llama()
    with pytest.raises(InputError, match="0 forget"):
        misdirect(model, path_of(model), [], retain)
    with pytest.raises(DivergedError, match="step 0"):
        misdirect(model, path_of(model), forget, retain, RMisUConfig(steering_coeff=float("inf")))
    assert all(p.requires_grad for p in model.parameters())


def test_pictures_that_come_late_still_count():
    """Text and picture batches apart, as unlearn asks for: the vision path trains in some steps only."""
    model = tiny_qwen_vl()
    sites = find_sites(model)
    seeing = NeuronPath({(sites.vision[0].name, 1): torch.arange(4)}, sites.fingerprint())
    forget = [text_batch(model, [9], [2], seed=i) for i in range(4)] + [image_batch(model, 1)]
    for seed in range(3):
        report = misdirect(model, seeing, forget, forget[:1], RMisUConfig(steps=5, seed=seed))
        assert report["without_gradient"] == []
