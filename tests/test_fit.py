"""The size of a path: measured as a slow computation does, chosen as worked out by hand, and nothing left behind."""

import copy
import importlib.util
import io
import json
import logging
import math
from contextlib import redirect_stdout
from dataclasses import replace

import pytest
import torch
import twins
import yaml
from test_pruning import bits, same
from tiny import image_batch, text_batch, tiny_llama, tiny_qwen_vl

from mipfast import (
    Attribution,
    InputError,
    MIPConfig,
    NeuronPath,
    RMisUConfig,
    cli,
    find_sites,
    fit_path,
    unlearn,
)
from mipfast.edit import fit_path as fitting
from mipfast.edit import unlearn as unlearning
from mipfast.edit.prune import active_prunes
from mipfast.experiment import comparison_page, page, pipeline
from mipfast.experiment.comparison import compare
from mipfast.experiment.config import UnlearnStage, overlaid
from mipfast.experiment.figures import size_figure

needs_matplotlib = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")
MODEL = tiny_llama()
FORGET, RETAIN = ([text_batch(MODEL, [9, 8], [2, 1], seed=s), text_batch(MODEL, [7], [3], seed=s)] for s in (1, 2))
TEXT = "model.layers"


def attribution(model, stack, seed=0):
    """Of one sample: every neuron has another score, in an order drawn by the seed."""
    order = torch.randperm(stack.num_layers * stack.num_neurons, generator=torch.Generator().manual_seed(seed))
    scores = (1.0 + order.argsort().flip(0)).view(1, stack.num_layers, stack.num_neurons)
    report = {"stack": stack.name, "num_labels": [1], "layers_without_gradient": []}
    report |= {"config": {"score": "igi", "objective": "logprob"}, "fingerprint": find_sites(model).fingerprint()}
    return Attribution(scores, scores.argsort(-1, descending=True)[..., :1], report)


LOCATED = attribution(MODEL, find_sites(MODEL).text)


def best(located, count):
    """{layer: neurons} of the largest scores, one after the other."""
    _, num_layers, num_neurons = located.scores.shape
    every = [(layer, j) for layer in range(num_layers) for j in range(num_neurons)]
    chosen = sorted(every, key=lambda at: -located.scores[0][at].item())[:count]
    return {layer: {j for i, j in chosen if i == layer} for layer in {i for i, _ in chosen}}


def layers(path, stack=TEXT):
    return {layer: set(indices.tolist()) for (name, layer), indices in path.items() if name == stack}


def slow_nll(model, batches):
    """Of plain log-probabilities in float64, sample by sample and token by token."""
    samples = []
    for batch in batches:
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits.double()
        for row, labels in zip(logits, batch["labels"], strict=True):
            at = [t for t in range(1, len(labels)) if labels[t] != -100]
            samples.append(sum(-row[t - 1].log_softmax(-1)[labels[t]].item() for t in at) / len(at))
    return sum(samples) / len(samples)


def scripted(monkeypatch, forget, damage, before=1.0, retain=RETAIN):
    """NLLs by the number of neurons that are pruned, in the place of the model's; returns the sizes that were tried."""
    tried = []

    def nll(model, batches):
        count = sum(len(index) for handle in active_prunes(model) for index in handle.neurons.values())
        if batches[0] is retain[0]:
            return 2.0 + (damage(count) if count else 0.0)
        if count:
            tried.append(count)
        return before + (forget(count) if count else 0.0)

    monkeypatch.setattr(fitting, "_mean_nll", nll)
    return tried


def fit(**options):
    return fit_path(MODEL, FORGET, RETAIN, LOCATED, [], aggregate="mean", **options)


