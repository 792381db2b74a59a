"""The learned direction lowers what it says it lowers, of the model as it was, and both doors steer towards it."""

import random
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, build, pictures, text
from test_misdirection import llama, path_of
from test_trainer import case, trainer, weights
from tiny import image_batch, text_batch, tiny_llama, tiny_qwen_vl

from mipfast import InputError, NeuronPath, RMisUConfig, find_sites, misdirect, prune, steering_target
from mipfast.edit import baselines
from mipfast.edit.steering import answer_log_prob, draw_direction, learned_direction
from mipfast.edit.train import order
from mipfast.model.positions import text_rows

LEARNED = RMisUConfig(layer=2, steps=6, lr=1e-2, direction="learned", seed=3)


def test_the_objective_is_the_answer_s_log_prob_with_the_blocks_above_run_by_hand():
    model = tiny_llama(torch.float64)
    batch = text_batch(model, [9], [3])
    target = torch.randn(32, dtype=torch.float64)
    inner, ids = model.model, batch["input_ids"]
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[2].clone()  # behind block 1
        hidden[0, 5] = target  # the last of the prompt's six tokens
        turn = inner.rotary_emb(hidden, torch.arange(9)[None])
        for block in inner.layers[2:]:
            out = block(hidden, attention_mask=None, position_embeddings=turn)
            hidden = out[0] if isinstance(out, tuple) else out
        logp = model.lm_head(inner.norm(hidden)).log_softmax(-1)[0]
    wanted = sum(logp[t - 1, ids[0, t]] for t in (6, 7, 8)) / 3
    torch.testing.assert_close(answer_log_prob(model, batch, 1, "last_prompt", target), wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize("positions", ["last_prompt", "answer", "all"])
def test_its_gradient_is_that_of_finite_differences(positions):
    model = tiny_llama(torch.float64).requires_grad_(False)
    batch = text_batch(model, [9, 6], [2, 1], padding="left")
    target, move = (torch.randn(32, dtype=torch.float64) for _ in range(2))

    def value(x):
        return answer_log_prob(model, batch, 1, positions, x)

    (grad,) = torch.autograd.grad(value(target.requires_grad_()), target)
    with torch.no_grad():
        slope = (value(target + 1e-5 * move) - value(target - 1e-5 * move)) / 2e-5
    assert (grad @ move).item() == pytest.approx(slope.item(), rel=1e-6) and abs(slope) > 1e-4


def test_it_is_below_twenty_random_ones_on_a_trained_model():
    from mipfast.demo.run import load_base

    model, encoder = load_base()
    split = encoder.world.split(100)
    rng = random.Random(0)
    pool = split.select("forget", test=False)
    batches = [encoder.batch(rng.sample(pool, 6), rng) for _ in range(3)]
    with torch.no_grad():
        length = 10.0

        def value(u):
            return sum(answer_log_prob(model, b, 3, "last_prompt", length * u / u.norm()).item() for b in batches) / 3

        drawn = [value(draw_direction("gaussian", 96, seed)) for seed in range(20)]
        learned = value(learned_direction(model, batches, 3, "last_prompt", length))
    assert learned < min(drawn) - 2  # nats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_of_unit_length_repeatable_and_leaves_the_model_alone(dtype):
    model = tiny_llama().to(dtype).train()
    model.lm_head.weight.requires_grad_(False)
    before, flags = weights(model), [p.requires_grad for p in model.parameters()]
    batches = [text_batch(model, [9, 7], [2, 1], seed=i) for i in range(3)]
    found = [learned_direction(model, batches, 2, "last_prompt", 3.0, seed) for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert found[0].dtype == torch.float32 and found[0].norm().item() == pytest.approx(1, abs=1e-6)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [p.requires_grad for p in model.parameters()] == flags and all(p.grad is None for p in model.parameters())
    assert all(m.training and not m._forward_hooks for m in model.modules())
    # one step from the draw, over the first batch alone: later batches count
    once = [learned_direction(model, some, 2, "last_prompt", 3.0, 1, steps=2) for some in (batches, batches[:1])]
    assert not torch.equal(*once)
    made = learned_direction(model, (batch for batch in batches), 2, "last_prompt", 3.0, 1)
    assert torch.equal(made, found[0])


@pytest.mark.parametrize("trainable", ["path", "lora", "all"])
def test_misdirect_steers_where_the_model_without_its_prune_would_say_least(trainable):
    model, forget, retain = llama()
    config = replace(LEARNED, trainable=trainable, unit="none", steering_coeff=2.0)
    steps = [forget[i] for i in order(3, (3, 3), 6)[0]]
    u = learned_direction(model, steps, 2, "last_prompt", 2.0, seed=3)
    wanted = {}
    for name, v in (("drawn", draw_direction("gaussian", 32, 3)), ("learned", u)):
        found = [answer_log_prob(model, batch, 2, "last_prompt", 2 * v / v.norm()).item() for batch in steps]
        wanted[f"answer_log_prob_{name}"] = sum(found) / 6
    with prune(model, path_of(model)):
        report = misdirect(model, path_of(model), forget, retain, config)
    found = {name: report[name] for name in wanted}
    assert found == pytest.approx(wanted, rel=1e-5) and report["target_norm"] == pytest.approx(2)
    assert wanted["answer_log_prob_learned"] < wanted["answer_log_prob_drawn"]
    # the first step's loss is the distance to it
    plain, forget, retain = llama()
    with torch.no_grad(), prune(plain, path_of(plain)):
        batch = {k: v for k, v in steps[0].items() if k != "labels"}
        hidden = plain(**batch, output_hidden_states=True).hidden_states[3].flatten(0, 1)
        state = hidden[text_rows(steps[0], "last_prompt").index]
    assert report["forget_loss"][0] == pytest.approx((state - 2 * u).square().mean().item(), rel=1e-4)
    drawn = misdirect(plain, path_of(plain), forget, retain, replace(config, direction="gaussian"))
    assert not wanted.keys() & drawn.keys()


def test_a_model_with_pictures_trains_towards_it():
    model = tiny_qwen_vl()
    sites = find_sites(model)
    path = NeuronPath({(sites.vision[0].name, 1): torch.arange(4), (sites.text.name, 0): torch.arange(4)})
    forget = [image_batch(model, 3, size=[56, (56, 84), []]), text_batch(model, [9], [2])]
    report = misdirect(model, path, forget, forget[1:], replace(LEARNED, layer=1))
    assert report["answer_log_prob_learned"] < report["answer_log_prob_drawn"]
    assert report["without_gradient"] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_one(name):
    model = build(name)
    batch = pictures(name, model) if FAMILIES[name].picture else text(name)
    u = learned_direction(model, [batch], 1, "last_prompt", 5.0, steps=3)
    start = draw_direction("gaussian", len(u), 0)
    found = [answer_log_prob(model, batch, 1, "last_prompt", 5 * v / v.norm()).item() for v in (u, start)]
    assert found[0] < found[1] and u.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_trainer_learns_the_same_one_and_takes_the_same_steps(dtype, tmp_path):
    model, path, forget, retain = case(dtype)
    prune(model, path)
    report = misdirect(model, path, forget, retain, LEARNED)
    mine, path, _, _ = case(dtype)
    prune(mine, path)
    pairs = [(forget[f], retain[r]) for f, r in zip(*order(3, (3, 3), 6), strict=True)]
    done = trainer(mine, path, pairs, tmp_path, LEARNED, save_strategy="steps", save_steps=3)
    metrics = done.train().metrics
    logs = [log for log in done.state.log_history if "forget_loss" in log]
    limit = {torch.float64: 1e-9, torch.bfloat16: 2e-2}[dtype]
    assert [log["forget_loss"] for log in logs] == pytest.approx(report["forget_loss"], rel=limit)
    for name, found in weights(mine).items():
        torch.testing.assert_close(found, weights(model)[name], rtol=10 * limit, atol=10 * limit, msg=name)
    for name in ("answer_log_prob_drawn", "answer_log_prob_learned"):
        assert metrics[name] == pytest.approx(report[name], rel=limit)
    again, path, _, _ = case(dtype)
    prune(again, path)
    trainer(again, path, pairs, tmp_path, LEARNED).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(p, weights(mine)[name]) for name, p in weights(again).items())


def test_a_learned_one_must_be_given_where_nothing_can_learn_it():
    forget, kept, config = torch.ones(2, 4), torch.ones(3, 4), RMisUConfig(direction="learned", unit="none")
    given = steering_target(config, forget, kept, torch.tensor([0, 3.0, 0, 4]))
    torch.testing.assert_close(given, torch.tensor([0, 0.6, 0, 0.8]))
    with pytest.raises(InputError, match="direction='learned' is not drawn; expected .*give steering_target"):
        steering_target(config, forget, kept)
    model, forget, retain = llama()
    with pytest.raises(InputError, match="direction='learned'; RMU draws one, expected gaussian or uniform"):
        baselines.run(model, baselines.RMU(direction="learned"), forget, retain)
