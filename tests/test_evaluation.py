"""Records judged: equal to one record at a time by hand, for any batch size and order, however often it was killed."""

import json
import logging
import math
import os
import re
from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
import twins
from dying import dying

import mipfast
from mipfast import ArtefactError, InputError, ModelError, NeuronPath, files
from mipfast.data import checkpoint, load
from mipfast.data.encoder import Encoder
from mipfast.data.records import LETTERS, Picture, Record
from mipfast.judge import metrics
from mipfast.judge import records as judge_records
from mipfast.judge.records import Judgement, evaluate_records, read_records

FIELDS = ("nll_options", "nll_paraphrase", "nll_perturbed")
LETTER = 50  # the id of A in the tiny models' vocabulary
NEW = 10


class Numbers:
    """An encoder, and its own tokenizer, for texts made of token ids and letters; a picture is a seed."""

    eos_token_id, pad_token_id = tiny.EOS, tiny.PAD

    def __init__(self, model):
        self.model, self.tokenizer = model, self

    def ids(self, text):
        return [int(w) if w.isdigit() else LETTER + LETTERS.index(w) for w in re.findall(r"\d+|\b[A-D]\b", text)]

    def decode(self, ids, skip_special_tokens):
        texts = [LETTERS[i - LETTER] if LETTER <= i < LETTER + 4 else str(i) for i in ids if i >= tiny.FIRST_WORD]
        return " ".join(texts)

    def fingerprint(self):
        return "numbers"

    def batch(self, records):
        return self._inputs(records, [self.ids(record.target) for record in records], "right")

    def prompts(self, records):
        batch = self._inputs(records, [[] for _ in records], "left")
        del batch["labels"]
        return batch

    def _inputs(self, records, answers, padding):
        rows, parts = [], []
        for record, answer in zip(records, answers, strict=True):
            placeholders = []
            if record.image:
                placeholders, pixels = self._picture(record.image)
                parts.append(pixels)
            rows.append(torch.tensor([tiny.BOS, *placeholders, *self.ids(record.prompt), *answer]))
        batch = tiny._pad(rows, [len(answer) or 1 for answer in answers], padding)
        if tiny._is_qwen(self.model):
            batch["mm_token_type_ids"] = (batch["input_ids"] == tiny.IMAGE).long()
        return batch | {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}

    def _picture(self, picture):
        drawn = torch.Generator().manual_seed(int(picture.source))
        if not tiny._is_qwen(self.model):
            return [tiny.IMAGE] * 4, {"pixel_values": torch.randn(1, 3, 56, 56, generator=drawn)}
        placeholders = [tiny.VISION_START, *[tiny.IMAGE] * 4, tiny.VISION_END]
        patches = torch.randn(16, 3 * 2 * tiny.PATCH**2, generator=drawn)
        return placeholders, {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]])}


def some_records(pictures, n=9):
    """Of all tasks, prompts of 2 to 14 words, answers of 1 to 4; with pictures every second one has one."""
    generator = torch.Generator().manual_seed(3)

    def words(count):
        return " ".join(map(str, torch.randint(tiny.FIRST_WORD, LETTER, (count,), generator=generator).tolist()))

    records = []
    for i in range(n):
        task, seen = ("generation", "choice", "cloze")[i % 3], pictures and i % 2 == 1
        more = {}
        if task == "choice":
            more = {"options": tuple(words(2) for _ in range(2 + i % 3)), "perturbed": ("7",)}  # which a choice ignores
        elif i % 2 == 0:
            more = {"paraphrase": words(2) if i % 4 == 0 else "", "perturbed": tuple(words(1 + j) for j in range(3))}
        records.append(
            Record(
                id=f"{i}/x",
                group="forget_5" if i < n // 2 else "retain_95",
                modality="image" if seen else "text",
                task=task,
                question=words(2 + 3 * (i % 5)),
                answer=more["options"][i % 2] if task == "choice" else words(1 + i % 4),
                image=Picture(str(i).encode()) if seen else None,
                **more,
            )
        )
    return records


