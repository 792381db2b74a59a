"""RMisU trains what it says it trains, towards what it says, and nothing else."""

import pytest
import torch
from families import FAMILIES, Float64, build, pictures, text
from tiny import image_batch, marked, text_batch, tiny_llama, tiny_qwen_vl

from mipfast import NeuronPath, RMisUConfig, find_sites, hidden_states, misdirect, prune, rmisu_loss, steering_target
from mipfast.errors import DivergedError, InputError
from mipfast.model.positions import text_rows


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


def test_overrides_are_fields_of_the_config():
    reports = []
    for config, overrides in (
        (RMisUConfig(layer=2, steps=2, seed=3), {}),
        (RMisUConfig(steps=2), dict(layer=2, seed=3)),
    ):
        model, forget, retain = llama()
        reports.append(misdirect(model, path_of(model), forget, retain, config, **overrides))
    assert reports[0]["config"] == reports[1]["config"] and reports[0]["forget_loss"] == reports[1]["forget_loss"]


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
        (dict(trainable="some"), "expected path, down, lora or all"),
        (dict(trainable="lora", lora_rank=0), "lora_rank=0"),
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


@pytest.mark.parametrize("positions", ["last_prompt", "answer", "prompt", "all", [0, 3]])
@pytest.mark.parametrize("build", ["llama", "left", "pictures"])
def test_hidden_states_of_a_stopped_and_shortened_pass_are_those_of_a_whole_one(build, positions):
    model = tiny_qwen_vl(torch.float64) if build == "pictures" else tiny_llama(torch.float64)
    batch = (
        image_batch(model, 3, size=[56, (56, 84), []])
        if build == "pictures"
        else text_batch(model, [9, 6, 12], [2, 1, 6], padding="left" if build == "left" else "right")
    )
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    rows = text_rows(batch, positions).index
    found = [hidden_states(model, batch, layer, positions) for layer in (0, 1)]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    whole = model(**inputs, output_hidden_states=True).hidden_states
    for layer in (0, 1):
        torch.testing.assert_close(found[layer], whole[layer + 1].flatten(0, 1)[rows], rtol=1e-9, atol=1e-12)


def test_a_subject_is_steered_as_its_indices_are():
    after = []
    for positions in ("subject", [2, 3]):
        model, *sides = llama()
        forget, retain = ([marked(batch, (2, 4), (2, 4)) for batch in side] for side in sides)
        report = misdirect(model, path_of(model), forget, retain, layer=2, steps=2, positions=positions)
        after.append((report["forget_loss"], model.state_dict()))
        assert torch.equal(hidden_states(model, forget[0], 1, "subject"), hidden_states(model, forget[0], 1, [2, 3]))
    assert after[0][0] == after[1][0] and all(torch.equal(p, after[1][1][name]) for name, p in after[0][1].items())


def test_tokens_that_no_chosen_position_sees_are_not_run():
    model = tiny_llama()
    batch = text_batch(model, [9, 12], [2, 6])  # the prompts end at 7 and 6
    seen = []
    handles = [
        module.register_forward_hook(lambda m, args, output: seen.append(tuple(args[0].shape[:2])))
        for module in (model.model.layers[0].mlp, model.model.layers[2].mlp, model.model.layers[3].mlp)
    ]
    hidden_states(model, batch, 2)
    assert seen == [(2, 7), (1, 2)]
    for handle in handles:
        handle.remove()
    # a mask of its own shape: it is not known how to cut it
    wide = batch | {"attention_mask": torch.ones(2, 1, 12, 12).tril().bool()}
    plain = hidden_states(model, batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}, 2)
    torch.testing.assert_close(hidden_states(model, wide, 2), plain, rtol=1e-5, atol=1e-6)


