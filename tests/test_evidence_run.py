"""Minutes: a reference trained by the real recipe, and what it is for: a whole run of bench/evidence in few steps whose
cells go on after a stop, the probes, and the demo with --retrain."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import pytest
from bench_evidence import cells, page, probes, small_base
from dying import dying
from test_demo import assert_every_row_and_control_is_there, short_run
from test_evidence import page_of

from mipfast import evaluate, files
from mipfast.demo import model as tiny
from mipfast.demo import people, run
from mipfast.demo import trial as trials
from mipfast.errors import DivergedError
from mipfast.experiment.figures import GROUPS, MODALITIES

pytestmark = pytest.mark.slow
ROWS = ("before", "random prune", "MIP", "random", "retrained")


def shrink(patch):
    """Two steps, few questions, few rows, one probe, and of every part what shows its shape."""
    base, encoder = small_base()
    patch.setattr(run, "load_base", lambda: (base, encoder))
    patch.setattr(people, "build", lambda seed: encoder.world)
    for name, value in {"STEPS": 2, "LOCATE_FORGET": 4, "LOCATE_RETAIN": 3}.items():
        patch.setattr(trials, name, value)
    for group in trials.BATCH:
        patch.setitem(trials.BATCH, group, 4)
    patch.setattr(cells, "RELEARNING", (1, 2))
    patch.setattr(cells, "ROWS", {row: trials.ROWS[row] for row in ROWS})
    patch.setattr(cells, "ATTACKED", ("before", "MIP", "retrained"))
    patch.setattr(cells, "PROBES", {"quantised": lambda trial, model: {"text": 1.0, "image": float(trial.seed)}})
    patch.setattr(cells, "DIRECTIONS", {"gaussian 1": {"seed": 1}, "gaussian 2": {"seed": 2}})
    patch.setattr(cells, "SHARES", (0.5,))
    patch.setattr(cells, "SWEPT_LR", (1e-2, 1e4))
    patch.setattr(cells, "SWEPT_BATCH", (4,))
    patch.setattr(cells, "SWEPT_RATIO", (0.10,))


def made(folder):
    """The results, and the names of the cells that were made for them."""
    names = []
    real = cells.write_json

    def counted(path, value):
        names.append(path.stem)
        real(path, value)

    with pytest.MonkeyPatch.context() as counting:
        counting.setattr(cells, "write_json", counted)
        results = cells.run_full([0], folder, progress=False)
    return results, names


def without_seconds(value):
    if isinstance(value, dict):
        return {key: without_seconds(inner) for key, inner in value.items() if key != "seconds"}
    return [without_seconds(inner) for inner in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """The folder with the reference of forget set 0."""
    folder = tmp_path_factory.mktemp("references")
    cells.Bench(folder).reference(0)
    return folder


@pytest.fixture(scope="module")
def reference(references):
    return tiny.load(next(references.iterdir()))


def test_a_reference_is_trained_once(references, monkeypatch):
    bench = cells.Bench(references)
    monkeypatch.setattr(cells.tiny, "trained", None)
    assert bench.reference(0) is not None
    with pytest.raises(TypeError):
        bench.reference(1)  # another forget set's


def test_the_reference_does_not_know_what_it_never_saw(references, reference):
    bench = cells.Bench(references)
    split = bench.split(0)
    forget = bench.encoder.batches(split.select("forget", test=True))
    retain = bench.encoder.batches(split.select("retain", test=True)[::9])
    assert evaluate(reference, forget).accuracy < 15
    assert evaluate(reference, retain).accuracy > 95


def test_no_probe_finds_what_the_reference_never_saw(references, reference):
    bench = cells.Bench(references)
    few = sorted(bench.split(0).forget_people)[:2]
    split = people.Split(bench.encoder.world, frozenset(few))
    trial = SimpleNamespace(model=bench.base, encoder=bench.encoder, split=split, seed=0)
    for name, probe in probes.PROBES.items():
        unknown = probe(trial, reference)
        for kind in MODALITIES:
            assert unknown[kind] < (85 if name == "membership" else 20), name


def test_the_demo_that_retrains_measures_every_row(reference, tmp_path, monkeypatch):
    base, _ = run.load_base()
    trained = []

    def given(encoder, split, folder):
        trained.append((split and split.forget_people, folder.name))
        return copy.deepcopy(reference if split else base)

    monkeypatch.setattr(tiny, "trained", given)
    results = short_run(tmp_path, retrain=True)
    assert trained == [(None, "base"), (people.build(0).split(0).forget_people, "retrained-0")]
    assert_every_row_and_control_is_there(results, tmp_path, run.QUICK)
    assert "not measured" not in (tmp_path / "report.md").read_text()


@pytest.fixture(scope="module")
def small():
    """From its first use to the end of the file the world is a small one."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        yield patch


