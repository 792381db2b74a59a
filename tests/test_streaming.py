"""Locating over a file: equal to locate, the same bits however often it was killed, and every way to be refused."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from commands import invoke
from dying import dying

import mipfast
from mipfast import Attribution, InputError, LocateConfig, NeuronPath, cli, files
from mipfast.data import Record, checkpoint, read_lines
from mipfast.data.encoder import Encoder
from mipfast.demo import people
from mipfast.experiment import locate_file

DEMO = Path(cli.__file__).parent / "demo" / "weights" / "base"
BATCH = 4
WORDS = "who where what is was the of a an red green blue house river king queen small large old".split()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(locate_file, "CHUNK", 2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a tiny Llama and a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    tiny.tiny_llama().save_pretrained(folder)
    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """20 samples of unequal lengths: chunks of 8, 8 and 4."""
    rng = random.Random(0)

    def words(low, high):
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    return write(tmp_path_factory.mktemp("data"), [{"prompt": words(3, 9), "answer": words(1, 3)} for _ in range(20)])


@pytest.fixture(scope="module")
def mixed_file(tmp_path_factory):
    """The demo's questions, every second one about a picture."""
    world, folder = people.build(), tmp_path_factory.mktemp("mixed")
    rows = []
    for kind in ("text", "image"):
        for i, q in enumerate([q for q in world.questions if q.modality == kind and q.subject is not None][:80:8]):
            start = "<|im_start|> <|vision_start|> <|image_pad|> <|vision_end|>" if q.pictures else "<|im_start|>"
            row = {"prompt": f"{start} {q.text} <|im_end|>", "answer": q.answer}
            if q.pictures:
                world.pictures[q.pictures[0]].save(folder / f"{i}.png")
                row["image"] = f"{i}.png"
            rows.append(row)
    return write(folder, [row for pair in zip(rows[:10], rows[10:], strict=True) for row in pair])


def write(folder, rows, name="data.jsonl"):
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def ask(prompt, answer, image=None):
    return Record("1", "data", "image" if image else "text", "generation", prompt, answer, image=image)


def load(folder, dtype="float32"):
    return checkpoint.load_model(folder, dtype=dtype), Encoder.from_pretrained(folder)


def run(folder, data, out, config=None, **options):
    locate_file.locate_file(*load(folder), data, out, config, **{"batch_size": BATCH, **options})
    return locate_file.read(out)


def command(*arguments):
    return invoke(["locate", *arguments])


def same(first, second):
    return (
        torch.equal(first.scores, second.scores)
        and torch.equal(first.path, second.path)
        and first.report == second.report
    )


# ---------------------------------------------------------------------------------------------- equal to locate


def test_text_equals_locate_in_the_file_s_order(llama, text_file, tmp_path):
    found = run(llama, text_file, tmp_path / "out")
    model, encoder = load(llama)
    for i, sample in enumerate(read_lines(text_file)):
        alone = mipfast.locate(model, encoder.batch([encoder.encode(sample)]))
        torch.testing.assert_close(found.scores[i], alone.scores[0], rtol=1e-4, atol=1e-5 * alone.scores.abs().max())
        assert found.report["num_labels"][i] == len(sample.answer.split()) == alone.report["num_labels"][0]
        if measured := found.report["residuals"][i]:
            assert measured == pytest.approx(alone.report["residuals"][0], abs=1e-3)
    assert found.scores.shape == (20, 4, 48) and i == 19


def test_subjects_of_a_file(llama, text_file, tmp_path):
    """Pairs of words, against explicit positions: through Python, and through the command line."""
    rows, places = [json.loads(line) for line in text_file.read_text().splitlines()[:10]], []
    for i, row in enumerate(rows):
        words = row["prompt"].split()
        pairs = list(zip(words, words[1:], strict=False))
        row["subject"] = " ".join(pairs[i % len(pairs)])
        places.append(len(pairs) - 1 - pairs[::-1].index(pairs[i % len(pairs)]))
    data, config = write(tmp_path, rows), LocateConfig(positions="subject", search="pointwise", n_steps=2)
    found = run(llama, data, tmp_path / "out", config)
    model, encoder = load(llama)
    for sample, scores, at in zip(read_lines(data), found.scores, places, strict=True):
        alone = mipfast.locate(model, encoder.batch([sample]), replace(config, positions=[at, at + 1])).scores[0]
        torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-5 * alone.abs().max())
    options = "--positions subject --search pointwise --n-steps 2 --dtype float32 --device cpu --batch-size 4"
    result = command("--model", llama, "--data", data, "--out", tmp_path / "again", *options.split())
    assert result.exit_code == 0, result.output
    assert same(locate_file.read(tmp_path / "again"), found)


