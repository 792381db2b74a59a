"""Every baseline's loss is its formula, written out here token by token, and every one of them forgets."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny import image_batch, text_batch, tiny_llama, tiny_qwen_vl

from mipfast import DivergedError, InputError, NeuronPath, RMisUConfig, find_sites, misdirect, prune
from mipfast.edit import baselines
from mipfast.edit.baselines import GA, MANU, METHODS, NPO, RMU, AdaptiveRMU, BaselineConfig, GradDiff, KLMin
from mipfast.edit.train import order

PAIR = (0, 0)


def moved(model):
    """The model a few steps on, so that theta and theta0 differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)


def case(build):
    model = build(torch.float64)
    if build is tiny_llama:
        forget = text_batch(model, [9, 6, 11], [2, 1, 4], padding="left")
        forget["labels"][2, -3] = -100  # a gap between two labelled spans
        return model, forget, text_batch(model, [8, 12], [3, 1], seed=5)
    return model, image_batch(model, 3), text_batch(model, [8, 10], [1, 2], seed=5)


def tokens(model, batch):
    """[(sample, log-probabilities [V], target)] of every label, one logit row at a time."""
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return [
        (i, logits[i, t - 1].log_softmax(-1), int(row[t]))
        for i, row in enumerate(batch["labels"])
        for t in range(1, len(row))
        if row[t] != -100
    ]


def ce(model, batch):
    found = [-logp[y] for _, logp, y in tokens(model, batch)]
    return sum(found) / len(found)


def nll(model, batch):
    found = tokens(model, batch)
    return [sum(-logp[y] for j, logp, y in found if j == i) for i in range(len(batch["labels"]))]


def graddiff(before, after, forget, retain):
    return -0.3 * ce(after, forget) + 2 * ce(after, retain)


def kl(before, after, forget, retain):
    pairs = list(zip(tokens(before, retain), tokens(after, retain), strict=True))
    return -0.3 * ce(after, forget) + 2 * sum((p.exp() * (p - q)).sum() for (_, p, _), (_, q, _) in pairs) / len(pairs)


def npo(before, after, forget, retain, beta=0.1):
    ratios = [math.exp(b - a) for a, b in zip(nll(after, forget), nll(before, forget), strict=True)]
    return sum(2 / beta * math.log(1 + ratio**beta) for ratio in ratios) / len(ratios)


def states(model, batch, layer):
    """[T,D] at the attended tokens."""
    with torch.no_grad():
        out = model(**{k: v for k, v in batch.items() if k != "labels"}, output_hidden_states=True)
    return out.hidden_states[layer + 1][batch["attention_mask"].bool()]


def rmu(before, after, forget, retain, adaptive=False):
    h, r, h0 = states(after, forget, 1), states(after, retain, 1), states(before, retain, 1)
    u = torch.rand(32, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    c = 5 * states(before, forget, 1).norm(dim=-1).mean() if adaptive else 20
    away = sum((row - c * u / u.norm()).square().mean() for row in h) / len(h)
    return away + 3 * sum((a - b).square().mean() for a, b in zip(r, h0, strict=True)) / len(r)


FORMULAS = {
    "GA": (GA(), lambda before, after, forget, retain: -ce(after, forget)),
    "GradDiff": (GradDiff(gamma=0.3, alpha=2.0), graddiff),
    "KL": (KLMin(gamma=0.3, alpha=2.0, dtype="float64"), kl),
    "NPO": (NPO(), npo),
    "NPO+retain": (NPO(beta=0.4, alpha=2.0), lambda b, a, f, r: npo(b, a, f, r, 0.4) + 2 * ce(a, r)),
    "RMU": (RMU(layer=1, alpha=3.0), rmu),
    "AdaptiveRMU": (AdaptiveRMU(layer=1, alpha=3.0), lambda *four: rmu(*four, adaptive=True)),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen_vl])
def test_losses_are_their_formulas(build, name):
    method, formula = FORMULAS[name]
    model, forget, retain = case(build)
    terms = method.terms(model, {0: forget}, {0: retain}, PAIR, 7)
    moved(model)
    found = list(terms(PAIR))
    wanted = formula(build(torch.float64), model, forget, retain)
    loss = sum(term.loss for term in found)
    torch.testing.assert_close(loss.detach(), torch.as_tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=0)
    assert loss.requires_grad and found[0].forget is not None
    assert [term.retain is not None for term in found] == ([False] if name in ("GA", "NPO") else [False, True])


