"""On a real pretrained model, SmolLM2-135M-Instruct (dequantised 4-bit weights): `make real` gets it and runs these."""

import json
import os
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench" / "real"))
import converge  # noqa: E402

from mipfast import locate  # noqa: E402

FOLDER = Path(os.environ.get("MIPFAST_REAL", ROOT / ".real" / "SmolLM2-135M-Instruct"))
pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(not (FOLDER / "config.json").is_file(), reason=f"no real model in {FOLDER}; `make real`"),
]


@cache
def smol():
    return converge.load(str(FOLDER))


def prompts(*which):
    every = json.loads(converge.PROMPTS.read_text())
    return converge.batch_of(smol()[1], [every[i] for i in which])


def test_tol_holds_and_the_estimate_is_above_the_error():
    model, _ = smol()
    truth = locate(model, prompts(0), method="substituted", n_steps=96, residuals="none")
    row = converge.measure(model, prompts(0), 0.01, truth, 96)
    error, estimate = torch.tensor(row["error"]), torch.tensor(row["estimate"])
    assert (error <= 0.02).all() and (estimate <= 0.01).all()
    assert (estimate >= error).double().mean() >= 0.95
    assert row["row_block_passes"] <= 20_000 and torch.tensor(row["jaccard"]).mean() > 0.95
    four = locate(model, prompts(0), n_steps=4)
    assert converge.relative(four.scores, truth.scores)[0, 0] > 0.2  # what few nodes give in the first layer


def test_a_batch_gets_the_scores_that_its_samples_get():
    """Different lengths, one batch: nodes of their own, rows shared."""
    model, _ = smol()
    found = locate(model, prompts(0, 20), search="pointwise", tol=0.01)
    for i, which in enumerate((0, 20)):
        alone = locate(model, prompts(which), search="pointwise", tol=0.01)
        off = converge.relative(found.scores[i : i + 1], alone.scores)
        assert off.max() < 1e-3