def test_the_curve_is_what_a_slow_computation_says_and_the_path_the_best_neurons():
    before = bits(MODEL)
    path = fit(max_damage=100.0)
    curve = path.origin["curve"]
    assert [point["neurons"] for point in curve][:4] == [0, 1, 2, 4]
    for point in curve:
        edited = copy.deepcopy(MODEL)
        for layer, neurons in best(LOCATED, point["neurons"]).items():
            edited.model.layers[layer].mlp.down_proj.weight.data[:, list(neurons)] = 0
        with torch.no_grad():
            forget, retain, unpruned = (
                slow_nll(one, some) for one, some in ((edited, FORGET), (edited, RETAIN), (MODEL, RETAIN))
            )
        assert point["forget"] == pytest.approx(forget, abs=1e-5)
        assert point["damage"] == pytest.approx(retain - unpruned, abs=1e-5)
    assert layers(path) == best(LOCATED, path.origin["neurons"]) and path.num_neurons == path.origin["neurons"]
    assert path.fingerprint == LOCATED.report["fingerprint"]
    assert (path.origin["aggregate"], path.origin["scope"], path.origin["max_damage"]) == ("mean", "stack", 100.0)
    assert same(bits(MODEL), before) and not active_prunes(MODEL)


def test_its_size_is_the_smallest_at_the_floor(monkeypatch):
    tried = scripted(monkeypatch, lambda n: {1: 0.0, 2: 0.05, 4: 2.0, 8: 3.0}.get(n, 3.05), lambda n: 1e-4 * n)
    path = fit()
    assert tried == [1, 2, 4, 8, 16, 32] and path.origin["neurons"] == 8 and path.origin["forgets"] is True


def test_a_plateau_on_the_way_is_no_floor(monkeypatch):
    scripted(monkeypatch, lambda n: {1: 0.0, 2: 1.0, 4: 1.02, 8: 1.04}.get(n, 3.0), lambda n: 0.0)
    assert fit().origin["neurons"] == 16


def test_damage_that_comes_and_goes_hides_no_larger_size(monkeypatch):
    harmful = {2: 0.05, 8: 0.3}  # 8 alone is far beyond the limit: one size of a row of two
    tried = scripted(monkeypatch, lambda n: 0.02 * n, lambda n: harmful.get(n, -0.001))
    path = fit()
    assert path.origin["neurons"] == 32 and tried == [1, 2, 4, 8, 16, 32]
    assert [point["damage"] for point in path.origin["curve"]] == pytest.approx(
        [0, -1e-3, 0.05, -1e-3, 0.3, -1e-3, -1e-3]
    )


def test_two_sizes_in_a_row_far_beyond_the_limit_end_the_search(monkeypatch):
    tried = scripted(monkeypatch, lambda n: 1.0 if n < 4 else 5.0, lambda n: 0.0 if n < 4 else 0.21)
    assert fit(max_damage=0.01).origin["neurons"] == 1
    assert tried[:4] == [1, 2, 4, 8] and 16 not in tried
    tried.clear()
    assert fit(max_damage=0.011).origin["neurons"] == 1 and 32 in tried  # 20 times .011 is above .21
    scripted(monkeypatch, lambda n: 1.0, lambda n: math.nan if n > 2 else 0.0)
    assert fit().origin["neurons"] == 1


def test_between_the_chosen_size_and_one_too_many_it_looks_once_more(monkeypatch):
    tried = scripted(monkeypatch, lambda n: 0.1 * n, lambda n: 0.0 if n <= 20 else 1.0)
    path = fit()
    assert tried == [1, 2, 4, 8, 16, 32, 19, 23, 27] and path.num_neurons == 19
    assert [point["neurons"] for point in path.origin["curve"]] == [0, 1, 2, 4, 8, 16, 19, 23, 27, 32]
    # at the floor already: nothing to gain
    tried = scripted(monkeypatch, lambda n: min(0.1 * n, 1.65), lambda n: 0.0 if n <= 20 else 1.0)
    assert fit().num_neurons == 16 and tried == [1, 2, 4, 8, 16, 32]


def test_what_does_not_forget_is_the_largest_harmless_size_and_said_so(monkeypatch, caplog):
    scripted(monkeypatch, lambda n: 0.09 if n < 8 else 4.0, lambda n: 0.0 if n < 5 else 0.1)
    path = fit()
    assert path.origin["forgets"] is False and path.num_neurons == 4
    assert "4 neurons" in caplog.text and "no size within max_damage=0.01 forgets by 0.1 nats" in caplog.text