def test_a_line_without_the_subject_that_positions_need(llama, tmp_path, monkeypatch):
    rows = [{"prompt": "who is the king", "answer": "a", "subject": "the king"}, {"prompt": "who", "answer": "a"}]
    data = write(tmp_path, [*rows, rows[1] | {"subject": None}])
    assert [record.subject for record in read_lines(data)] == ["the king", "", ""]
    run(llama, data, tmp_path / "plain", LocateConfig(n_steps=1))
    monkeypatch.setattr(locate_file, "locate", None)
    with pytest.raises(InputError, match="data.jsonl, line 2: it has no subject; expected the words of the question"):
        run(llama, data, tmp_path / "out", LocateConfig(positions="subject"))
    data = write(tmp_path, [rows[0] | {"subject": "the queen"}])
    with pytest.raises(InputError, match="line 1: its subject 'the queen' is not in 'who is the king'; expected words"):
        run(llama, data, tmp_path / "out", LocateConfig(positions="subject"))


@pytest.mark.parametrize("modality", ["text", "vision"])
def test_the_demo_model_equals_locate_on_the_same_batches(mixed_file, tmp_path, monkeypatch, modality):
    """Bit for bit. In text pictures and plain text never share a batch; the picture is the demo's own encoding."""
    monkeypatch.setattr(locate_file, "CHUNK", 8)  # one chunk: its sort is the file's
    data = mixed_file
    if modality == "vision":
        rows = [row for row in mixed_file.read_text().splitlines() if "image" in row]
        data = write(mixed_file.parent, rows, "pictures.jsonl")
    config = LocateConfig(modality=modality)
    found = run(DEMO, data, tmp_path / "out", config, batch_size=4)
    model, encoder = load(DEMO)
    encoded = [encoder.encode(sample) for sample in read_lines(data)]
    batches = []
    for pictures in (False, True):
        kind = sorted((s for s in encoded if bool(s.image) == pictures), key=lambda s: (len(s.prompt), len(s.answer)))
        batches += [kind[i : i + 4] for i in range(0, len(kind), 4)]
    expected = mipfast.locate(model, [encoder.batch(batch) for batch in batches], config)
    index = [int(sample.id) - 1 for batch in batches for sample in batch]
    assert torch.equal(found.scores[index], expected.scores) and torch.equal(found.path[index], expected.path)
    assert [found.report["residuals"][i] for i in index] == expected.report["residuals"]
    assert sorted(index) == list(range(len(found.scores))) == list(range(20 if modality == "text" else 10))
    assert encoder.batch(encoded[-1:])["pixel_values"].shape == (16, 1176)


def test_a_picture_without_placeholder_comes_before_the_prompt(mixed_file):
    encoder = Encoder.from_pretrained(DEMO)
    picture = next(s.image for s in read_lines(mixed_file) if s.image)
    ids = encoder.encode(ask("Name the pet of this person .", "dog", picture)).prompt
    assert ids[:6] == [3, 5, 5, 5, 5, 4] and 5 not in ids[6:]
    with pytest.raises(InputError, match="2 image placeholders; expected one"):
        encoder.encode(ask("<|image_pad|> and <|image_pad|>", "dog", picture))


def test_chat_templates(mixed_file):
    encoder = Encoder.from_pretrained(DEMO)
    turn = "{% for m in messages %}<|im_start|> {% if m.content is string %}{{ m.content }}{% else %}"
    parts = (
        "{% for c in m.content %}{% if c.type == 'image' %}<|image_pad|>{% else %}{{ c.text }}{% endif %} {% endfor %}"
    )
    encoder.tokenizer.chat_template = turn + parts + "{% endif %} <|im_end|>{% endfor %}"
    plain = encoder.encode(ask("Name the pet", "dog"))
    assert plain.prompt[0] == 1 and plain.prompt[-1] == 2 and len(plain.prompt) == 5 and len(plain.answer) == 1
    picture = next(s.image for s in read_lines(mixed_file) if s.image)
    assert encoder.encode(ask("Name the pet", "dog", picture)).prompt[:5] == [1, 5, 5, 5, 5]
    encoder.tokenizer.chat_template = "{% for m in messages %}" + parts + "{% endfor %}"  # shows parts only
    assert encoder.encode(ask("Name the pet", "dog")).prompt == plain.prompt[1:-1]
    encoder.tokenizer.chat_template = "nothing"
    with pytest.raises(InputError, match="does not show the prompt"):
        encoder.encode(ask("Name the pet", "dog"))


