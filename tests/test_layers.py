"""`locate(layers=...)`: the scores of these layers are the whole call's, the others cost nothing, and whatever reads
scores knows of it."""

import json
import logging
from functools import cache

import pytest
import torch
import yaml
from families import FAMILIES, Float64, build, pictures, text
from tiny import image_batch, text_batch, tiny_llama, tiny_llava, tiny_qwen_vl, unchecked_route
from torch import nn

from mipfast import Attribution, InputError, LocateConfig, MIPConfig, NeuronPath, RMisUConfig, find_sites, locate
from mipfast.data import Record
from mipfast.edit import unlearn as unlearning
from mipfast.errors import DivergedError
from mipfast.experiment import locate_file, pipeline
from mipfast.experiment.config import Data, UnlearnStage, overlaid, settings_of
from mipfast.integrations.captum import NeuronPathIG
from mipfast.scoring import search, wave
from mipfast.scoring.attribution import converged, strongest

model = cache(build)
F64 = torch.float64
RULES = [dict(n_steps=4), dict(n_steps=3, method="gaussradau"), dict(tol=1e-4)]


def text_of(model):
    return text_batch(model, [9, 12], [2, 3])


def parts(found, layers):
    """All that is said of these layers."""
    rows = {name: found.report[name] for name in ("residuals", "nodes", "margins") if name in found.report}
    return (
        found.scores[:, layers],
        found.path[:, layers],
        {k: [r and [r[i] for i in layers] for r in v] for k, v in rows.items()},
    )


def assert_only(found, layers):
    """Nothing is said of others, and all of it is JSON."""
    others = [i for i in range(found.scores.shape[1]) if i not in layers]
    assert found.report["layers"] == found.layers == layers
    assert found.scores[:, others].isnan().all() and (found.path[:, others] == -1).all()
    assert found.error[:, others].isnan().all() and found.scores[:, layers].isfinite().all()
    for name in ("residuals", "nodes", "margins"):
        for row in filter(None, found.report.get(name, [])):
            assert [i for i, one in enumerate(row) if one is not None] == layers
    for row in [found.report["layers_without_gradient"], *found.report["without_gradient"]]:
        assert set(row) <= set(layers)
    assert json.loads(json.dumps(found.report, allow_nan=False)) == found.report


# ------------------------------------------------------------------------------------------- the scores


@pytest.mark.parametrize("layers", [[3, 1], [2], [0, 1]])
@pytest.mark.parametrize("score", ["igi", "ifi"])
@pytest.mark.parametrize("rule", [*RULES, dict(search="one-pass")], ids=str)
def test_some_layers_of_text_are_the_whole_call_s(rule, score, layers):
    llama = tiny_llama(F64)
    settings = dict(search="pointwise", score=score, residuals="all", positions="answer") | rule
    whole, found = (locate(llama, text_of(llama), layers=chosen, **settings) for chosen in (None, layers))
    assert whole.report["layers"] == [0, 1, 2, 3]
    assert_only(found, sorted(layers))
    assert_near(found, whole, sorted(layers))


@pytest.mark.parametrize("layers", [[0, 2], [1]])
@pytest.mark.parametrize("rule", [*RULES, dict(search="one-pass")], ids=str)
def test_some_blocks_of_a_vision_tower_are_the_whole_call_s(rule, layers):
    qwen = tiny_qwen_vl(F64)
    settings = dict(modality="vision", search="pointwise", residuals="all") | rule
    whole, found = (locate(qwen, image_batch(qwen, 2, 3), layers=chosen, **settings) for chosen in (None, layers))
    assert_only(found, layers)
    assert_near(found, whole, layers)


@pytest.mark.parametrize("name", FAMILIES)
def test_some_layers_of_every_family(name):
    batch = text(name) if FAMILIES[name].text else pictures(name, model(name))
    settings = dict(search="pointwise", n_steps=3, method="gaussradau", residuals="all", positions="prompt")
    with Float64():
        whole, found = (locate(model(name), batch, layers=chosen, **settings) for chosen in (None, [1]))
    assert_only(found, [1])
    assert_near(found, whole, [1])


def assert_near(found, whole, layers):
    scores, path, rows = parts(found, layers)
    expected, same_path, same_rows = parts(whole, layers)
    assert ((scores - expected).abs() <= 1e-6 * expected.abs().amax(2, keepdim=True)).all()
    assert torch.equal(path, same_path)
    assert rows.get("nodes") == same_rows.get("nodes")
    torch.testing.assert_close(*(torch.tensor(r["residuals"]) for r in (rows, same_rows)), rtol=1e-5, atol=1e-8)