def test_a_prune_by_hook_at_some_positions_acts_where_it_says():
    model, forget, _ = llama()
    path = path_of(model, layers=(2,), k=20)
    with prune(model, path, "activations", positions=[6, 8]):  # the prompt of row 0 ends at 6
        want = hidden_after(model, 2, forget[0])
        torch.testing.assert_close(hidden_states(model, forget[0], 2), want)
    assert not torch.allclose(hidden_states(model, forget[0], 2)[0], want[0])


def test_the_loss_is_the_formula_s():
    forget, retain, kept = (torch.randn(n, 5, dtype=torch.float64) for n in (4, 3, 3))
    target = torch.randn(5, dtype=torch.float64)
    found = rmisu_loss(forget.requires_grad_(), retain, target, kept, alpha=0.3)
    away = sum((h - target).square().sum() for h in forget) / (4 * 5)
    held = sum((h - k).square().sum() for h, k in zip(retain, kept, strict=True)) / (3 * 5)
    torch.testing.assert_close(torch.stack(found), torch.stack([0.7 * away + 0.3 * held, away, held]))
    found.loss.backward()
    torch.testing.assert_close(forget.grad, 0.7 * 2 * (forget - target).detach() / 20)


@pytest.mark.parametrize(("unit", "length"), [("retain", 5.0), ("forget", 13.0), ("none", 1.0)])
def test_the_target_is_as_long_as_its_unit_says(unit, length):
    kept, forget = torch.tensor([[3.0, 4.0], [0.0, 5.0]]), torch.tensor([[5.0, 12.0]])
    target = steering_target(RMisUConfig(unit=unit, steering_coeff=2.0), forget, kept)
    assert target.norm().item() == pytest.approx(2 * length)
    # uniform on [0,1): no negative entry
    assert (steering_target(RMisUConfig(unit=unit, direction="uniform"), forget, kept) >= 0).all()


def test_the_adaptive_length_is_that_of_the_first_forget_batch_before_the_prune():
    model, forget, retain = llama()
    norms = [hidden_after(model, 2, batch).norm(dim=-1).mean().item() for batch in forget]
    with prune(model, path_of(model)):
        report = misdirect(model, path_of(model), forget, retain, RMisUConfig(layer=2, steps=1, unit="forget"))
    assert min(abs(report["target_norm"] - norm) for norm in norms) < 1e-5 * max(norms)


def test_a_loop_of_one_s_own_does_what_misdirect_does():
    model, forget, retain = llama()
    mine, config = tiny_llama(), RMisUConfig(layer=2, steps=3, trainable="all", lr=1e-2)
    report = misdirect(model, NeuronPath(), forget[:1], retain[:1], config)
    with torch.no_grad():
        before, kept = hidden_states(mine, forget[0], 2), hidden_states(mine, retain[0], 2)
    target = steering_target(config, before, kept)
    trained = [p for n, p in mine.named_parameters() if "mlp" in n and "layers.3" not in n]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(3):
        loss = rmisu_loss(hidden_states(mine, forget[0], 2), hidden_states(mine, retain[0], 2), target, kept).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    both = [0.5 * (f + r) for f, r in zip(report["forget_loss"], report["retain_loss"], strict=True)]
    assert losses == pytest.approx(both, rel=1e-5)
    for (name, a), b in zip(model.named_parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_of_every_family(name):
    model = build(name)
    batch = pictures(name, model) if FAMILIES[name].picture else text(name)
    block, whole = find_sites(model).text.blocks[1], []
    with Float64(), torch.no_grad():

        def keep(module, args, output):
            # a copy: transformers 4 adds Qwen3-VL's deepstack to it in place
            whole.append((output[0] if isinstance(output, tuple) else output).clone())

        handle = block.register_forward_hook(keep)
        model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
        handle.remove()
        for positions in ("last_prompt", "all"):
            rows = text_rows(batch, positions).index
            found = hidden_states(model, batch, 1, positions)
            torch.testing.assert_close(found, whole[0].flatten(0, 1)[rows], rtol=1e-9, atol=1e-12)
