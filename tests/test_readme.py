"""The README's example runs as it stands, on a tiny model saved to a folder; every link leads somewhere."""

import re
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama

from mipfast.demo import model as demo_model
from mipfast.demo import people

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_example_for_one_s_own_model_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert "Qwen/Qwen2.5-0.5B-Instruct" in code
    tokenizer = demo_model.build_tokenizer(people.build(0))
    model = tiny_llama()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(code.replace("Qwen/Qwen2.5-0.5B-Instruct", str(tmp_path / "model")), scope)
    assert (tmp_path / "edited" / "model.safetensors").exists() and (tmp_path / "edited" / "path.json").exists()
    edited = type(model).from_pretrained(tmp_path / "edited")
    assert any(not torch.equal(a, b) for a, b in zip(edited.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("page", [README, *sorted((README.parent / "docs").rglob("*.md"))], ids=lambda page: page.name)
def test_relative_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]