PRODUCT = dict(combine="product", score="igi", positions=[1])


OTHERS = (dict(score="ifi"), PRODUCT, dict(memory_budget=1, n_steps=2))


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [*((dtype, rule) for dtype in (torch.float32, F64) for rule in RULES), *((F64, other) for other in OTHERS)],
    ids=str,
)
@pytest.mark.parametrize("modality", ["text", "vision"])
def test_a_greedy_search_up_to_a_layer_is_the_whole_call_s_to_the_bit(modality, settings, dtype):
    qwen = tiny_qwen_vl(dtype)
    batch = image_batch(qwen, 2, 3)
    settings = dict(modality=modality, residuals="all") | settings
    whole = locate(qwen, batch, **settings)
    for layers in (range(1), [1, 0], range(3)):
        found = locate(qwen, batch, layers=layers, **settings)
        assert_only(found, sorted(layers))
        (scores, path, rows), (expected, same_path, same_rows) = (parts(a, sorted(layers)) for a in (found, whole))
        assert torch.equal(scores, expected) and torch.equal(path, same_path)
        assert rows.get("nodes") == same_rows.get("nodes")
        if dtype == F64 and "combine" not in settings:  # layers share the pass at alpha = 0, which is equal to rounding
            residuals = (torch.tensor(one["residuals"]) for one in (rows, same_rows))
            torch.testing.assert_close(*residuals, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["gemma2", "gpt2-lora", "falcon", "mllama"])
def test_a_greedy_search_up_to_a_layer_of_other_ways_to_replay(name):
    batch = text(name) if FAMILIES[name].text else pictures(name, model(name))
    with Float64():
        whole, found = (locate(model(name), batch, layers=chosen, tol=1e-3) for chosen in (None, [0, 1]))
    assert torch.equal(found.scores[:, :2], whole.scores[:, :2]) and torch.equal(found.path[:, :2], whole.path[:, :2])
    assert_only(found, [0, 1])


def test_counterfactuals():
    llama = tiny_llama(F64)
    other = text_batch(llama, [9, 12], [2, 3], seed=7)
    settings = dict(counterfactuals=other, search="pointwise", n_steps=3, residuals="all")
    whole, found = (locate(llama, text_of(llama), layers=chosen, **settings) for chosen in (None, [1, 3]))
    assert_near(found, whole, [1, 3])


# ------------------------------------------------------------------------------------------- the work


@pytest.fixture
def passes(monkeypatch):
    """[(block, copies, whether it is differentiated)] of every run of a block of tiny_llama's in a search."""
    seen, block = [], type(tiny_llama().model.layers[0])
    native = block.forward

    def counted(self, hidden, *args, **kwargs):
        seen.append((self.self_attn.layer_idx, len(hidden), hidden.requires_grad))
        return native(self, hidden, *args, **kwargs)

    monkeypatch.setattr(block, "forward", counted)
    monkeypatch.setattr(search, "_check_route", unchecked_route)
    return seen


def differentiated(passes):
    return [(layer, copies) for layer, copies, grad in passes if grad]


def test_a_wave_has_copies_of_the_layers_that_are_scored_alone(passes):
    llama = tiny_llama()
    batch, settings = text_batch(llama, [9], [2]), dict(search="pointwise", n_steps=3, residuals="none")
    locate(llama, batch, layers=[0, 2], **settings)
    assert differentiated(passes) == [(1, 3), (2, 3), (3, 6)]
    assert max(copies for layer, copies, _ in passes if layer == 0) == 1
    passes.clear()
    locate(llama, batch, layers=[1], **settings | dict(residuals="all"))
    assert differentiated(passes) == [(2, 4), (3, 4)]  # of a model that is known the clean run rides along
    at_zero = [layer for layer, _, grad in passes if not grad]
    passes.clear()
    locate(llama, batch, layers=[1], **settings)
    assert sorted(at_zero) == sorted([layer for layer, _, grad in passes if not grad] + [2, 3])


def test_the_gradient_at_the_clean_run_goes_back_no_further_than_the_first_that_is_scored(passes):
    llama = tiny_llama()
    batch = text_batch(llama, [9], [2])
    for settings in (dict(search="one-pass"), dict(search="pointwise", n_steps=1, method="gaussradau")):
        passes.clear()
        locate(llama, batch, layers=[2], residuals="none", **settings)
        assert differentiated(passes) == [(3, 1)]