def by_hand(model, encoder, record):
    """The row, without padding, cache, batch or transformers' generate."""
    limit = judge_records.CHOICE_TOKENS if record.task == "choice" else NEW
    inputs = encoder.prompts([record])
    written = []
    while len(written) < limit and tiny.EOS not in written:
        ids = torch.cat([inputs["input_ids"], torch.tensor([written], dtype=torch.long)], 1)
        grown = {name: torch.zeros_like(ids) for name in inputs if name == "mm_token_type_ids"}
        for name in grown:
            grown[name][:, : inputs[name].shape[1]] = inputs[name]
        grown |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        written.append(int(model(**inputs | grown, use_cache=False).logits[0, -1].argmax()))

    def nll(answer, letter=""):
        batch = encoder.batch([replace(record, answer=answer, letter=letter)])
        logp = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0].double().log_softmax(-1)
        places = (batch["labels"][0] != -100).nonzero().flatten()
        return -sum(float(logp[at - 1, batch["labels"][0, at]]) for at in places) / len(places)

    def token_hits():
        batch = encoder.batch([record])
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
        places = (batch["labels"][0] != -100).nonzero().flatten().tolist()
        return [int(logits[at - 1].argmax()) == int(batch["labels"][0, at]) for at in places]

    choice = record.task == "choice"
    return {
        "text": encoder.decode([i for i in written if i != tiny.EOS], True),
        "nll": nll(record.answer),
        "token_hits": token_hits(),
        "nll_options": [nll(o, LETTERS[i]) for i, o in enumerate(record.options)] if choice else [],
        "nll_paraphrase": [nll(record.paraphrase)] if record.paraphrase and record.perturbed else [],
        "nll_perturbed": [] if choice else [nll(answer) for answer in record.perturbed],
    }


def check_same(found, expected):
    for name in ("text", "token_hits"):
        assert [row[name] for row in found] == [row[name] for row in expected]
    for a, b in zip(found, expected, strict=True):
        assert a["nll"] == pytest.approx(b["nll"], abs=1e-5, rel=0)
        for name in FIELDS:
            assert a[name] == pytest.approx(b[name], abs=1e-5, rel=0)


def judge(model, records, **options):
    return evaluate_records(model, Numbers(model), records, **{"max_new_tokens": NEW, **options})


@pytest.fixture
def llama():
    return tiny.tiny_llama()


# ---------------------------------------------------------------------------------------------- what it finds


@pytest.mark.parametrize("build", [tiny.tiny_llama, tiny.tiny_qwen_vl, tiny.tiny_llava], ids=lambda f: f.__name__)
def test_any_batch_size_and_order_gives_what_one_record_at_a_time_gives(build):
    model = build()
    records = some_records(build is not tiny.tiny_llama)
    with torch.no_grad():
        expected = [by_hand(model, Numbers(model), record) for record in records]
    assert len({row["text"] for row in expected}) > 6  # of 9
    for size in (1, 3, 8):
        check_same(judge(model, records, batch_size=size).rows, expected)
        check_same(judge(model, records[::-1], batch_size=size).rows[::-1], expected)


@pytest.mark.parametrize("name", ["demo", "llava", "qwen3-vl"])
def test_the_benchmarks_twins(tmp_path, name):
    """MLLMU-Bench's and CLEAR's tables through the encoder of the command line; the demo's model knows the answers."""
    folder = twins.write_model(tmp_path / name) if name == "demo" else twins.write_family(tmp_path / name, name)
    model, encoder = checkpoint.load_model(folder), Encoder.from_pretrained(folder)
    bench, clear = twins.write_mllmu(tmp_path / "a", 2, 1) / "bench", twins.write_clear(tmp_path / "b", 2, 1)
    records = [*load(bench, "Full_Set"), *load(clear, "forget05_perturbed"), *load(clear, "real_faces")]
    if name != "demo":
        records = records[::4]
    found = evaluate_records(model, encoder, records, batch_size=16, max_new_tokens=4)
    check_same(evaluate_records(model, encoder, records[::-1], batch_size=5, max_new_tokens=4).rows[::-1], found.rows)
    if name == "demo":
        for kind in ("text", "image"):
            assert found.summary[f"Full_Set/{kind}/generation/exact_match"] > 0.9
            assert found.summary[f"Full_Set/{kind}/generation/probability"] > 0.9
            assert found.summary[f"Full_Set/{kind}/generation/extraction_strength"] > 0.9
            assert 0 < found.summary[f"Full_Set/{kind}/choice/normalised_probability"] < 1
        assert found.summary["forget05_perturbed/image/generation/truth_ratio"] > 0


def test_nothing_is_drawn_and_the_model_is_left_as_it_was(llama):
    records = some_records(False)
    expected = judge(llama, records).rows
    own = llama.generation_config
    own.do_sample, own.temperature, own.repetition_penalty, own.no_repeat_ngram_size = True, 5.0, 3.0, 1
    llama.train()
    llama.model.layers[1].eval()
    state = torch.random.get_rng_state()
    assert judge(llama, records).rows == expected
    assert torch.equal(torch.random.get_rng_state(), state)
    assert llama.generation_config is own and own.repetition_penalty == 3.0
    assert llama.training and not llama.model.layers[1].training
    assert all(p.requires_grad for p in llama.parameters())


