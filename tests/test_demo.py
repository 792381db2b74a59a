"""The demo's world, its shipped model, and one short run whose saved model gives the table's numbers again."""

import json
from collections import Counter

import pytest
import torch
from bench_evidence import small_base
from PIL import Image

from mipfast import MipfastError, evaluate, locate
from mipfast.demo import model as tiny
from mipfast.demo import people, run, trial
from mipfast.demo.report import write_report
from mipfast.judge.attacks import relearned


@pytest.fixture(scope="module")
def base():
    return run.load_base()


def test_the_world_is_a_function_of_its_seed():
    a, b, c = people.build(0), people.build(0), people.build(1)
    assert a.questions == b.questions and [p.tobytes() for p in a.pictures] == [p.tobytes() for p in b.pictures]
    assert a.questions != c.questions
    counts = Counter((q.subject is None, q.modality, q.test) for q in a.questions)
    assert counts[False, "text", False] == counts[False, "image", False] == 48 * 5 * 9
    assert counts[False, "text", True] == counts[False, "image", True] == 48 * 5 * 3
    assert len(set(a.people)) == 48 and all(len(name.split()) == 2 for name in a.people)


def test_nothing_asked_in_a_test_was_trained_on():
    world = people.build(0)
    trained = {(q.subject, q.modality, q.text) for q in world.questions if not q.test and q.subject is not None}
    pictures = {p for q in world.questions if not q.test for p in q.pictures}
    for q in world.questions:
        if q.test:
            assert q.subject is None or (q.subject, q.modality, q.text) not in trained
            assert not pictures & set(q.pictures) and len(q.pictures) == (q.modality == "image")
        assert q.answer in world.options[q.topic]


def test_splits_are_nested_disjoint_and_complete():
    world = people.build(0)
    small, large = world.split(3, 0.05), world.split(3, 0.15)
    assert len(small.forget_people) == 2 and len(large.forget_people) == 7 and small.forget_people < large.forget_people
    groups = [small.select(g, test=True) for g in trial.GROUPS]
    assert sum(map(len, groups)) == len(set().union(*map(set, groups))) == sum(q.test for q in world.questions)
    assert {q.subject for q in groups[0]} == small.forget_people


def test_encoding_masks_all_but_the_answer(base):
    _, encoder = base
    split = encoder.world.split(0)
    batch = encoder.batch([split.select("forget", True, m)[0] for m in trial.MODALITIES])
    for row, q in enumerate([split.select("forget", True, m)[0] for m in trial.MODALITIES]):
        scored = batch["labels"][row] != -100
        assert encoder.tokenizer.decode(batch["labels"][row][scored]) == q.answer
        assert torch.equal(batch["labels"][row][scored], batch["input_ids"][row][scored])
    assert (batch["input_ids"] == tiny.IMAGE).sum(1).tolist() == [0, 4] and batch["pixel_values"].shape == (16, 1176)


def test_the_shipped_model_knows(base):
    model, encoder = base
    for seed in (0, 1, 2):
        split = encoder.world.split(seed, 0.10)
        assert evaluate(model, encoder.batches(split.select("forget", test=True))).accuracy > 95
        assert evaluate(model, encoder.batches(split.select("retain", test=True)[::9])).accuracy > 95


