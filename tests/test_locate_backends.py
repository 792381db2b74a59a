"""Every usable backend gives `locate` the same scores and path.

Triton runs here on a GPU, or on the CPU when TRITON_INTERPRET=1 (which tests/test_interpreter.py sets).
"""

import pytest
import torch
from tiny import image_batch, text_batch, tiny_qwen_vl, unchecked_route

from mipfast import locate, ops
from mipfast.ops import backends
from mipfast.scoring import search

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", [name for name, usable, _ in backends.status() if usable and name != "reference"])
@pytest.mark.parametrize("modality", ["text", "vision"])
def test_backends_agree_through_locate(name, modality, monkeypatch):
    model = tiny_qwen_vl().to(DEVICE)
    batch = text_batch(model, [9, 7], [2, 1]) if modality == "text" else image_batch(model, 2, size=[56, 84])
    batch = {key: value.to(DEVICE) for key, value in batch.items()}
    with ops.backend("reference"):
        want = locate(model, batch, modality=modality)
    calls = []
    monkeypatch.setattr(search, "_check_route", unchecked_route)
    real = ops.project_accumulate
    monkeypatch.setattr(ops, "project_accumulate", lambda *a, **k: calls.append(1) or real(*a, **k))
    with ops.backend(name):
        found = locate(model, batch, modality=modality)
    assert len(calls) % found.scores.shape[1] == 0 < len(calls), "every layer of locate asks this op"
    off = (found.scores - want.scores).abs().amax(-1)
    assert (off <= 1e-5 * want.scores.abs().amax(-1)).all()
    assert torch.equal(found.path, want.path)