def test_a_lora_wrapped_model_is_judged_with_its_adapter(llama):
    peft = pytest.importorskip("peft", reason="peft is not installed (it is in the extra dev)")
    records = some_records(False, 3)
    before = judge(llama, records).rows
    wrapped = peft.get_peft_model(llama, peft.LoraConfig(r=2, target_modules=["down_proj"]))
    assert judge(wrapped, records).rows == before
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            weight.data.fill_(1.0)
    after = judge(wrapped, records).rows
    assert all(a["text"] != b["text"] and abs(a["nll"] - b["nll"]) > 1e-3 for a, b in zip(after, before, strict=True))


def test_logits_are_computed_from_the_first_label_on(llama):
    """8 tokens with BOS, of which 6 and 7 are the question: from the last of the shorter on there are 3."""
    short, long = (Record(q, "g", "text", "cloze", q, a) for q, a in [("6 7 8 9 10", "11 12"), ("6 7 8 9 10 11", "12")])
    shapes = []
    llama.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[:2])))
    judge(llama, [short, long], max_new_tokens=1)
    assert shapes[0] == (2, 3)


# ---------------------------------------------------------------------------------------------- what it makes of it


def row(task="generation", text="", **changes):
    fields = {"id": "1/x", "group": "g", "modality": "text", "prompt": "?", "target": "Oslo", "answer": "Oslo"}
    empty = {name: [] for name in FIELDS}
    return fields | {"task": task, "text": text, "nll": math.log(2), "token_hits": []} | empty | changes


def test_every_metric_of_a_row_by_hand():
    nlls = [-math.log(p) for p in (0.1, 0.2, 0.5, 0.2)]
    choice = row("choice", "c) Oslo", target="C", nll=nlls[2], nll_options=nlls)
    assert judge_records._scores(choice) == pytest.approx(
        dict(probability=0.5, accuracy=1, likelihood_accuracy=1, legal=1, normalised_probability=0.5)
    )
    illegal = judge_records._scores(choice | {"text": "Each of them", "nll_options": nlls[::-1], "nll": nlls[1]})
    assert (illegal["accuracy"], illegal["likelihood_accuracy"], illegal["legal"]) == (0, 0, 0)
    assert judge_records._scores(row("cloze", "In OSLO")) == pytest.approx(
        dict(probability=0.5, accuracy=1, exact_match=0)
    )
    memorised = judge_records._scores(row("cloze", "In OSLO", token_hits=[True, False, True, True]))
    assert (memorised["exact_memorisation"], memorised["extraction_strength"]) == (0.75, 0.5)
    wrong = {"nll_paraphrase": [-math.log(0.4)], "nll_perturbed": [-math.log(0.1), -math.log(0.3)]}
    generated = judge_records._scores(row(text="Oslo", **wrong))
    assert generated == pytest.approx(
        dict(probability=0.5, rouge_l=1, rouge_l_recall=1, bleu=metrics.bleu("Oslo", "Oslo"), exact_match=1)
        | dict(normalised_probability=0.5 / 0.9, truth_ratio=0.5, truth_ratio_forget=0.5, truth_ratio_retain=0.5)
    )
    assert judge_records._scores(row(**wrong | {"nll_paraphrase": []}))["truth_ratio"] == pytest.approx(0.4)


def test_scores_are_by_group_modality_and_task_and_the_files_have_open_unlearning_s_shape(tmp_path):
    rows = [
        row("cloze", "Oslo"),
        row("cloze", "Rome", id="2/x"),
        row("cloze", "Oslo", modality="image"),
        row("cloze", "Rome", group="h"),
    ]
    judged = Judgement(rows, {})
    assert judged.scores["g/text/cloze/accuracy"] == {"1/x": 1, "2/x": 0}
    means = {cell: value for cell, value in judged.summary.items() if cell.endswith("accuracy")}
    assert means == {"g/text/cloze/accuracy": 0.5, "g/image/cloze/accuracy": 1, "h/text/cloze/accuracy": 0}
    judged.save(tmp_path, "MLLMU")
    every, summary = (json.loads((tmp_path / f"MLLMU_{kind}.json").read_text()) for kind in ("EVAL", "SUMMARY"))
    assert summary == judged.summary
    assert every["g/text/cloze/accuracy"] == {
        "agg_value": 0.5,
        "value_by_index": {"1/x": {"accuracy": 1.0}, "2/x": {"accuracy": 0.0}},
    }
    assert {cell: found["agg_value"] for cell, found in every.items()} == summary


