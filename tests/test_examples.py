"""The example scripts run as they stand, on a tiny model that was taught their answers."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import stub_open_unlearning
import torch
from tiny import PAD, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mipfast import NeuronPath

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def pairs_of(script):
    scope = runpy.run_path(str(EXAMPLES / script))
    return [pair for name in ("FORGET", "REWORDED", "RETAIN") for pair in scope.get(name, [])]


def taught(folder, pairs):
    """A tiny Llama that answers every question right, with a tokenizer of whole words, as a transformers folder."""
    words = sorted({word for pair in pairs for word in " ".join(pair).split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    model = tiny_llama()
    model.resize_token_embeddings(len(vocabulary))
    rows = [tokenizer(f"{question} {answer}")["input_ids"] for question, answer in pairs]
    ids = torch.full((len(rows), max(map(len, rows))), PAD)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    last = torch.tensor([len(row) for row in rows]) - 1
    labels = torch.full_like(ids, -100).scatter(1, last[:, None], ids.gather(1, last[:, None]))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(40):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def test_own_model(tmp_path, monkeypatch, capsys):
    model, out = taught(tmp_path / "model", pairs_of("own_model.py")), tmp_path / "edited"
    run(monkeypatch, "own_model.py", "--model", model, "--out", out, "--device", "cpu")
    report = json.loads((out / "report.json").read_text())
    assert report["before"] == {"forget": 100, "reworded": 100, "retain": 100}
    assert report["after"]["forget"] <= 34 and report["after"]["retain"] >= 80
    losses = report["misdirect"]["forget_loss"]
    assert losses[-1] < 0.5 * losses[0]
    assert "forget 100.0 % right: Paris, Seine, France" in capsys.readouterr().out

    assert {layer for _, layer in NeuronPath.from_pretrained(out)} == {0, 1, 2}
    tokenizer, edited = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    question = tokenizer("What is the capital of Italy? Answer with one word.", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(edited(question).logits[0, -1].argmax()) == "Rome"


def test_own_loop(tmp_path, monkeypatch, capsys):
    model, out = taught(tmp_path / "model", pairs_of("own_loop.py")), tmp_path / "edited"
    run(monkeypatch, "own_loop.py", "--model", model, "--out", out)
    printed = capsys.readouterr().out
    losses = [float(found) for found in re.findall(r"forget loss ([\d.]+)", printed)]
    assert len(losses) == 11 and losses[-1] < 0.5 * losses[0]
    assert "before: 100 % of forget and 100 % of retain" in printed
    assert "after: 0 % of forget and 100 % of retain" in printed

    path = NeuronPath.from_pretrained(out)
    before, after = (dict(AutoModelForCausalLM.from_pretrained(f).named_parameters()) for f in (model, out))
    moved = {name: (p != before[name]).any(0).nonzero() for name, p in after.items() if (p != before[name]).any()}
    wanted = {f"{stack}.{layer}.mlp.down_proj.weight": index for (stack, layer), index in path.items()}
    assert moved.keys() == wanted.keys()
    for name, columns in moved.items():
        assert set(columns.flatten().tolist()) <= set(wanted[name].tolist())


@pytest.mark.parametrize("script", ["own_model.py", "own_loop.py"])
def test_what_cannot_be_done_is_said_in_a_line(script, tmp_path, monkeypatch, capsys):
    file, count = tmp_path / "a_file", {"own_model.py": "--epochs", "own_loop.py": "--steps"}[script]
    file.touch()
    wrong = [["--out", file], ["--out", tmp_path], ["--lr", "0.0"], ["--lr", "nan"], [count, "0"]]
    for arguments in wrong:  # refused before the model, which is none, is read
        with pytest.raises(SystemExit, match="^2$"):
            run(monkeypatch, script, "--model", tmp_path, *arguments)
        assert f"{arguments[0]} {arguments[1]}" in capsys.readouterr().err
    model = taught(tmp_path / "model", pairs_of(script))
    with pytest.raises(SystemExit, match="fraction=2.0; expected"):
        run(monkeypatch, script, "--model", model, "--out", tmp_path / "edited", "--fraction", "2")


def test_open_unlearning(tmp_path, monkeypatch):
    monkeypatch.chdir(stub_open_unlearning.write(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    stub_open_unlearning.forget_imports()
    run(monkeypatch, "open_unlearning.py", "--config-name=unlearn.yaml", "trainer=MIPEditor")
    stub_open_unlearning.forget_imports()
    assert (tmp_path / "ran.txt").read_text() == "MIPEditor ['--config-name=unlearn.yaml', 'trainer=MIPEditor']"
