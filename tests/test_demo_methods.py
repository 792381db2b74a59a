"""Every method of the demo: what its edit touches, that nothing of it stays, and that its setting is the best tried."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from bench_evidence import cells

from mipfast import InputError
from mipfast.demo import run
from mipfast.demo import trial as trials
from mipfast.demo.trial import ROWS, SETTINGS, Setting, Trial

TUNING = Path(__file__).parents[1] / "bench" / "results" / "demo_tuning.json"
EDITED = [row for row in ROWS if ROWS[row].edit]


@pytest.fixture(scope="module")
def trial():
    """Few scored questions, and edits of two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "STEPS", 2)
        patch.setattr(trials, "LOCATE_FORGET", 4)
        patch.setattr(trials, "LOCATE_RETAIN", 4)
        model, encoder = run.load_base()
        trial = Trial(model, encoder, encoder.world.split(1), 1, progress=False)
        trial.locate()
        yield trial


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("row", EDITED)
def test_an_edit_does_its_work_and_leaves_no_trace(trial, row):
    before, flags = weights(trial.model), [p.requires_grad for p in trial.model.parameters()]
    with trial.edited(row, SETTINGS[row]) as (path, report):
        inside = weights(trial.model)
        assert inside.keys() == before.keys(), "an adapter is still there"
        assert any(not torch.equal(tensor, before[name]) for name, tensor in inside.items())
        assert report["steps"] == (0 if row == "MANU" else 2)
        assert bool(path) == (ROWS[row].stage == "RMisU" and row != "plain RMU" or row == "MANU")
    after = weights(trial.model)
    assert after.keys() == before.keys() and all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert [p.requires_grad for p in trial.model.parameters()] == flags


@pytest.mark.parametrize("row", ["MIP", "MIP down", "MIP LoRA", "random", "least", "IGI only", "IFI only"])
def test_a_path_is_all_that_an_edit_changes(trial, row):
    before = weights(trial.model)
    with trial.edited(row, SETTINGS[row]) as (path, _):
        left = weights(trial.model)
        for (stack, layer), index in path.items():
            block = f"{stack}.{layer}.mlp."
            for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
                if f"{block}{name}.bias" in left and dim == 0:
                    left[f"{block}{name}.bias"][index] = before[f"{block}{name}.bias"][index]
                if row != "MIP down" or dim == 1:
                    whole = f"{block}{name}.weight"
                    assert not torch.equal(left[whole], before[whole])
                    left[whole].index_copy_(dim, index, before[whole].index_select(dim, index))
    for name, tensor in left.items():
        assert torch.equal(tensor, before[name]), name


def test_every_choice_has_the_budget_of_mip_and_least_are_the_scores_nearest_zero(trial):
    located, random, least = (trial.edit_path(row, 0.1) for row in ("MIP", "random", "least"))
    sizes = {place: len(index) for place, index in located.items()}
    assert all({place: len(index) for place, index in path.items()} == sizes for path in (random, least))
    damage = torch.stack([(a.scores.double() ** 2).mean(0) for a in trial.damage]).mean(0).sqrt()
    text = trial.forget_snr.scores.double().mean(0) / (damage + 0.1 * damage.mean())
    vision = trial.forget_vision.scores.double().mean(0)
    for (stack, layer), index in least.items():
        size = (text if stack == trial.sites.text.name else vision)[layer].abs()
        rest = torch.ones(len(size), dtype=torch.bool)
        rest[index] = False
        assert size[index].max() <= size[rest].min() * (1 + 1e-5)


def test_a_row_that_edits_nothing_is_refused(trial):
    with pytest.raises(InputError, match="before"), trial.edited("before", Setting()):
        pass


def test_every_setting_is_the_best_of_eight_on_forget_sets_that_nothing_reports():
    tuning = json.loads(TUNING.read_text())
    assert set(SETTINGS) == set(EDITED) == set(tuning["chosen"])
    assert not set(tuning["seeds"]) & set(cells.SEEDS) and len(tuning["seeds"]) == 3
    for row, chosen in SETTINGS.items():
        scores: dict[Setting, dict[int, float]] = {}
        for one in tuning["tried"]:
            if one["row"] == row:
                kept = [right for group in ("retain", "general") for right in one["accuracy"][group].values()]
                score = statistics.mean(kept) - statistics.mean(one["accuracy"]["forget"].values())
                scores.setdefault(Setting(**one["setting"]), {})[one["seed"]] = score
        assert len(scores) == 8 and all(found.keys() == set(tuning["seeds"]) for found in scores.values()), row
        best = max(statistics.mean(found.values()) for found in scores.values())
        assert statistics.mean(scores[chosen].values()) == best and Setting(**tuning["chosen"][row]) == chosen, row
        assert chosen.steps <= 80