def test_generate_answers_about_a_portrait(base):
    model, encoder = base
    q = next(q for q in encoder.world.questions if q.test and q.subject == 7 and q.pictures)
    batch = encoder.batch([q])
    prompt = int((batch["labels"][0] != -100).int().argmax())
    cut = {
        k: v[:, :prompt]
        for k, v in batch.items()
        if v.ndim == 2 and k in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    cut |= {k: batch[k] for k in ("pixel_values", "image_grid_thw")}
    out = model.generate(**cut, max_new_tokens=4, do_sample=False)[0, prompt:]
    assert encoder.tokenizer.decode(out, skip_special_tokens=True).split() == [q.answer]


def test_completeness_falls_with_the_nodes_on_the_trained_model(base):
    model, encoder = base
    batch = encoder.batch(encoder.world.split(0).select("forget", test=False, modality="text")[:20])

    def residual(**rule):
        found = torch.tensor(locate(model, batch, **rule).report["residuals"])
        return found[:, 1:].median().item()  # layer 0's path is too bent for a few nodes

    left, legendre = ([residual(method=m, n_steps=n) for n in (2, 4, 8)] for m in ("riemann_left", "gausslegendre"))
    assert left[0] > left[1] > left[2] > left[0] / 16, "first order: about halved by twice the nodes"
    assert legendre[0] > 5 * legendre[1], "spectral"
    assert legendre[1] < left[2] / 5, "four Gauss nodes beat eight left ones"


def test_relearning_leaves_no_trace(base):
    model, encoder = base
    questions = encoder.world.split(0).select("forget", test=False)[:24]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with relearned(model, [encoder.batch(questions)] * 2, lr=1e-2):
        assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_training_is_deterministic_and_excludes_the_forget_people(base):
    _, encoder = base
    split = encoder.world.split(0)
    names = {encoder.tokenizer(encoder.world.people[i])["input_ids"][0] for i in split.forget_people}
    seen = [
        torch.cat([b["input_ids"].flatten() for b in tiny._training_batches(encoder, s, 0, 40)]) for s in (split, None)
    ]
    assert not names & set(seen[0].tolist()) and names & set(seen[1].tolist())

    def trained():
        model = tiny.build_model(len(encoder.tokenizer))
        tiny.train(model, encoder, None, steps=2)
        return model.lm_head.weight.detach().clone()

    assert torch.equal(trained(), trained())


def short_run(out, retrain=False):
    """The whole demo with few RMisU steps and few scored and asked questions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_base", small_base)
        patch.setattr(trial, "STEPS", 8)
        patch.setattr(trial, "LOCATE_FORGET", 12)
        patch.setattr(trial, "LOCATE_RETAIN", 6)
        results = run.run([0], 0.10, out, retrain, progress=False)
    write_report(results, out)
    return results


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return short_run(out), out


def assert_every_row_and_control_is_there(results, out, measured):
    assert [row["name"] for row in results["rows"]] == [name.removesuffix(" prune") for name in run.QUICK]
    for key, row in zip(run.QUICK, results["rows"], strict=True):
        count = key in measured
        assert all(len(row["accuracy"][g][kind]) == count for g in trial.GROUPS for kind in trial.MODALITIES)
    budget = {row["name"]: row["neurons"] for row in results["rows"] if row["stage"] == "RMisU"}
    assert budget["random"] == budget["MIP"] == budget["IGI only"] + budget["IFI only"]
    pictures = [f"pictures/{name}.png" for name in ("accuracy", "path", "residuals")]
    for name in ("report.json", "report.md", "report.html", *pictures, "model/model.safetensors"):
        assert (out / name).stat().st_size > 0
    assert json.loads((out / "report.json").read_text())["runs"][0]["rows"].keys() == set(measured)
    edit = results["runs"][0]["rows"]["MIP"]["edit"]
    assert edit["above_the_steering_layer"] == edit["without_gradient"] == [] and len(edit["trained"]) == 4 + 3


def test_every_row_but_the_retrained_one_is_measured_and_the_page_says_so(short_demo):
    results, out = short_demo
    assert_every_row_and_control_is_there(results, out, [row for row in run.QUICK if row != "retrained"])
    assert "retrained is not measured" in (out / "report.md").read_text()
    assert sum("mipfast demo --retrain" in limit for limit in results["limits"]) == 1


def test_transformers_alone_reproduces_the_table_from_the_saved_model(short_demo):
    """No mipfast here: the stored questions, their pictures, and the saved folder."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    _, out = short_demo
    report = json.loads((out / "report.json").read_text())
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(out / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    processor = tiny.image_processor_class().from_pretrained(out / "model")
    entry = report["runs"][0]
    hits: dict[tuple[str, str], list[bool]] = {}
    questions = list(zip(entry["questions"], entry["predictions"]["MIP"], strict=True))
    for kind in ("text", "image"):
        mine = [pair for pair in questions if pair[0]["modality"] == kind]
        for length in {len(tokenizer(q["text"])["input_ids"]) for q, _ in mine}:
            group = [pair for pair in mine if len(tokenizer(pair[0]["text"])["input_ids"]) == length]
            seen = "<|vision_start|> " + "<|image_pad|> " * 4 + "<|vision_end|> " if kind == "image" else ""
            texts = [f"<|im_start|> {seen}{q['text']} <|im_end|>" for q, _ in group]
            inputs = dict(tokenizer(texts, return_tensors="pt"))
            if kind == "image":
                inputs |= dict(processor([Image.open(out / q["picture"]) for q, _ in group], return_tensors="pt"))
                inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
            inputs.pop("token_type_ids", None)
            with torch.no_grad():
                answers = tokenizer.batch_decode(model(**inputs).logits[:, -1].argmax(-1)[:, None])
            for (q, predicted), answer in zip(group, answers, strict=True):
                assert answer == predicted, q
                hits.setdefault((q["group"], kind), []).append(answer == q["answer"])
    row = next(row for row in report["rows"] if row["name"] == "MIP")
    for (group, kind), right in hits.items():
        assert 100 * sum(right) / len(right) == pytest.approx(row["accuracy"][group][kind][0], abs=1e-9)


def test_missing_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "WEIGHTS", tmp_path)
    with pytest.raises(MipfastError, match="shipped"):
        run.load_base()
