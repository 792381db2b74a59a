"""The examples in docstrings run, and what is public has one."""

import doctest
import importlib
import inspect
import logging
from pathlib import Path

import pytest

import mipfast
from mipfast import ops

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = [path for path in sorted((ROOT / "mipfast").rglob("*.py")) if ">>> " in path.read_text()]
PUBLIC = [
    *(getattr(mipfast, name) for name in mipfast.__all__ if name not in ("__version__", "attacks", "baselines", "ops")),
    *(getattr(ops, name) for name in ops.__all__),
]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # the command line, where a test called it, left a handler that prints
    monkeypatch.setattr(logging.root, "handlers", [logging.NullHandler()])
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    failed, tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert tried and not failed


@pytest.mark.parametrize("public", [one for one in PUBLIC if inspect.isfunction(one)], ids=lambda one: one.__name__)
def test_a_public_function_says_what_it_takes_and_gives(public):
    text = inspect.getdoc(public) or ""
    assert ">>> " in text and "Args:" in text, "expected sections Args, Returns, Raises, Example"
    assert not inspect.signature(public).return_annotation or "Returns:" in text or "Yields:" in text
