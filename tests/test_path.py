"""Selections worked by hand, and paths on disk."""

import pytest
import torch
from tiny import tiny_llama, tiny_qwen_vl

from mipfast import Attribution, NeuronPath, find_sites
from mipfast.errors import ArtefactError, InputError

FINGERPRINT = {"stacks": {"text": [2, 4]}, "weights": "w"}


def attribution(scores, path=None, labels=None, score="igi", stack="text", dead=()):
    scores = torch.tensor(scores, dtype=torch.float32)
    path = torch.tensor(path) if path is not None else scores.argsort(-1, descending=True)[..., :1]
    report = {
        "stack": stack,
        "fingerprint": FINGERPRINT,
        "num_labels": labels or [1] * len(scores),
        "config": {"score": score, "objective": "logprob"},
        "layers_without_gradient": list(dead),
    }
    return Attribution(scores, path, report)


# two samples, two layers, four neurons
FORGET = attribution([[[4, 0, 1, 0], [0, 9, 0, 1]], [[2, 0, 3, 0], [0, 1, 0, 7]]])


def chosen(path):
    return {layer: indices.tolist() for (_, layer), indices in path.items()}


def test_mean_takes_the_largest_per_layer_and_ties_go_to_the_lowest_index():
    assert chosen(NeuronPath.select(FORGET, per_layer=1)) == {0: [0], 1: [1]}
    assert chosen(NeuronPath.select(FORGET, 0.75)) == {0: [0, 2, 1], 1: [1, 3, 0]}


def test_stack_scope_spends_the_budget_where_the_scores_are():
    assert chosen(NeuronPath.select(FORGET, 0.25, scope="stack")) == {1: [1, 3]}


def test_contrast_and_snr_worked_by_hand():
    retain = attribution([[[3, 0, 0, 0], [0, 5, 0, 0]]])
    assert chosen(NeuronPath.select(FORGET, per_layer=1, aggregate="contrast", retain=retain)) == {0: [2], 1: [3]}
    # D = |retain|, its mean is 1: 3/3.1 < 2/.1 in layer 0, 5/5.1 < 4/.1 in layer 1
    assert chosen(NeuronPath.select(FORGET, per_layer=1, aggregate="snr", retain=retain)) == {0: [2], 1: [3]}
    # a large group counts no more than a small one
    quiet = attribution([[[0, 0, 50, 0], [0, 0, 0, 50]]] * 10)
    both = NeuronPath.select(FORGET, per_layer=1, aggregate="snr", retain=[retain, quiet])
    assert chosen(both) == {0: [0], 1: [1]}


def test_layers_that_were_not_scored_are_in_no_mean_and_no_choice():
    nan = float("nan")
    forget = attribution([[[nan] * 4, [0, 9, 0, 2], [3, 0, 0, 1]]], [[[-1], [1], [0]]])
    retain = attribution([[[nan] * 4, [0, 30, 0, 0], [2, 0, 0, 0]]])
    for one in (forget, retain):
        one.report["layers"] = [1, 2]
    assert chosen(NeuronPath.select(forget, 0.25, scope="stack")) == {1: [1], 2: [0]}  # 2 of 8
    assert chosen(NeuronPath.select(forget, per_layer=1, aggregate="union")) == {1: [1], 2: [0]}
    assert chosen(NeuronPath.select(forget, per_layer=1, aggregate="contrast", retain=retain)) == {1: [3], 2: [0]}
    # the mean of D over both layers is 4: 9/30.4 < 2/.4, and 3/2.4 < 1/.4
    assert chosen(NeuronPath.select(forget, per_layer=1, aggregate="snr", retain=retain)) == {1: [3], 2: [3]}


def test_union_keeps_every_sample_s_path_and_skips_layers_without_gradient():
    paths = [[[0], [1]], [[2], [-1]]]
    assert chosen(NeuronPath.select(attribution(FORGET.scores.tolist(), paths), aggregate="union")) == {
        0: [0, 2],
        1: [1],
    }
    assert chosen(NeuronPath.select(attribution(FORGET.scores.tolist(), dead=[1]), per_layer=1)) == {0: [0]}