def test_kl_at_half_precision_is_close_and_zero_before_training():
    model, forget, retain = case(tiny_llama)
    terms = KLMin().terms(model, {0: forget}, {0: retain}, PAIR, 0)
    assert abs(list(terms(PAIR))[1].retain.item()) < 1e-3
    moved(model)
    wanted = (kl(tiny_llama(torch.float64), model, forget, retain) + 0.3 * ce(model, forget)) / 2
    assert list(terms(PAIR))[1].retain.item() == pytest.approx(float(wanted), rel=1e-2)


def test_a_loss_ignores_what_is_masked():
    model, forget, retain = case(tiny_llama)
    hidden_from_view = dict(forget, input_ids=forget["input_ids"].masked_fill(forget["attention_mask"] == 0, 33))
    for name, (method, _) in FORMULAS.items():
        one, other = (
            sum(term.loss for term in method.terms(model, {0: batch}, {0: retain}, PAIR, 7)(PAIR))
            for batch in (forget, hidden_from_view)
        )
        torch.testing.assert_close(one, other, rtol=1e-10, atol=0, msg=name)


SETTINGS = {  # (method, lr): enough for a few steps on the tiny model
    "ga": (METHODS["ga"], 2e-3),
    "graddiff": (METHODS["graddiff"], 2e-3),
    "kl": (METHODS["kl"], 2e-3),
    "npo": (METHODS["npo"], 2e-3),
    "npo+retain": (METHODS["npo+retain"], 2e-3),
    "rmu": (RMU(alpha=1.0), 1e-2),
    "adaptive-rmu": (AdaptiveRMU(alpha=1.0), 1e-2),
    "manu": (MANU(fraction=0.3), None),
}


def knowing():
    """A model that has learned its forget and retain batches."""
    model = tiny_llama()
    forget, retain = ([text_batch(model, [9, 7], [2, 1], seed=10 * g + i) for i in range(2)] for g in (1, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(20):
        optimizer.zero_grad()
        sum(model(**batch).loss for batch in forget + retain).backward()
        optimizer.step()
    return model, forget, retain


def test_every_method_forgets():
    model, forget, retain = knowing()
    learned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = [sum(ce(model, batch) for batch in part) for part in (forget, retain)]
    assert set(SETTINGS) == set(METHODS)
    for name, (method, lr) in SETTINGS.items():
        model.load_state_dict(learned)
        report = baselines.run(model, method, forget, retain, BaselineConfig(steps=12, lr=lr))
        after = [sum(ce(model, batch) for batch in part) for part in (forget, retain)]
        # pruning alone does little: 0.19 becomes 0.36
        assert after[0] > (1.5 * before[0] if name == "manu" else before[0] + 1), name
        if name in ("graddiff", "kl", "npo+retain"):
            assert after[0] - before[0] > 2 * (after[1] - before[1]), name
        assert report["method"] == type(method).__name__ and report["seed"] == 0 and report["seconds"] > 0
        if name == "manu":
            assert sum(map(len, report["path"].values())) == round(0.3 * 4 * 48)
        else:
            assert len(report["forget_loss"]) == report["steps"] == 12 and report["config"]["lr"] == lr


def test_reports_have_the_shape_of_misdirect_s():
    model, forget, retain = knowing()
    path = NeuronPath({(find_sites(model).text.name, 0): torch.arange(4)})
    rmisu = misdirect(model, path, forget, retain, RMisUConfig(steps=1))
    report = baselines.run(model, "graddiff", forget, retain, BaselineConfig(steps=1))
    assert set(rmisu) - {"above_the_steering_layer", "target_norm"} <= set(report)
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    assert report["trained"]["model.layers"] == blocks and set(report["trained"]) >= {"lm_head", "model.embed_tokens"}
    assert report["config"]["lr"] == GradDiff.lr and report["config"]["gamma"] == 1


def test_only_what_requires_a_gradient_trains_and_rmu_trains_three_projections():
    model, forget, retain = knowing()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.requires_grad_(False)
    with pytest.raises(InputError, match="GA has nothing to train"):
        baselines.run(model, "ga", forget, retain)
    model.model.layers[1].mlp.requires_grad_(True)
    baselines.run(model, "graddiff", forget, retain, BaselineConfig(steps=2))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"model.layers.1.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")}
    assert [n for n, p in model.named_parameters() if p.requires_grad] == sorted(changed, key=list(before).index)

    model.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    baselines.run(model, "rmu", forget, retain, BaselineConfig(steps=2))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1, 2)}


