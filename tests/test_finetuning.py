"""Fine-tuning: a plain folder that learned its answers, the same weights however often it was killed."""

import json
from dataclasses import replace

import pytest
import torch
import twins
from peft.tuners.lora import LoraModel
from transformers import AutoModelForImageTextToText, AutoTokenizer, Trainer

from mipfast import ArtefactError, DivergedError, InputError, MipfastError, data, errors
from mipfast.data import checkpoint
from mipfast.data.encoder import Encoder
from mipfast.experiment import finetune as finetuning
from mipfast.experiment.finetune import FinetuneConfig, finetune
from mipfast.judge import records as judge_records

CONFIG = FinetuneConfig(epochs=2, lr=1e-2, save_steps=2, rank=4)


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A random Qwen2.5-VL's folder."""
    return twins.write_family(tmp_path_factory.mktemp("qwen"), "qwen2.5-vl")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Three picture questions and the same in text."""
    folder = twins.write_mllmu(tmp_path_factory.mktemp("mllmu"), count=3)
    found = data.load_groups(folder / "train", ["ft_Data"], names=folder / "bench", limit=6)
    return [r for r in found if r.modality == "image"][:3] + [r for r in found if r.modality == "text"][:3]


@pytest.fixture(scope="module")
def trained(qwen, records, tmp_path_factory):
    return finetune(qwen, records, tmp_path_factory.mktemp("trained"), CONFIG, "cpu")


def weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").state_dict()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_lora_changes_the_language_model_s_linear_layers_alone(qwen, trained):
    before, after = weights(qwen), weights(trained)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = {n for n in before if ".language_model." in n and n.endswith("proj.weight")}
    assert changed == linear and len(linear) == 3 * 7
    assert all(torch.linalg.svdvals(after[name] - before[name])[4:].max() < 1e-5 for name in changed)  # rank 4


def test_the_folder_is_plain_and_encodes_as_its_source(qwen, trained):
    assert Encoder.from_pretrained(trained).fingerprint() == Encoder.from_pretrained(qwen).fingerprint()
    assert AutoTokenizer.from_pretrained(trained).chat_template == AutoTokenizer.from_pretrained(qwen).chat_template
    assert sorted(p.name for p in trained.parent.iterdir()) == ["model", "report.json", "run.json"]
    report = json.loads((trained.parent / "report.json").read_text())
    assert report["steps"] == 4 and report["config"]["lr"] == 1e-2 and report["versions"]["torch"]
    assert "base_model.model.model.language_model.layers.*.mlp.down_proj.lora_A.default.weight" in report["trained"]


@pytest.mark.parametrize("full", [False, True])
def test_it_learns_the_answers_and_to_stop(qwen, records, tmp_path, full):
    config = FinetuneConfig(full=full, steps=80, lr=3e-3 if full else 2e-2, batch_size=6, dropout=0.0)
    written = finetune(qwen, records, tmp_path, config, "cpu")
    model, encoder = checkpoint.load_model(written), Encoder.from_pretrained(written)
    judged = judge_records.evaluate_records(model, encoder, records, max_new_tokens=12)
    assert [row["text"] for row in judged.rows] == [record.answer for record in records]


@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [
        (Trainer, "training_step", 4),
        (Trainer, "save_model", 2),  # a second checkpoint begins
        (Trainer, "_save_rng_state", 2),  # and is not complete
        (LoraModel, "merge_and_unload", 1),  # after the last step
        (finetuning, "save_model", 1),
    ],
)
def test_killed_and_resumed_gives_the_same_weights(qwen, records, trained, tmp_path, monkeypatch, owner, name, at):
    calls, real = [], getattr(owner, name)

    def killing(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, killing)
    with pytest.raises(Killed):
        finetune(qwen, records, tmp_path / "out", CONFIG, "cpu")
    assert not (tmp_path / "out" / "model").exists()
    written = finetune(qwen, records, tmp_path / "out", CONFIG, "cpu")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["resumed"]
    assert same(weights(written), weights(trained))
    assert sorted(p.name for p in written.parent.iterdir()) == ["model", "report.json", "run.json"]


def test_a_finished_run_says_so_and_another_is_refused(qwen, records, trained, monkeypatch, caplog):
    monkeypatch.setattr(finetuning, "_arguments", None)
    with caplog.at_level("INFO", "mipfast"):
        assert finetune(qwen, records, trained.parent, CONFIG, "cpu") == trained
    assert "is finished" in caplog.text
    with pytest.raises(ArtefactError, match="another config: found {'lr': 0.01}, this run has {'lr': 0.1}"):
        finetune(qwen, records, trained.parent, replace(CONFIG, lr=0.1), "cpu")
    with pytest.raises(ArtefactError, match="another data"):
        finetune(qwen, records[:2], trained.parent, CONFIG, "cpu")


def test_gradient_checkpointing_changes_no_weight(qwen, records, trained, tmp_path):
    written = finetune(qwen, records, tmp_path, replace(CONFIG, gradient_checkpointing=True), "cpu")
    for name, value in weights(trained).items():
        torch.testing.assert_close(weights(written)[name], value, rtol=1e-3, atol=1e-5)


def test_a_model_that_gets_no_gradient_is_refused(qwen, records, tmp_path, monkeypatch):
    """Adapters whose outputs are cut off: every loss looks as it should."""
    real = finetuning._with_adapters

    def cut(model, config):
        model = real(model, config)
        model.lm_head.register_forward_pre_hook(lambda head, args: (args[0].detach().requires_grad_(),))
        return model

    monkeypatch.setattr(finetuning, "_with_adapters", cut)
    with pytest.raises(InputError, match="no gradient reaches any of 42 trainable tensors"):
        finetune(qwen, records, tmp_path, CONFIG, "cpu")


def test_a_loss_that_is_not_finite_stops_the_run(qwen, records, tmp_path):
    with pytest.raises(DivergedError, match="the loss of step .* is nan; lower lr"):
        finetune(qwen, records, tmp_path, FinetuneConfig(full=True, steps=6, lr=1e30), "cpu")


def test_weights_keep_their_dtype_and_bfloat16_computes(qwen, records, tmp_path):
    model = checkpoint.load_model(qwen, dtype="bfloat16")
    checkpoint.save_model(model, qwen, tmp_path / "half")
    for full in (False, True):
        config = FinetuneConfig(full=full, steps=2, bf16=True, lr=1e-2)
        written = finetune(tmp_path / "half", records, tmp_path / str(full), config, "cpu")
        assert {value.dtype for value in weights(written).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"steps": 0}, "steps=0; expected at least 1"),
        ({"rank": 0}, "rank=0; expected at least 1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_settings_that_cannot_be_used(qwen, records, tmp_path, change, found):
    with pytest.raises(InputError, match=found):
        finetune(qwen, records, tmp_path, replace(CONFIG, **change), "cpu")


def test_missing_libraries_name_the_extra(qwen, records, tmp_path, monkeypatch):
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == "peft" else True)
    with pytest.raises(MipfastError, match=r"needs peft; run: pip install 'mipfast\[train\]'"):
        finetune(qwen, records, tmp_path, CONFIG, "cpu")
    with pytest.raises(InputError, match="no records"):
        finetune(qwen, [], tmp_path, replace(CONFIG, full=True), "cpu")
    with pytest.raises(InputError, match="device='cuda:1'"):
        finetune(qwen, records, tmp_path, replace(CONFIG, full=True), "cuda:1")


def test_an_end_token_is_labelled_where_a_batch_asks_for_it(qwen, records):
    encoder = Encoder.from_pretrained(qwen)
    plain, ended = encoder.batch(records), encoder.batch(records, end=True)
    for i in range(len(records)):
        first, second = plain["labels"][i], ended["labels"][i]
        scored = second[second >= 0].tolist()
        assert scored == [*first[first >= 0].tolist(), encoder.tokenizer.eos_token_id]
        at = (second >= 0).nonzero()[-1]
        assert ended["input_ids"][i, at] == encoder.tokenizer.eos_token_id and ended["attention_mask"][i, at] == 1
    encoder.tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end token"):
        encoder.batch(records, end=True)


def test_a_hub_s_model_is_written_with_its_companions_from_the_cache(qwen, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: asked.update(options) or str(qwen))
    checkpoint.save_model(checkpoint.load_model(qwen), "someone/model", tmp_path)
    assert {"tokenizer*", "*processor_config.json", "chat_template*"} <= set(asked["allow_patterns"])
    assert not {"*", "*.json"} & set(asked["allow_patterns"])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in qwen.iterdir())