def test_none_harmless_is_refused_with_what_was_found(monkeypatch):
    before = bits(MODEL)
    scripted(monkeypatch, lambda n: 1.0, lambda n: 0.1 if n == 1 else 0.05)
    with pytest.raises(InputError, match=r"pruning 1 neurons raises .* by 0.1 nats, .*6 sizes by 0.05.*=0.01"):
        fit()
    assert same(bits(MODEL), before) and not active_prunes(MODEL)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_fails_midway_leaves_the_bits(monkeypatch, error):
    model = tiny_llama().train()
    real, before = fitting._mean_nll, bits(model)

    def failing(model, batches):
        if any(sum(map(len, handle.neurons.values())) == 4 for handle in active_prunes(model)):
            raise error
        return real(model, batches)

    monkeypatch.setattr(fitting, "_mean_nll", failing)
    with pytest.raises(error):
        fit_path(model, FORGET, RETAIN, LOCATED, [], aggregate="mean", max_damage=100.0)
    assert same(bits(model), before) and not active_prunes(model) and model.training


def test_several_stacks_give_the_same_share_each(monkeypatch):
    model = tiny_qwen_vl()
    sites = find_sites(model)  # 144 text neurons, 120 in the vision tower
    text, vision = (attribution(model, stack) for stack in (sites.text, sites.vision[0]))
    batches = [image_batch(model, 2)]
    path = fit_path(model, batches, batches, [text, vision], [], aggregate="mean", max_damage=100.0)
    assert [point["neurons"] for point in path.origin["curve"]][:6] == [0, 2, 4, 9, 18, 35]
    size = sum(len(index) for (stack, _), index in path.items() if stack == sites.vision[0].name)
    assert layers(path, sites.vision[0].name) == best(vision, size)
    assert layers(path, sites.text.name) == best(text, round(size / 120 * 144))


def test_snr_ranks_by_what_is_kept(monkeypatch):
    scripted(monkeypatch, lambda n: 1.0, lambda n: 0.0)
    kept = attribution(MODEL, find_sites(MODEL).text, seed=1)
    path = fit_path(MODEL, FORGET, RETAIN, LOCATED, (one for one in [kept]))
    expected = NeuronPath.select(LOCATED, 1 / 192, aggregate="snr", retain=kept, scope="stack")
    assert layers(path) == layers(expected) and path.origin["aggregate"] == "snr"


def test_generators_are_read_once_and_one_batch_is_no_list():
    path = fit_path(MODEL, iter(FORGET), iter(RETAIN), LOCATED, [], aggregate="mean", max_damage=100.0)
    assert path.origin == fit(max_damage=100.0).origin
    for forget, retain in ((FORGET[0], RETAIN), (FORGET, RETAIN[0])):
        with pytest.raises(InputError, match="as one batch is"):
            fit_path(MODEL, forget, retain, LOCATED, [], aggregate="mean")


@pytest.mark.parametrize(
    ("located", "options", "says"),
    [
        (LOCATED, {"max_damage": 0}, "max_damage=0; expected a positive number"),
        (LOCATED, {"max_damage": math.nan}, "max_damage=nan"),
        (LOCATED, {"aggregate": "union"}, "'union' ranks no neurons"),
        (LOCATED, {"aggregate": "snr"}, "needs retain attributions"),
        ([], {}, "no attributions to select from"),
    ],
)
def test_what_cannot_be_fitted_is_named_before_any_forward_pass(located, options, says, monkeypatch):
    monkeypatch.setattr(fitting, "_mean_nll", None)
    with pytest.raises(InputError, match=says):
        fit_path(MODEL, FORGET, RETAIN, located, [], **{"aggregate": "mean", **options})


def test_the_curve_is_logged_and_goes_to_disk(monkeypatch, caplog, tmp_path):
    scripted(monkeypatch, lambda n: 0.5 * n, lambda n: 0.001 * n)
    with caplog.at_level(logging.INFO, "mipfast"):
        path = fit()
    table, outcome = (record.getMessage() for record in caplog.records)
    assert "        8        5.000    +0.0080\n" in table and table.count("\n") == len(path.origin["curve"])
    assert outcome == "10 neurons: NLL of forget answers 1 -> 6, damage +0.01"
    path.save_pretrained(tmp_path)
    assert NeuronPath.from_pretrained(tmp_path).origin == path.origin