def test_a_greedy_search_stops_where_it_is_told(passes):
    llama = tiny_llama()
    batch = text_batch(llama, [9], [2])
    for settings, above in ((dict(n_steps=3), [1, 2, 3, 2, 3]), (dict(combine="product"), [1, 2, 3, 1, 2, 3])):
        passes.clear()
        locate(llama, batch, layers=[0, 1], residuals="none", **settings)
        assert [layer for layer, _ in differentiated(passes)] == above


@pytest.mark.parametrize("rule", [dict(n_steps=3), dict(tol=1e-3)], ids=str)
def test_no_node_is_asked_for_where_nothing_is_scored(rule, monkeypatch):
    llama, asked, gradients = tiny_llama(), [], wave.CleanRun.gradients

    def seen(self, nodes, *args):
        asked.append([len(of_layer) for of_layer in nodes])
        return gradients(self, nodes, *args)

    monkeypatch.setattr(wave.CleanRun, "gradients", seen)
    locate(llama, text_of(llama), search="pointwise", layers=[1, 3], **rule)
    counts = torch.tensor(asked).sum(0)
    assert (counts[[1, 3]] > 0).all() and (counts[[0, 2]] == 0).all()


# ------------------------------------------------------------------------------------------- what is said


def test_a_layer_without_gradient_is_named_where_it_is_scored():
    llava = tiny_llava()
    batch, settings = image_batch(llava, 2), dict(modality="vision", search="pointwise", n_steps=2)
    assert locate(llava, batch, layers=[0, 1], **settings).report["layers_without_gradient"] == []
    found = locate(llava, batch, layers=[1, 2], **settings)
    assert found.report["layers_without_gradient"] == [2] and found.report["without_gradient"] == [[2], [2]]
    assert (found.scores[:, 2] == 0).all() and (found.path[:, [0, 2]] == -1).all()


def test_what_does_not_reach_tol_is_named_by_its_layer(caplog):
    llama = tiny_llama(F64)
    with caplog.at_level(logging.WARNING, "mipfast"):
        found = locate(llama, text_of(llama), search="pointwise", tol=1e-12, max_nodes=5, layers=[1, 3])
    assert found.report["unconverged"] == [[0, 1], [0, 3], [1, 1], [1, 3]]
    worst = divmod(int(found.error.nan_to_num(0).argmax()), 4)
    assert worst[1] in (1, 3)
    assert "4 of 4 layers of samples are not known" in caplog.text
    assert f"sample {worst[0]} layer {worst[1]} worst: {found.error[worst]:.2g}" in caplog.text
    assert converged(found) == (
        f"converged to 1e-12: 0.0% of 4 layers of samples; worst {found.error[worst]:.2g} "
        f"(sample {worst[0]}, layer {worst[1]})"
    )


def test_saved_and_read(tmp_path):
    llama = tiny_llama()
    found = locate(llama, text_of(llama), layers=range(2))
    found.save_pretrained(tmp_path)
    again = Attribution.from_pretrained(tmp_path)
    assert torch.equal(again.path, found.path) and again.report == found.report
    for name in ("scores", "error"):
        torch.testing.assert_close(getattr(again, name), getattr(found, name), rtol=0, atol=0, equal_nan=True)


def test_a_report_that_does_not_say_means_all():
    llama = tiny_llama()
    found = locate(llama, text_of(llama))
    path, line = NeuronPath.select(found, 0.1), converged(found)
    del found.report["layers"]
    assert found.layers == [0, 1, 2, 3] and converged(found) == line
    assert chosen(NeuronPath.select(found, 0.1)) == chosen(path)


def test_scores_that_are_not_finite_are_looked_for_where_they_are():
    scores = torch.ones(2, 2, 4)
    scores[1, 1, 2] = torch.nan
    with pytest.raises(DivergedError, match="scores of s layer 7 are not finite"):
        strongest(scores, 1, "s", [3, 7], torch.float32)