def test_long_answers_do_not_dominate():
    long = [[[8.0, 0, 0, 0]]]
    short = [[[0, 3.0, 0, 0]]]
    igi = NeuronPath.select(attribution(long + short, labels=[4, 1]), per_layer=1)
    assert chosen(igi) == {0: [1]}  # 8/4 < 3
    ifi = NeuronPath.select(attribution([[[40.0, 0, 0, 0]], [[0, 3.0, 0, 0]]], labels=[4, 1], score="ifi"), per_layer=1)
    assert chosen(ifi) == {0: [1]}  # 40/16 < 3


def test_random_has_the_same_budget_and_a_seed():
    sites = find_sites(tiny_qwen_vl())
    like = NeuronPath({(sites.text.name, 0): torch.arange(7), (sites.vision[0].name, 2): torch.arange(3)})
    a, b, c = (NeuronPath.random(sites, like, seed) for seed in (0, 0, 1))
    assert {k: len(v) for k, v in a.items()} == {k: len(v) for k, v in like.items()}
    assert all(v.unique().numel() == len(v) for v in a.values())
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)


def test_union_operator_and_up_to():
    a = NeuronPath({("text", 0): torch.tensor([3, 1]), ("text", 4): torch.tensor([2])}, FINGERPRINT)
    b = NeuronPath({("text", 0): torch.tensor([1, 2]), ("eyes", 4): torch.tensor([0])}, FINGERPRINT)
    both = a | b
    assert both[("text", 0)].tolist() == [3, 1, 2] and both.num_neurons == 5
    assert set(both.up_to("text", 3)) == {("text", 0), ("eyes", 4)}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(per_layer=5), "5 neurons per layer of 4"),
        (dict(fraction=0), "fraction=0"),
        (dict(aggregate="snr"), "needs retain"),
        (dict(aggregate="best"), "expected mean"),
        (dict(per_layer=2, scope="stack"), "contradict"),
    ],
)
def test_bad_selections_are_named(arguments, says):
    with pytest.raises(InputError, match=says):
        NeuronPath.select(FORGET, **arguments)


def test_attributions_of_different_models_do_not_mix():
    other = attribution(FORGET.scores.tolist())
    other.report["fingerprint"] = {"stacks": {"text": [2, 4]}, "weights": "x"}
    with pytest.raises(InputError, match="different models"):
        NeuronPath.select([FORGET, other])


def test_disk_round_trip(tmp_path):
    path = NeuronPath(
        {("a.b", 0): torch.tensor([3, 1]), ("a.b", 11): torch.tensor([2])}, FINGERPRINT, {"aggregate": "mean"}
    )
    path.save_pretrained(tmp_path)
    back = NeuronPath.from_pretrained(tmp_path)
    assert set(back) == set(path) and all(torch.equal(back[k], path[k]) for k in path)
    assert (back.fingerprint, back.origin) == (path.fingerprint, path.origin)
    FORGET.save_pretrained(tmp_path)
    again = Attribution.from_pretrained(tmp_path)
    assert torch.equal(again.scores, FORGET.scores) and again.report == FORGET.report
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "attribution.json",
        "attribution.safetensors",
        "path.json",
        "path.safetensors",
    ]


def test_missing_and_truncated_files_are_named(tmp_path):
    with pytest.raises(ArtefactError, match="missing"):
        NeuronPath.from_pretrained(tmp_path)
    path = NeuronPath({("text", 0): torch.arange(100)}, FINGERPRINT)
    for name in ("path.safetensors", "path.json"):
        path.save_pretrained(tmp_path)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ArtefactError, match="truncated or damaged"):
            NeuronPath.from_pretrained(tmp_path)


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    from mipfast.files import write_atomic

    file = tmp_path / "x.json"
    file.write_text("old")

    def crash(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(file, crash)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_fingerprint_tells_models_and_weights_apart():
    model, other = tiny_llama(), tiny_qwen_vl()
    mine = find_sites(model).fingerprint()
    assert find_sites(model).check(mine)
    with pytest.raises(ArtefactError, match="another model"):
        find_sites(other).check(mine)
    with torch.no_grad():
        find_sites(model).text.outputs[0].weight.add_(1)
    assert not find_sites(model).check(mine)