# ------------------------------------------------------------------------------------------ in `unlearn`


def answered(batch, most):
    """The batch with answers that the model finds most likely, or least: pruning makes the one less likely, and the
    other hardly less."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = MODEL(**inputs).logits
    words = (logits.argmax(-1) if most else logits.argmin(-1)).roll(1, 1)
    return {**inputs, "labels": torch.where(batch["labels"] != -100, words, -100)}


KNOWN = [answered(batch, True) for batch in FORGET]
UNKNOWN = [answered(text_batch(MODEL, [9, 8], [2, 1], seed=seed), False) for seed in (5, 6, 7)]
AUTO = MIPConfig(fraction="auto", vision=None, rmisu=RMisUConfig(steps=2, layer=1))


def test_unlearn_finds_the_size_and_trains_what_lies_below_the_steering_layer(monkeypatch):
    model, seen = tiny_llama(), {"located": [], "judged": []}
    before, real = bits(model), unlearning.locate

    def counted(model, batch, *args, **kwargs):
        seen["located"] += [one for one in UNKNOWN if one is batch]
        return real(model, batch, *args, **kwargs)

    def judged(model, batches):
        seen["judged"].append(batches)
        return measure(model, batches)

    measure = fitting._mean_nll
    monkeypatch.setattr(unlearning, "locate", counted)
    monkeypatch.setattr(fitting, "_mean_nll", judged)
    report = unlearn(model, KNOWN, UNKNOWN, AUTO)
    path = report["path"]
    assert path.origin["forgets"] and report["config"]["fraction"] == "auto"
    assert [id(one) for one in seen["located"]] == [id(UNKNOWN[0]), id(UNKNOWN[2])]
    assert [id(one) for one in seen["judged"][1]] == [id(UNKNOWN[1])]
    chosen = next(point for point in path.origin["curve"] if point["neurons"] == path.num_neurons)
    assert chosen["damage"] <= 0.01 and chosen["forget"] >= path.origin["curve"][0]["forget"] + 0.1
    above = {layer for _, layer in path if layer > 1}
    assert above and report["misdirect"]["above_the_steering_layer"] == [f"{TEXT}/{layer}" for layer in sorted(above)]
    weights = bits(model)
    for layer in range(4):
        name, index = f"{TEXT}.{layer}.mlp.down_proj.weight", path.get((TEXT, layer), torch.tensor([], dtype=int))
        changed = (weights[name] != before[name]).any(0).nonzero().flatten().tolist()
        assert changed == sorted(index.tolist())
        assert layer <= 1 or not weights[name][:, index].any()  # pruned, and pruned they stay
        up = f"{TEXT}.{layer}.mlp.up_proj.weight"
        assert torch.equal(weights[up], before[up]) == (layer > 1 or not len(index))
    assert not active_prunes(model)


def test_a_path_above_the_steering_layer_is_pruned_alone(caplog):
    model = tiny_llama()
    before = bits(model)
    path = NeuronPath({(TEXT, 3): torch.tensor([4, 2])}, find_sites(model).fingerprint())
    report = unlearning.edit(model, path, KNOWN, UNKNOWN, AUTO)
    assert report["steps"] == 0 and "all 2 neurons of the path lie above the steering layer 1" in report["note"]
    assert report["note"] in caplog.text and report["above_the_steering_layer"] == [f"{TEXT}/3"]
    weights, name = bits(model), f"{TEXT}.3.mlp.down_proj.weight"
    assert not weights.pop(name)[:, [4, 2]].any() and same(weights, before) and not active_prunes(model)
    with pytest.raises(InputError, match="nothing to train"):  # an adapter of no neuron would not hold the prune
        unlearning.edit(model, path, KNOWN, UNKNOWN, replace(AUTO, rmisu=RMisUConfig(trainable="lora", layer=1)))
    assert not active_prunes(model)


def test_a_fixed_share_that_lies_above_the_steering_layer_is_named():
    located = attribution(MODEL, find_sites(MODEL).text)
    located.scores[0, 3] += 1000
    config = replace(AUTO, fraction=0.05, scope="stack", aggregate="mean")
    with pytest.raises(InputError, match="all 10 neurons chosen lie above the steering layer 1"):
        unlearning.select_path(find_sites(MODEL), located, None, [], config)


def test_one_retain_batch_and_a_size_that_does_not_forget_are_refused_before_any_edit(monkeypatch):
    model = tiny_llama()
    before = bits(model)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="found none between, expected at least two"):
        patch.setattr(unlearning, "locate", None)
        unlearn(model, KNOWN, UNKNOWN[:1], AUTO)
    scripted(monkeypatch, lambda n: 0.03, lambda n: 0.0, retain=UNKNOWN[1:])
    with pytest.raises(InputError, match="6 sizes up to 32 neurons the best raises .* by 0.03 nats, expected 0.1"):
        unlearn(model, KNOWN, UNKNOWN, AUTO)
    assert same(bits(model), before) and not active_prunes(model)


def test_both_towers_are_fitted_together():
    model = tiny_qwen_vl()
    text, images = (
        [make(seed) for seed in (0, 1)]
        for make in (lambda s: text_batch(model, [9], [2], seed=s), lambda s: image_batch(model, 1, seed=s))
    )
    located = {"text": text[:1], "vision": images[:1]}
    found = [unlearning.locate(model, located[name], getattr(MIPConfig(), name)) for name in located]
    config = MIPConfig(fraction="auto", aggregate="mean")
    with pytest.MonkeyPatch.context() as patch:
        scripted(patch, lambda n: 1.0, lambda n: 0.0, retain=images)
        path = unlearning.fitted(model, text + images, images, *found, [], config)
    assert {stack: len(index) for (stack, _), index in path.items()} == {
        stack.name: 1 for stack in find_sites(model).stacks
    }
    assert path.origin["neurons"] == 2 and len(path.origin["union of"]) == 2


# ------------------------------------------------------------------------------- settings, commands, pages


def test_settings_from_yaml_and_the_command_line(monkeypatch, tmp_path):
    assert (MIPConfig().fraction, MIPConfig().scope) == (0.1, "layer")
    for preset in (MIPConfig.paper(), MIPConfig.released()):
        assert (preset.fraction, preset.scope) == (0.1, "layer")
    given = yaml.safe_load("fraction: auto\nscope: stack\n")
    assert overlaid(UnlearnStage(), given) == UnlearnStage(fraction="auto", scope="stack")
    for wrong, says in (
        ({"fraction": "automatic"}, "fraction='automatic'; expected a number or 'auto'"),
        ({"scope": "tower"}, "scope='tower'; expected layer or stack"),
        ({"fraction": "auto", "aggregate": "union"}, "'union' ranks no neurons"),
        ({"fraction": 0}, "fraction=0; expected a share"),
    ):
        with pytest.raises(InputError, match=says):
            overlaid(UnlearnStage(), wrong)
    stages = []
    monkeypatch.setattr(pipeline, "unlearn_folder", lambda model, stage, *rest: stages.append(stage))
    line = ["unlearn", "--model", "m", "--data", "d", "--forget", "a", "--retain", "b", "--out", str(tmp_path)]
    for more in (["--fraction", "auto"], ["--fraction", "0.01", "--scope", "stack"], []):
        with redirect_stdout(io.StringIO()):
            cli.app([*line, *more])
    assert [(stage.fraction, stage.scope) for stage in stages] == [("auto", "layer"), (0.01, "stack"), (0.1, "layer")]


def test_the_command_scores_every_other_record_and_judges_by_the_rest(monkeypatch, tmp_path):
    """NLLs are scripted, the rest is run: the folder's path, report and page have the curve."""
    clear, demo = twins.write_clear(tmp_path / "clear", count=4), twins.write_model(tmp_path / "demo")
    judged, scored, real = [], {}, pipeline.locate_file.locate_file

    class Recorded(pipeline.Batches):
        def __init__(self, encoder, records, *rest, **more):
            super().__init__(encoder, records, *rest, **more)
            self.records = list(records)

    def located(model, encoder, records, out, *rest, **options):
        scored[out.name] = records
        real(model, encoder, records, out, *rest, **options)

    def nll(model, batches):
        if all(record.group == "retain95+tofu" for record in batches.records):
            judged.append(batches.records)
            return 0.0
        return 0.3 * sum(len(index) for handle in active_prunes(model) for index in handle.neurons.values())

    monkeypatch.setattr(pipeline, "Batches", Recorded)
    monkeypatch.setattr(pipeline.locate_file, "locate_file", located)
    monkeypatch.setattr(fitting, "_mean_nll", nll)
    line = ["unlearn", "--model", demo, "--data", clear, "--limit", 4, "--device", "cpu", "--forget", "forget05+tofu"]
    line += ["--retain", "retain95+tofu", "--steps", 2, "--layer", 3, "--fraction", "auto", "--out", tmp_path / "u"]
    with redirect_stdout(io.StringIO()):
        cli.app([str(word) for word in line])
    report = json.loads((tmp_path / "u" / "unlearn" / "report.json").read_text())
    path = NeuronPath.from_pretrained(tmp_path / "u" / "unlearn" / "path")
    assert report["path"] == path.origin and path.origin["forgets"]
    assert sum(stack["neurons"] for stack in report["neurons"].values()) == path.num_neurons
    for kind in ("text", "image"):
        sides = scored[f"retain-{kind}"], [record for record in judged[0] if record.modality == kind]
        ids = [{record.id for record in side} for side in sides]
        assert len(ids[0]) == len(ids[1]) > 0 and not ids[0] & ids[1]
        assert len(ids[0] | ids[1]) == len(scored[f"forget-{kind}"])  # of which nothing is held back
    roles = {
        "forget": scored["forget-text"],
        "retain": scored["retain-text"][:1],
        "general": scored["retain-image"][:1],
    }
    with pytest.raises(InputError, match="at least two records"):
        pipeline._sets(roles, UnlearnStage(fraction="auto"), None)