def test_captum_s_door():
    llama = tiny_llama(F64)
    scores, delta = NeuronPathIG(llama).attribute(text_of(llama), layers=[1, 3], return_convergence_delta=True)
    whole, every = NeuronPathIG(llama).attribute(text_of(llama), return_convergence_delta=True)
    torch.testing.assert_close(scores[:, [1, 3]], whole[:, [1, 3]], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(delta[:, [1, 3]], every[:, [1, 3]], rtol=1e-5, atol=1e-9)
    assert scores[:, [0, 2]].isnan().all() and delta[:, [0, 2]].isnan().all()


# ------------------------------------------------------------------------------------------- the choice


def chosen(path):
    return {key: indices.tolist() for key, indices in path.items()}


def narrowed(found, layers):
    """The same attribution as if the stack had only these layers, which are 0, 1, ... there."""
    report = {name: value for name, value in found.report.items() if name != "layers"}
    return Attribution(found.scores[:, layers], found.path[:, layers], report | {"layers_without_gradient": []})


@pytest.mark.parametrize("aggregate", ["mean", "contrast", "snr", "union"])
@pytest.mark.parametrize("budget", [dict(fraction=0.2), dict(per_layer=3), dict(fraction=0.2, scope="stack")], ids=str)
def test_a_choice_is_among_the_layers_that_were_scored(aggregate, budget):
    llama, layers = tiny_llama(), [1, 3]
    forget, retain, general = (
        locate(llama, text_batch(llama, [9, 12], [2, 3], seed=seed), search="pointwise", n_steps=3, layers=layers)
        for seed in (0, 1, 2)
    )
    path = NeuronPath.select([forget], aggregate=aggregate, retain=[retain, general], **budget)
    expected = NeuronPath.select(
        narrowed(forget, layers),
        aggregate=aggregate,
        retain=[narrowed(retain, layers), narrowed(general, layers)],
        **budget,
    )
    assert chosen(path) == {(stack, layers[i]): indices for (stack, i), indices in chosen(expected).items()}
    assert {layer for _, layer in path} == {1, 3}
    if aggregate != "union" and "scope" in budget:
        assert path.num_neurons == round(0.2 * 2 * 48)


def test_attributions_of_different_layers_do_not_mix():
    llama = tiny_llama()
    settings = dict(search="pointwise", n_steps=3)
    some, other, whole = (locate(llama, text_of(llama), layers=x, **settings) for x in ([1, 3], [1], None))
    for forget, retain in (([some, other], None), ([some], [some, whole]), ([whole], [some])):
        with pytest.raises(
            InputError, match=r"model.layers have scores of layers \[.*\] and of \[.*\]; expected the same"
        ):
            NeuronPath.select(forget, aggregate="snr" if retain else "mean", retain=retain)
    NeuronPath.select([some, some], aggregate="contrast", retain=some)


# ------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def demo():
    from mipfast.data import checkpoint
    from mipfast.data.encoder import Encoder
    from mipfast.demo import weights

    folder = next(iter(weights.__path__)) + "/base"
    return checkpoint.load_model(folder), Encoder.from_pretrained(folder)


@pytest.mark.parametrize("config", [dict(tol=0.01), dict(n_steps=2, search="pointwise")], ids=str)
def test_streamed_and_aggregated(demo, tmp_path, monkeypatch, config):
    monkeypatch.setattr(locate_file, "CHUNK", 1)
    pets = ("dog", "cat", "fish")
    records = [Record(pet, "", "text", "generation", "Name the pet", pet) for pet in pets]
    config = LocateConfig(layers=[0, 1], **config)
    for aggregate in (False, True):
        locate_file.locate_file(*demo, records, tmp_path / str(aggregate), config, batch_size=2, aggregate=aggregate)
    locate_file.locate_file(*demo, records, tmp_path / "False", config, batch_size=2)  # is finished
    every, sums = (locate_file.read(tmp_path / str(aggregate)) for aggregate in (False, True))
    assert_only(every, [0, 1])
    assert_only(sums, [0, 1])
    assert sums.report["residuals"][0][1] is not None
    scale = every.scores[:, :2].abs().max()
    mean = sums.scores[:, :2].mean(0) - (every.scores / torch.tensor(every.report["num_labels"])[:, None, None])[
        :, :2
    ].mean(0)
    assert mean.abs().max() < 1e-6 * scale
    assert (converged(sums) is None) == (config.resolved().tol is None)
    for how in ("mean", "contrast", "snr", "union"):
        paths = [NeuronPath.select(a, per_layer=5, aggregate=how, retain=a) for a in (every, sums)]
        assert {layer for _, layer in paths[0]} == {0, 1} and paths[0].keys() == paths[1].keys()
        for key, indices in paths[0].items():
            assert set(indices.tolist()) == set(paths[1][key].tolist()), (how, key)


# ------------------------------------------------------------------------------------------- unlearn


def edited(config, scoring=None):
    llama = tiny_llama()
    forget, *retain = (text_batch(llama, [9, 8], [1, 2], seed=seed) for seed in range(4))
    with pytest.MonkeyPatch.context() as patch:
        if scoring:
            patch.setattr(unlearning, "text_scoring", scoring)
        return unlearning.locate_path(llama, [forget], retain, config)


@pytest.mark.parametrize(
    "text", [dict(n_steps=4), dict(tol=0.01), dict(combine="product"), dict(positions="prompt")], ids=str
)
@pytest.mark.parametrize("aggregate", ["mean", "contrast", "union"])
def test_unlearn_scores_no_layer_that_it_leaves_out_and_chooses_the_same_to_the_bit(aggregate, text):
    config = MIPConfig(LocateConfig(**text), vision=None, aggregate=aggregate, rmisu=RMisUConfig(layer=1))
    path, located = edited(config)
    expected, whole = edited(config, lambda config, sites: config.text)
    assert chosen(path) == chosen(expected) and path.keys() == {("model.layers", 0), ("model.layers", 1)}
    assert located["text"]["layers"] == [0, 1] and whole["text"]["layers"] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "config",
    [
        MIPConfig(),  # snr's floor is a mean over layers
        MIPConfig(LocateConfig(search="pointwise"), aggregate="mean"),
        MIPConfig(LocateConfig.released("text"), aggregate="union"),
        MIPConfig(LocateConfig(layers=range(2)), aggregate="mean"),
        MIPConfig(LocateConfig(), aggregate="mean", scope="stack"),
        MIPConfig(LocateConfig(), aggregate="mean", fraction="auto"),  # which may choose above the steering layer
    ],
    ids=["snr", "pointwise", "released", "given", "stack", "auto"],
)
def test_unlearn_scores_what_it_was_told_where_a_choice_might_differ(config):
    assert unlearning.text_scoring(config, find_sites(tiny_llama())) is config.text