def test_aggregate_selects_what_the_samples_select(llama, text_file, tmp_path):
    every, sums = run(llama, text_file, tmp_path / "a"), run(llama, text_file, tmp_path / "b", aggregate=True)
    per_label = every.scores / torch.tensor(every.report["num_labels"])[:, None, None]
    scale = per_label.abs().max()
    assert (sums.scores.mean(0) - per_label.mean(0)).abs().max() < 1e-6 * scale
    assert (sums.scores.square().mean(0) - per_label.square().mean(0)).abs().max() < 1e-6 * scale**2
    for how in ("mean", "contrast", "snr", "union"):
        paths = [NeuronPath.select(a, per_layer=5, aggregate=how, retain=a) for a in (every, sums)]
        for key, chosen in paths[0].items():
            assert set(chosen.tolist()) == set(paths[1][key].tolist()), (how, key)
    assert sums.report["aggregate"]["samples"] == 20 and len(list((tmp_path / "b").iterdir())) == 2
    sums.save_pretrained(tmp_path / "saved")
    assert same(Attribution.from_pretrained(tmp_path / "saved"), sums)


@pytest.mark.parametrize("aggregate", [False, True])
def test_a_folder_of_before_errors_were_kept_is_read_without(llama, text_file, tmp_path, monkeypatch, aggregate):
    save = locate_file._save

    def as_before(path, tensors, *facts):
        save(path, {name: tensor for name, tensor in tensors.items() if name != "error"}, *facts)

    whole = run(llama, text_file, tmp_path / "whole", aggregate=aggregate, limit=3)
    monkeypatch.setattr(locate_file, "_save", as_before)
    found = run(llama, text_file, tmp_path / "out", aggregate=aggregate, limit=3)
    assert torch.equal(found.scores, whole.scores) and found.error.shape == whole.error.shape
    assert found.error.isnan().all() and not whole.error.isnan().any() and found.report["unconverged"] == []


# ---------------------------------------------------------------------------------------------- stopped and resumed


@pytest.mark.parametrize("aggregate", [False, True])
@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_stopped_at_every_write_and_resumed_gives_the_same_bits(
    llama, text_file, tmp_path, monkeypatch, aggregate, moment
):
    """Every run dies at its first write right after the rename, or at its second before it, leaving the temporary file
    whole or cut in half."""
    whole = run(llama, text_file, tmp_path / "whole", aggregate=aggregate)
    rename, writes, stops = os.replace, [], 0

    while True:
        writes.clear()
        try:
            with monkeypatch.context() as patch:
                patch.setattr(files.os, "replace", partial(dying, rename, writes, moment))
                locate_file.locate_file(
                    *load(llama), text_file, tmp_path / "out", batch_size=BATCH, aggregate=aggregate
                )
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == (4 if moment == "after" else 3)  # run.json and three chunks
    assert same(locate_file.read(tmp_path / "out"), whole)
    assert not list((tmp_path / "out").glob(".*"))


def test_a_finished_folder_says_so(llama, text_file, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "mipfast")
    model, encoder = load(llama)
    locate_file.locate_file(model, encoder, text_file, tmp_path, batch_size=BATCH, limit=3)
    monkeypatch.setattr(locate_file, "_locate_chunk", None)
    locate_file.locate_file(model, encoder, text_file, tmp_path, batch_size=BATCH, limit=3)
    assert "all 3 samples are there, nothing left to do" in caplog.text


