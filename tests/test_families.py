"""`mipfast.locate` on every supported transformers family, against `slow_reference.slow_locate` in float64.

Scores, paths and residuals are held to `test_locate.compare`'s 1e-9; the rows of every batch differ in length, and in
size or number of pictures, so a sample that got another's rows would show.
"""

from functools import cache

import pytest
import torch
from families import FAMILIES, Float64, build, pictures, text
from slow_reference import slow_locate
from test_locate import compare
from tiny import split

import mipfast

model = cache(build)
SEEING = [name for name, family in FAMILIES.items() if family.picture]
MODALITIES = [(name, "text") for name in FAMILIES] + [(name, "vision") for name in SEEING]
TOWERS = [(name, stack) for name in SEEING for stack in FAMILIES[name].stacks]
COARSE = dict(n_steps=2, top_k=3)


def same(name, batch, **settings):
    with Float64():
        found = mipfast.locate(model(name), batch, **COARSE, **settings)
        truth = slow_locate(model(name), batch, **COARSE, **settings)
    found.scores = found.scores.float()
    compare(found, truth)
    return found


@pytest.mark.parametrize("positions", ["last_prompt", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_text(name, positions):
    found = same(name, text(name), positions=positions)
    assert not found.report["layers_without_gradient"]


@pytest.mark.parametrize("positions", ["last_prompt", "prompt"])
@pytest.mark.parametrize("name", SEEING)
def test_text_with_pictures(name, positions):
    same(name, pictures(name, model(name)), positions=positions)


@pytest.mark.parametrize(("name", "stack"), TOWERS)
def test_vision(name, stack):
    found = same(name, pictures(name, model(name)), modality="vision", stack=stack)
    assert found.report["layers_without_gradient"] == list(FAMILIES[name].dead)
    assert (found.scores.amax(-1) > 0).sum(1).tolist() == [found.scores.shape[1] - len(FAMILIES[name].dead)] * 2


@pytest.mark.parametrize(("name", "modality"), MODALITIES)
def test_batched_is_one_by_one(name, modality):
    batch = pictures(name, model(name)) if name in SEEING else text(name)
    with Float64():
        found = mipfast.locate(model(name), batch, modality=modality, **COARSE)
        for i in range(2):
            alone = mipfast.locate(model(name), split(batch, i), modality=modality, **COARSE)
            torch.testing.assert_close(alone.scores[0], found.scores[i], rtol=1e-6, atol=1e-9)
            assert torch.equal(alone.path[0], found.path[i])