def test_a_model_that_writes_nothing_scores_nothing(llama):
    llama.generation_config.eos_token_id = list(range(61))
    found = judge(llama, some_records(False))
    assert {row["text"] for row in found.rows} == {""}
    for cell, value in found.summary.items():
        if cell.rsplit("/")[-1] in ("accuracy", "legal", "exact_match", "rouge_l", "rouge_l_recall", "bleu"):
            assert value == 0
        assert math.isfinite(value)


def test_what_is_not_finite_is_reported_and_not_averaged_away(llama, tmp_path, caplog):
    llama.model.layers[2].mlp.down_proj.weight.data.fill_(math.nan)
    records = some_records(False)
    with caplog.at_level(logging.WARNING, "mipfast"):
        found = judge(llama, records, out=tmp_path)
    assert "9 of 9 records have a log-likelihood that is nan" in caplog.text and "forget_5/0/x" in caplog.text
    assert len(found.not_finite) == 9 and {row["nll"] for row in found.rows} == {None}
    likely = ("probability", "likelihood_accuracy", "truth_ratio", "truth_ratio_forget", "truth_ratio_retain")
    likely += ("exact_memorisation", "extraction_strength")
    assert {math.isnan(v) for cell, v in found.summary.items() if cell.rsplit("/")[-1] in likely} == {True}
    for path in tmp_path.glob("*.json*"):
        assert "NaN" not in path.read_text()
    one = Judgement([row("cloze"), row("cloze", id="2/x", nll=None)], {})
    assert math.isnan(one.summary["g/text/cloze/probability"]) and one.not_finite == ["g/2/x"]


# ---------------------------------------------------------------------------------------------- stopped and resumed


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(judge_records, "CHUNK", 2)


@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_stopped_at_every_write_and_resumed_gives_the_same_bytes(llama, tmp_path, monkeypatch, small_chunks, moment):
    """Each run dies at its first write right after the rename, or at its second before it."""
    records = some_records(False)
    whole = judge(llama, records, out=tmp_path / "whole", batch_size=2)
    rename, writes = os.replace, []

    for chunks in range(7):  # run.json, five chunks, and the first of the two files at the end
        writes.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(files.os, "replace", partial(dying, rename, writes, moment))
            judge(llama, records, out=tmp_path / "out", batch_size=2)
        if chunks < 5:
            with pytest.raises(ArtefactError, match=f"holds {2 * chunks} of 9 records"):
                read_records(tmp_path / "out")
    found = judge(llama, records, out=tmp_path / "out", batch_size=2)
    assert found == read_records(tmp_path / "out") and found.rows == whole.rows
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }


def test_what_is_there_is_not_done_again(llama, tmp_path, monkeypatch, small_chunks):
    records = some_records(False)
    first = judge(llama, records, out=tmp_path)
    (tmp_path / "rows-000004.jsonl").unlink()
    asked = []
    real = judge_records._Runner.rows
    monkeypatch.setattr(judge_records._Runner, "rows", lambda self, some: asked.append(len(some)) or real(self, some))
    check_same(judge(llama, records, out=tmp_path, batch_size=5).rows, first.rows)
    assert asked == [2]