def test_an_unfinished_folder_is_not_read(llama, text_file, tmp_path, monkeypatch):
    real, calls = locate_file.locate, []

    def twice(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    for name in ("a", "b"):
        calls.clear()
        monkeypatch.setattr(locate_file, "locate", twice)
        with pytest.raises(KeyboardInterrupt):
            run(llama, text_file, tmp_path / name, aggregate=name == "b")
        with pytest.raises(mipfast.ArtefactError, match="holds 16 of 20 samples; run the same"):
            locate_file.read(tmp_path / name)
        calls.extend([1, 1])  # no third call any more: what was done is not done again
        locate_file.locate_file(*load(llama), text_file, tmp_path / name, batch_size=BATCH, aggregate=name == "b")
        assert len(calls) == 6


def test_sigkill_and_resume_through_the_command_line(llama, text_file, tmp_path):
    arguments = ["--model", llama, "--data", text_file, "--batch-size", BATCH, "--device", "cpu"]
    slow = """
import sys, time
from mipfast import cli
from mipfast.experiment import locate_file
real, locate_file.CHUNK = locate_file.locate, 2
locate_file.locate = lambda *a: (time.sleep(0.3), real(*a))[1]
cli.app(sys.argv[1:])
"""
    out = tmp_path / "out"
    line = [sys.executable, "-c", slow, "locate", *map(str, arguments), "--out", str(out)]
    process = subprocess.Popen(line, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not list(out.glob("shard-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(list(out.glob("shard-*"))) < 3
    result = command(*arguments, "--out", out)
    assert result.exit_code == 0 and "mipfast.streaming.read" in result.output
    assert same(locate_file.read(out), run(llama, text_file, tmp_path / "whole"))


# ---------------------------------------------------------------------------------------------- refused


def test_another_model_file_or_config_is_refused(llama, text_file, tmp_path):
    run(llama, text_file, tmp_path / "out", limit=3)
    model, encoder = load(llama)
    out, kept = tmp_path / "out", {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def refused(what, model=model, data=text_file, config=None, **options):
        expected = rf"holds a run with another {what}: found .*, this run has .*; give another"
        with pytest.raises(mipfast.ArtefactError, match=expected):
            locate_file.locate_file(model, encoder, data, out, config, **{"batch_size": BATCH, "limit": 3, **options})

    refused("config", config=LocateConfig(top_k=4))
    refused("config", config=LocateConfig(positions=[0, 1]))
    refused("batch_size", batch_size=3)
    refused("aggregate", aggregate=True)
    refused("samples", limit=4)
    lines = text_file.read_text().splitlines()
    refused("data", data=write(tmp_path, [*lines[:-1], lines[0]]))
    encoder.tokenizer.chat_template = "{{ messages[0].content }}"
    refused("encoder")
    encoder.tokenizer.chat_template = None
    refused("dtype", model=checkpoint.load_model(llama, dtype="bfloat16"))
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1.5)
    refused("model")
    assert kept == {p.name: p.read_bytes() for p in out.iterdir()}


def test_a_damaged_folder_is_refused(llama, text_file, tmp_path):
    with pytest.raises(mipfast.ArtefactError, match="run.json is missing"):
        locate_file.read(tmp_path)
    for aggregate, name in ((False, "shard-000000.safetensors"), (True, locate_file.AGGREGATE)):
        out = tmp_path / name
        run(llama, text_file, out, aggregate=aggregate, limit=3)
        (out / name).write_bytes((out / name).read_bytes()[:-8])
        with pytest.raises(mipfast.ArtefactError, match="is damaged .*remove it and run the same"):
            locate_file.read(out)
    (out / "run.json").write_text("{")
    with pytest.raises(mipfast.ArtefactError, match="remove the folder"):
        run(llama, text_file, out)


@pytest.mark.parametrize(
    "line, found",
    [
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("[1]", "found list instead of an object"),
        ({"prompt": "who"}, "found keys prompt"),
        ({"prompt": "who", "answer": "a", "picture": "x.png"}, "found keys prompt, answer, picture"),
        ({"prompt": "who", "answer": "a", "subject": " "}, "found subject=' '; it must be a text"),
        ({"prompt": "who", "answer": "a", "subject": 3}, "found subject=3; it must be a text"),
        ({"prompt": "who", "answer": 3}, "found answer=3"),
        ({"prompt": " ", "answer": "a"}, "found prompt=' '"),
        ({"prompt": "who", "answer": "a", "image": "x.png"}, "there is no image .*x.png"),
        ({"prompt": "a " * 300, "answer": "a"}, "301 tokens; the model takes 256"),
        ({"prompt": "who", "answer": "a", "image": "data.jsonl"}, "pictures for llama cannot be encoded"),
    ],
)
def test_a_malformed_line_is_named_before_anything_runs(llama, tmp_path, monkeypatch, line, found):
    monkeypatch.setattr(locate_file, "locate", None)
    data = write(tmp_path, [{"prompt": "who", "answer": "a"}, line])
    with pytest.raises(InputError, match=f"data.jsonl, line 2: .*{found}"):
        run(llama, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_files_that_cannot_be_used(llama, mixed_file, tmp_path):
    with pytest.raises(InputError, match="cannot read .*No such file"):
        run(llama, tmp_path / "none.jsonl", tmp_path / "out")
    with pytest.raises(InputError, match="is empty; expected one object a line"):
        run(llama, write(tmp_path, []), tmp_path / "out")
    with pytest.raises(InputError, match='line 1: modality vision scores pictures; expected an "image"'):
        run(DEMO, mixed_file, tmp_path / "out", LocateConfig(modality="vision"))
    (tmp_path / "broken.png").write_text("no picture")
    row = {"prompt": "What", "answer": "dog", "image": "broken.png"}
    with pytest.raises(InputError, match="line 1: .*broken.png cannot be read as a picture"):
        run(DEMO, write(tmp_path, [row]), tmp_path / "out")
    with pytest.raises(mipfast.ModelError, match="gives no AutoConfig .*; expected a transformers folder"):
        load(tmp_path)


def test_an_error_while_locating_names_the_lines(llama, text_file, tmp_path):
    model, encoder = load(llama)
    model.model.layers[2].mlp.down_proj.weight.data.fill_(torch.inf)
    with pytest.raises(mipfast.DivergedError, match=r"data.jsonl, a batch of lines (\d+, ){3}\d+: "):
        locate_file.locate_file(model, encoder, text_file, tmp_path / "out", batch_size=BATCH)


def test_the_bar_knows_of_long_samples_to_come(llama, tmp_path, monkeypatch):
    """16 answers of one word, then 8 of twenty: two thirds of the samples are far less than two thirds of the work."""
    short, long = ({"prompt": "who is the king", "answer": " ".join(["red"] * n)} for n in (1, 20))
    data = write(tmp_path, [short] * 16 + [long] * 8)
    steps = []

    class Bar(locate_file.tqdm):
        def update(self, n=1):
            super().update(n)
            steps.append((self.n / self.total, self.postfix))

    monkeypatch.setattr(locate_file, "tqdm", partial(Bar, file=io.StringIO()))
    config = LocateConfig(progress=True)
    run(llama, data, tmp_path / "out", config)
    shares, notes = zip(*steps, strict=True)
    assert shares[3] < 1 / 3 and shares[-1] == pytest.approx(1)
    assert notes[3].startswith("16/24 samples") and notes[-1].endswith("samples/s")
    (tmp_path / "out" / "shard-000002.safetensors").unlink()
    steps.clear()
    run(llama, data, tmp_path / "out", config)
    assert [share for share, _ in steps] == pytest.approx(shares[4:]) and steps[0][1].startswith("20/24 samples")


# ---------------------------------------------------------------------------------------------- dry run and command


def test_dry_run_shows_the_cost_and_runs_nothing(llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_model", None)
    arguments = ["--model", llama, "--data", text_file, "--out", tmp_path / "out", "--dry-run", "--limit", 10]
    result = command(*arguments)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    assert result.exit_code == 0 and not (tmp_path / "out").exists()
    for row in ("samples", "tokens", "PFLOP", "memory", "time on this machine", "time on H100", "time on H200"):
        assert row in shown
    encoder = Encoder.from_pretrained(llama)
    surveyed = locate_file.survey(encoder, text_file, LocateConfig(), limit=10)
    encoded = [encoder.encode(s) for s in read_lines(text_file, 10)]
    assert (surveyed.samples, surveyed.tokens) == (10, sum(s.tokens for s in encoded))
    assert (
        len(surveyed.chunks) == 1
        and str(surveyed.tokens) in shown
        and sum(count * size[0] for chunk in surveyed.chunks for size, count in chunk.items()) == 10
    )


def test_the_command_line_s_options_reach_the_config(mixed_file, tmp_path):
    options = "--positions 0,1 --n-steps 1 --top-k 2 --objective log_odds --limit 2 --dtype float32 --device cpu"
    options += " --layers 0 1"
    result = command("--model", DEMO, "--data", mixed_file, "--out", tmp_path, *options.split(), "--aggregate")
    assert result.exit_code == 0, result.output
    config = locate_file.read(tmp_path).report["config"]
    assert config["layers"] == locate_file.read(tmp_path).layers == [0, 1]
    assert config["positions"] == [0, 1] and config["n_steps"] == 1 and config["objective"] == "log_odds"
    wrong = command("--model", DEMO, "--data", mixed_file, "--out", tmp_path, "--modality", "sound")
    assert wrong.exit_code == 2 and all(word in wrong.output for word in ("--modality", "'sound'", "text", "vision"))
    assert command("--model", DEMO, "--data", mixed_file, "--out", tmp_path, "--dtype", "int8").exit_code == 2