def test_an_adapter_trains_alone():
    from peft import LoraConfig, get_peft_model

    model, forget, retain = knowing()
    wrapped = get_peft_model(model, LoraConfig(target_modules=["down_proj"], r=2))
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters()}
    for method in ("npo+retain", "rmu"):
        report = baselines.run(wrapped, method, forget, retain, BaselineConfig(steps=2, lr=1e-2))
        assert sum(report["trained"].values()) == (4 if method == "npo+retain" else 3) * 2 * (48 + 32)
    changed = {name for name, p in wrapped.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)


def test_equal_seeds_take_equal_batches():
    model, forget, retain = knowing()
    seen = []
    spy = replace(GradDiff())
    object.__setattr__(spy, "terms", lambda *args: lambda pair: seen.append(pair) or GradDiff().terms(*args)(pair))
    baselines.run(model, spy, forget, retain, BaselineConfig(steps=5, seed=3))
    assert seen == list(zip(*order(3, (2, 2), 5), strict=True))


def keep(seen, module, args):
    seen.append(args[0])


def test_manu_s_importances_and_budget():
    model = tiny_qwen_vl(torch.float64)
    forget = [image_batch(model, 2), text_batch(model, [9, 6], [1, 1])]
    retain = [image_batch(model, 2, seed=4), text_batch(model, [7, 8], [1, 1], seed=4)]
    path = MANU(fraction=0.1).path(model, forget, retain)
    sites = find_sites(model)
    scores = {}
    for stack in sites.stacks:
        for layer in range(stack.num_layers):
            sides = []
            for batches in (forget, retain):
                seen = []
                for batch in batches:
                    if stack is not sites.text and "pixel_values" not in batch:
                        continue
                    hook = stack.outputs[layer].register_forward_pre_hook(partial(keep, seen))
                    with torch.no_grad():
                        model(**{k: v for k, v in batch.items() if k != "labels"})
                    hook.remove()
                    if stack is sites.text:
                        seen[-1] = seen[-1][batch["attention_mask"].bool()]
                z = torch.cat([part.flatten(0, -2) for part in seen])
                sides.append([z.abs().mean(0), z.std(0, correction=0), z.square().mean(0).sqrt()])
            scores[stack.name, layer] = sum(2 * (f / (r + 1e-5) - 1) for f, r in zip(*sides, strict=True))
    for stack in sites.stacks:
        mine = {key: row for key, row in scores.items() if key[0] == stack.name}
        count = round(0.1 * sum(map(len, mine.values())))
        threshold = torch.cat(list(mine.values())).topk(count).values[-1]
        for key, row in mine.items():
            wanted = (row >= threshold).nonzero().flatten().tolist()
            assert sorted(path.get(key, torch.tensor([])).tolist()) == wanted
    with prune(model, path):
        pass
    blind = MANU(fraction=0.1).path(model, forget[1:], retain)
    assert {stack for stack, _ in blind} == {sites.text.name}


def test_unknown_methods_and_settings_are_named():
    model, forget, retain = knowing()
    for bad, says in (
        (("dpo", forget, retain), "graddiff"),
        (("ga", [], retain), "0 forget"),
        (("ga", forget, retain, BaselineConfig(lr=-1)), "lr=-1"),
        (("ga", forget, retain, BaselineConfig(steps=0)), "steps=0"),
        ((RMU(layer=9), forget, retain), "0..3"),
        ((MANU(fraction=0), forget, retain), "fraction=0"),
    ):
        with pytest.raises(InputError, match=says):
            baselines.run(model, *bad)
    with pytest.raises(DivergedError, match="GradDiff"):
        baselines.run(model, GradDiff(gamma=float("inf")), forget, retain)