def test_a_folder_of_before_is_read_without_what_it_lacks_and_asked_again_for_it(llama, tmp_path):
    records = some_records(False)
    first = judge(llama, records, out=tmp_path)
    file = tmp_path / "rows-000000.jsonl"
    kept = file.read_bytes()
    rows = [{name: value for name, value in row.items() if name != "token_hits"} for row in first.rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = read_records(tmp_path)
    assert before.rows == [row | {"token_hits": []} for row in rows]
    lost = {cell for cell in first.summary if cell.endswith(("/exact_memorisation", "/extraction_strength"))}
    assert lost and before.summary == {cell: value for cell, value in first.summary.items() if cell not in lost}
    assert judge(llama, records, out=tmp_path) == first and file.read_bytes() == kept


def test_another_model_config_or_set_of_records_is_refused(tmp_path):
    records = some_records(True)
    records = [replace(r, modality="text", image=None) if i != 1 else r for i, r in enumerate(records)]
    model = tiny.tiny_qwen_vl()
    judge(model, records, out=tmp_path)
    kept = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def refused(what, records=records, **options):
        with pytest.raises(ArtefactError, match=f"holds a run with another {what}: found .*; give another folder"):
            judge(model, records, out=tmp_path, **options)
        assert kept == {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    refused("config", max_new_tokens=3)
    refused("data", records[:-1])
    refused("data", [*records[:-1], replace(records[-1], answer="7")])
    refused("data", [records[0], replace(records[1], image=Picture(b"77")), *records[2:]])
    path = NeuronPath({(mipfast.find_sites(model).text.name, layer): torch.arange(9) for layer in range(3)})
    with mipfast.prune(model, path, mode="activations"):
        refused("probe")
    model.model.language_model.norm.weight.data[0] += 1e-6
    refused("model")
    model.model.language_model.norm.weight.data[0] -= 1e-6


def test_a_damaged_or_foreign_folder_is_refused(llama, tmp_path):
    with pytest.raises(ArtefactError, match="no run.json of evaluate_records"):
        read_records(tmp_path)
    records = some_records(False)
    judge(llama, records, out=tmp_path)
    rows = tmp_path / "rows-000000.jsonl"
    rows.write_bytes(rows.read_bytes()[:-9])
    with pytest.raises(ArtefactError, match="rows-000000.jsonl is damaged .*remove it"):
        read_records(tmp_path)


def test_facts_lie_beside_the_results(llama, tmp_path):
    found = judge(llama, some_records(False), out=tmp_path, name="X")
    run = json.loads((tmp_path / "run.json").read_text())
    assert run == found.facts and run["config"]["max_new_tokens"] == NEW and run["seed"] is None
    assert {"torch", "mipfast", "transformers"} <= run["versions"].keys()
    lines = [json.loads(line) for line in (tmp_path / "rows-000000.jsonl").read_text().splitlines()]
    assert lines == found.rows and "Just give ONE letter" in lines[1]["prompt"]
    assert {p.name for p in tmp_path.iterdir()} == {"run.json", "rows-000000.jsonl", "X_EVAL.json", "X_SUMMARY.json"}


# ---------------------------------------------------------------------------------------------- what goes wrong


def test_out_of_memory_halves_the_batch_and_goes_on(llama, monkeypatch, caplog):
    records = some_records(False)
    whole = judge(llama, records)
    for name in ("forward", "generate"):
        real = getattr(llama, name)

        def small(*args, real=real, **inputs):
            if len(inputs["input_ids"]) > 2:
                raise torch.OutOfMemoryError("too large")
            return real(*args, **inputs)

        monkeypatch.setattr(llama, name, small)
    with caplog.at_level(logging.WARNING, "mipfast"):
        check_same(judge(llama, records, batch_size=8).rows, whole.rows)
    assert "batches of 4" in caplog.text and "batches of 2" in caplog.text and "batches of 1" not in caplog.text

    def none(*args, **inputs):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(llama, "forward", none)
    with pytest.raises(InputError, match=r"record \S+ of \S+ alone does not fit into memory"):
        judge(llama, records)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"answer": " "}, "its question, its answer or a wrong answer is blank"),
        ({"question": ""}, "is blank"),
        ({"perturbed": ("7", "")}, "is blank"),
        ({"task": "choice", "options": ("7", "8"), "answer": "9"}, "answer '9' is not the option .*'7', '8'"),
        ({"task": "choice", "options": ("7", "8"), "answer": "8", "letter": "A"}, "answer '8' is not the option"),
        ({"task": "choice", "answer": "9"}, "is not the option .*are \\[\\]"),
        ({"modality": "image"}, "its modality is image and its image None"),
        ({"image": Picture(b"1")}, "its modality is text and its image"),
        ({"id": "0/x"}, "two records of forget_5 have the id 0/x"),
    ],
)
def test_a_record_that_cannot_be_judged_is_named_before_anything_runs(llama, tmp_path, change, expected):
    first, second = (
        Record("0/x", "forget_5", "text", "cloze", "6 7", "8"),
        Record("3/x", "forget_5", "text", "cloze", "6 7", "8"),
    )
    with pytest.raises(InputError, match=expected) as caught:
        judge(llama, [first, replace(second, **change)], out=tmp_path / "out")
    assert ("0/x" if "id" in change else "record 3/x of forget_5") in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_other_things_that_cannot_be_judged(llama):
    with pytest.raises(InputError, match="no records"):
        judge(llama, [])
    for options in ({"batch_size": 0}, {"max_new_tokens": 0}):
        with pytest.raises(InputError, match="expected at least 1"):
            judge(llama, some_records(False), **options)
    with pytest.raises(ModelError, match="LlamaModel has no generate"):
        judge(llama.model, some_records(False))


def test_a_missing_library_is_missed_before_anything_runs(llama, monkeypatch):
    def missing(name):
        raise mipfast.MipfastError(f"needs {name}")

    monkeypatch.setattr(metrics, "_library", missing)
    monkeypatch.setattr(llama, "forward", None)
    with pytest.raises(mipfast.MipfastError, match="needs"):
        judge(llama, some_records(False))
