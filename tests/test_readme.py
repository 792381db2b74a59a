"""The README's example and its lines for other libraries run as they stand, on tiny models; it stays short of numbers;
every link of every page leads somewhere."""

import re
from pathlib import Path

import pytest
import stub_open_unlearning
import torch
from tiny import text_batch, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

import mipfast

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert NAME in code
    words = sorted({word for text in re.findall(r'fact\("(.*?)"\)', code) for word in text.split()})
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path / "model")
    # its share of the neurons must be at least one of a layer
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words) + 1, intermediate_size=1024, **sizes))
    model.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    exec(code.replace(NAME, str(tmp_path / "model")), {})
    before, after = capsys.readouterr().out.splitlines()[-2:]
    assert before.startswith("before [") and after.startswith("after [")
    edited = LlamaForCausalLM.from_pretrained(tmp_path / "edited")
    moved = {
        name
        for (name, old), new in zip(model.named_parameters(), edited.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert moved == {f"model.layers.{i}.mlp.{part}_proj.weight" for i in (0, 1) for part in ("gate", "up", "down")}


def plug_in_lines():
    (table,) = re.findall(r"## Plug in\n(.*?)\n## ", README.read_text(), re.DOTALL)
    return {row.split("|")[1].strip(): row.split("|")[2].split("`")[1] for row in table.strip().splitlines()[2:]}


def test_every_library_has_a_line():
    assert list(plug_in_lines()) == [
        "transformers' `Trainer`",
        "open-unlearning",
        "Captum's arguments",
        "a loop of your own",
    ]


@pytest.mark.parametrize("library", plug_in_lines())
def test_the_lines_for_other_libraries_run(library, tmp_path, monkeypatch):
    monkeypatch.chdir(stub_open_unlearning.write(tmp_path / "open-unlearning"))
    monkeypatch.syspath_prepend("src")
    stub_open_unlearning.forget_imports()
    model = tiny_llama()
    batch, kept = text_batch(model, [9, 7], [2, 1], seed=0), text_batch(model, [8, 10], [1, 1], seed=1)
    sites = mipfast.find_sites(model)
    hidden = [mipfast.hidden_states(model, one, 2).detach().requires_grad_() for one in (batch, kept)]
    scope = {
        "mipfast": mipfast,
        "model": model,
        "batch": batch,
        "path": mipfast.NeuronPath({(sites.text.name, 1): torch.tensor([7, 2])}, sites.fingerprint()),
        "pairs": [{"forget": batch, "retain": kept}],
        "collate": lambda examples: examples[0],
        "args": TrainingArguments(
            "out", report_to=[], disable_tqdm=True, use_cpu=True, max_steps=1, save_strategy="no"
        ),
        "forget_hidden": hidden[0],
        "retain_hidden": hidden[1],
        "retain_before": hidden[1].detach(),
        "target": torch.ones(hidden[0].shape[-1]),
    }
    weight = model.model.layers[1].mlp.down_proj.weight.clone()
    exec(plug_in_lines()[library], scope)
    stub_open_unlearning.forget_imports()
    if library.startswith("transformers"):
        assert not torch.equal(model.model.layers[1].mlp.down_proj.weight, weight)
    elif library == "open-unlearning":
        assert Path("configs/trainer/MIPEditor.yaml").is_file()
    elif library.startswith("Captum"):
        assert scope["scores"].shape == (2, sites.text.num_layers, sites.text.num_neurons)
    else:
        scope["loss"].backward()
        assert hidden[0].grad.any()


def test_it_stays_short_of_numbers():
    text = re.sub(r"```.*?```", "", README.read_text(), flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    assert len(re.findall(r"\d[\d.,]*", text)) <= 200


def test_the_code_map_has_every_folder_and_its_files_are_there():
    (code,) = re.findall(r"## The code\n(.*?)\n## ", README.read_text(), re.DOTALL)
    for folder in (ROOT / "mipfast").glob("*/__init__.py"):
        assert f"  {folder.parent.name}/ " in code
    named = re.findall(r"(?:mipfast/)?((?:model|ops|scoring|edit|judge|experiment)/\w+\.py)", code)
    assert len(named) > 15
    for file in set(named) - {"ops/NAME.py", "edit/NAME.py"}:
        assert (ROOT / "mipfast" / file).is_file(), file


PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]