@pytest.fixture(scope="module")
def whole(references, small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    (folder / "references").symlink_to(references)
    results, names = made(folder)
    assert len(names) == len(set(names)) == len(results["cells"]) == len(ROWS) + 2 + 1 + 3
    return folder, results


def test_every_row_part_and_number_is_there(whole):
    _, results = whole
    assert [row["key"] for row in results["rows"]] == list(ROWS)
    for row in results["rows"]:
        assert all(len(row["accuracy"][group][kind]) == 1 for group in GROUPS for kind in MODALITIES)
    assert set(results["attacks"]) == {"quantised", "relearned 0", "relearned 1", "relearned 2"}
    for values in results["attacks"].values():
        assert set(values) == {"before", "MIP", "retrained"}
        assert all(len(values[row][kind]) == 1 for row in values for kind in MODALITIES)
    assert set(results["rates"]) == {"MIP", "retrained"} and len(results["directions"]["each"]) == 2
    assert results["rates"]["retrained"]["legal"]["text"][0] > 90, "a trained model answers with the topic's words"
    assert [arm["share"] for arm in results["cross_modal"]] == [0.5] and len(results["sweep"]) == 2
    assert json.loads(json.dumps(results)) == results | {"config": json.loads(json.dumps(results["config"]))}
    parts = {name: seconds for name, seconds in results["seconds"].items() if name != "all"}
    assert set(parts) == {"methods", "directions", "cross-modal", "sweep"}


def test_mip_of_the_table_is_the_direction_of_its_own_seed(small, whole):
    """A direction's own seed changes the direction alone: with the trial's seed the numbers are the row's."""
    folder, results = whole
    bench = cells.Bench(folder / "references")
    assert cells.direction(0, {"seed": 0}, bench)["answers"] == results["cells"]["methods-0-MIP"]["result"]["answers"]
    trial = bench.trial(bench.split(0), 0)
    for seed in (0, 1, 5):
        batches, mine = trial.edit_batches(seed=seed), trial.edit_batches()
        taken, wanted = (
            [[side[i]["input_ids"].tolist() for i in at] for side, at in zip(pair, order, strict=True)]
            for pair, order in (
                (batches, trials.order(seed, (2, 2), 2)),
                (mine, trials.order(trial.seed, (2, 2), 2)),
            )
        )
        assert taken == wanted


def test_the_same_command_makes_nothing_again(small, whole):
    folder, results = whole
    again, names = made(folder)
    assert names == [] and again == results


@pytest.mark.parametrize("moment", ["half", "after"])
def test_a_run_killed_while_it_writes_goes_on_to_the_same_results(moment, small, whole, tmp_path, monkeypatch):
    folder, results = whole
    left = {"methods-0-random", "directions-0-gaussian-2", "sweep-0-10-batch-4-lr-0.01"}
    (tmp_path / "cells").mkdir()
    for file in (folder / "cells").iterdir():
        if file.stem not in left:
            shutil.copy(file, tmp_path / "cells")
    writes, rename = [], os.replace
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", lambda a, b: dying(rename, writes, moment, a, b))
        with pytest.raises(KeyboardInterrupt):
            cells.run_full([0], tmp_path, progress=False)
    finished = {"methods-0-random"}
    assert {path.stem for path in (tmp_path / "cells").glob("[!.]*")} == set(results["cells"]) - left | finished
    again, names = made(tmp_path)
    assert set(names) == left - finished and without_seconds(again) == without_seconds(results)
    assert not [*(tmp_path / "cells").glob(".*")], "what was left of a write is gone"


def test_a_killed_process_leaves_whole_cells(references, small, whole, tmp_path):
    folder, results = whole
    (tmp_path / "references").symlink_to(references)
    code = (
        "import pytest, sys, pathlib, test_evidence_run as t\n"
        "t.torch_threads()\n"
        "t.shrink(pytest.MonkeyPatch())\n"
        "t.cells.run_full([0], pathlib.Path(sys.argv[1]), progress=False)\n"
    )
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=os.environ | {"PYTHONPATH": path})
    try:
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "cells").glob("*.json"))) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    for file in (tmp_path / "cells").glob("*.json"):
        mine, other = json.loads(file.read_text()), json.loads((folder / "cells" / file.name).read_text())
        assert without_seconds(mine) == without_seconds(other)


def torch_threads():
    import torch

    torch.set_num_threads(1)


def test_a_changed_setting_makes_its_own_cells_again(small, whole, monkeypatch):
    folder, _ = whole
    setting = cells.SETTINGS["random"]
    monkeypatch.setitem(cells.SETTINGS, "random", replace(setting, lr=2 * setting.lr))
    assert made(folder)[1] == ["methods-0-random"]
    monkeypatch.setitem(cells.SETTINGS, "random", setting)
    assert made(folder)[1] == ["methods-0-random"]


def test_a_damaged_cell_is_made_again(small, whole):
    folder, results = whole
    (folder / "cells" / "methods-0-before.json").write_text('{"key": ')
    again, names = made(folder)
    assert names == ["methods-0-before"] and without_seconds(again) == without_seconds(results)


def test_a_diverged_cell_is_recorded_and_the_run_goes_on(small, whole, monkeypatch):
    folder, before = whole
    monkeypatch.setattr(cells, "DIRECTIONS", {"gaussian 1": {"seed": 1}, "gaussian 3": {"seed": 3}})

    def diverging(*args, **kwargs):
        raise DivergedError("step 1 has loss nan")

    monkeypatch.setattr(cells, "rmisu", diverging)
    results, names = made(folder)
    assert names == ["directions-0-gaussian-3"]
    assert results["cells"][names[0]]["result"] == {"diverged": "step 1 has loss nan"}
    wrong = {"part": "directions", "row": "gaussian 3", "seed": 0, "flags": ["diverged: step 1 has loss nan"]}
    assert wrong in results["flags"] and len(results["directions"]["each"]) == 1
    assert "step 1" not in str(before["flags"]) and "gaussian 3" in page_of(results)


def test_a_real_run_has_a_page_without_paths_of_the_machine(whole, tmp_path):
    _, results = whole
    text = page.write(results, tmp_path).read_text()
    assert not any(str(place) in text for place in (tmp_path, os.getcwd(), os.path.expanduser("~")))
    assert all(row["name"] in text for row in results["rows"])
    flagged = chain.from_iterable(one["flags"] for one in results["flags"])
    assert all(flag.split(":")[0] in text.replace("\\", "") for flag in flagged)