def test_the_pipeline_scores_what_unlearn_does():
    sites = find_sites(tiny_llama())
    record = Record("1", "", "text", "generation", "who", "dog")
    data = Data(groups={"forget": ["a"], "retain": ["b"]})
    stage = UnlearnStage(LocateConfig(n_steps=4), aggregate="contrast", rmisu=RMisUConfig(layer=1), data=data)
    sets = pipeline._sets({"forget": [record], "retain": [record]}, stage, sites)
    assert {name: config.layers for name, (_, config) in sets.items()} == {"forget-text": (0, 1), "retain-text": (0, 1)}


# ------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            dict(layers=[0, 2, 5]),
            r"layers=\[0, 2, 5\] .* leaves out 1, 3, 4.*expected range\(6\), or search='pointwise'",
        ),
        (dict(layers=[1], search="pointwise", combine="product"), "combine='product' leaves out 0"),
        (dict(layers=[]), r"layers=\[\]; expected distinct indices"),
        (dict(layers=[1, 1], search="pointwise"), r"layers=\[1, 1\]; expected distinct indices"),
        (dict(layers=[-1], search="pointwise"), r"layers=\[-1\]; expected distinct indices of layers, 0 or more"),
        (dict(layers=[0, True]), "expected distinct indices"),
        (dict(layers=[0.0]), "expected distinct indices"),
        (dict(layers="01"), "expected distinct indices"),
        (dict(layers=3), "layers=3; expected a sequence of integers or None"),
    ],
)
def test_what_is_no_set_of_layers_is_refused(settings, said):
    with pytest.raises(InputError, match=said):
        LocateConfig(**settings)


def test_layers_of_a_yaml_file():
    config = overlaid(UnlearnStage(), {"text": {"layers": [1, 0]}, "vision": {"layers": [0]}})
    assert config.text.layers == (0, 1) and config.vision.layers == (0,) and config.vision.modality == "vision"
    assert "layers:\n- 0\n- 1\n" in yaml.safe_dump(settings_of(config)["text"])
    with pytest.raises(InputError, match="text.layers=.* leaves out 0"):
        overlaid(UnlearnStage(), {"text": {"layers": [1]}})


def test_layers_are_kept_ascending():
    assert LocateConfig(search="one-pass", layers=[3, 0, 2]).layers == (0, 2, 3)
    assert LocateConfig(layers=range(3)) == LocateConfig(layers=[2, 0, 1])


@pytest.mark.parametrize("modality", ["text", "vision"])
def test_the_released_settings_are_of_all_layers(modality):
    with pytest.raises(InputError, match=r"layers=\(0, 1\), .* cannot be mixed into the released code's settings"):
        LocateConfig(modality=modality, combine="released", layers=[0, 1])


def test_a_layer_that_the_model_lacks_is_refused_before_any_run(monkeypatch):
    llama = tiny_llama()
    batch = text_of(llama)
    monkeypatch.setattr(nn.Module, "__call__", None)
    with pytest.raises(InputError, match=r"layers=\[1, 4, 7\]: the stack has no 4, 7; expected indices in 0..3"):
        locate(llama, batch, search="pointwise", layers=[7, 1, 4])