ORIGIN = {
    "neurons": 4,
    "max_damage": 0.01,
    "forgets": True,
    "curve": [
        {"neurons": n, "forget": f, "damage": d}
        for n, f, d in ((0, 1.0, 0.0), (1, 1.0, -0.001), (2, 2.0, 0.004), (4, 4.0, 0.008), (8, 5.0, math.nan))
    ],
}


@needs_matplotlib
def test_the_picture_has_every_size_and_marks_the_chosen_one():
    figure = size_figure(ORIGIN, "a run")
    known, damage = figure.axes
    for axes, name in ((known, "forget"), (damage, "damage")):
        drawn = next(line for line in axes.lines if len(line.get_xdata()) == 4 and line.get_marker() == "o")
        assert list(drawn.get_xdata()) == [1, 2, 4, 8]
        assert list(drawn.get_ydata()) == pytest.approx([p[name] for p in ORIGIN["curve"][1:]], nan_ok=True)
        assert [line.get_label() for line in axes.lines if list(line.get_xdata()) == [4, 4]] == ["chosen"]
    assert next(line for line in damage.lines if line.get_label() == "allowed").get_ydata()[0] == 0.01
    figure.canvas.draw()


@needs_matplotlib
def test_a_run_s_page_shows_the_curve_where_there_is_one(tmp_path):
    from test_comparison import means, write_run

    write_run(tmp_path / "found", means((0.2, 0.4)), means(), path=ORIGIN)
    write_run(tmp_path / "fixed", means((0.2, 0.4)), means(), path={"aggregate": "snr", "fraction": 0.1})
    plots = [
        part
        for part in comparison_page.parts(compare([tmp_path / "fixed", tmp_path / "found"]))
        if isinstance(part, page.Plot)
    ]
    (plot,) = [one for one in plots if one.name.startswith("size")]
    assert "found" in plot.alt and "chosen 4" in plot.alt
    plot.draw()
