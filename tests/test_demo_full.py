"""`mipfast demo --full`: cells that go on after a stop, what they say together, and the page."""

import copy
import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import chain

import pytest
from commands import invoke
from dying import dying

from mipfast import files
from mipfast.demo import evidence, findings, full, people, run
from mipfast.demo import trial as trials
from mipfast.demo.people import Question
from mipfast.errors import DivergedError
from mipfast.experiment.figures import GROUPS, MODALITIES

ROWS = ("before", "random prune", "MIP", "random", "retrained")


def shrink(patch):
    """Two steps, few questions, few rows, one probe, and of every part what shows its shape."""
    base, encoder = run.load_base()
    world = encoder.world
    forget = world.split(0).forget_people
    asked = [q for i, q in enumerate(world.questions) if not q.test or q.subject in forget or i % 30 == 0]
    encoder.world = replace(world, questions=asked)
    patch.setattr(run, "load_base", lambda: (base, encoder))
    patch.setattr(people, "build", lambda seed: encoder.world)
    for name, value in {"STEPS": 2, "LOCATE_FORGET": 4, "LOCATE_RETAIN": 3}.items():
        patch.setattr(trials, name, value)
    for group in trials.BATCH:
        patch.setitem(trials.BATCH, group, 4)
    patch.setattr(full, "RELEARNING", (1, 2))
    patch.setattr(full, "ROWS", {row: trials.ROWS[row] for row in ROWS})
    patch.setattr(full, "ATTACKED", ("before", "MIP", "retrained"))
    patch.setattr(full, "PROBES", {"quantised": lambda trial, model: {"text": 1.0, "image": float(trial.seed)}})
    patch.setattr(full, "DIRECTIONS", {"gaussian 1": {"seed": 1}, "gaussian 2": {"seed": 2}})
    patch.setattr(full, "SHARES", (0.5,))
    patch.setattr(full, "SWEPT_LR", (1e-2, 1e4))
    patch.setattr(full, "SWEPT_BATCH", (4,))
    patch.setattr(full, "SWEPT_RATIO", (0.10,))


def made(folder):
    """The results, and the names of the cells that were made for them."""
    names = []
    real = full.write_json

    def counted(path, value):
        names.append(path.stem)
        real(path, value)

    with pytest.MonkeyPatch.context() as counting:
        counting.setattr(full, "write_json", counted)
        results = full.run_full([0], folder, progress=False)
    return results, names


def without_seconds(value):
    if isinstance(value, dict):
        return {key: without_seconds(inner) for key, inner in value.items() if key != "seconds"}
    return [without_seconds(inner) for inner in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        yield patch


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
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
    _, results = whole
    bench = full.Bench()
    assert full.direction(0, {"seed": 0}, bench)["answers"] == results["cells"]["methods-0-MIP"]["result"]["answers"]
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
            full.run_full([0], tmp_path, progress=False)
    finished = {"methods-0-random"}
    assert {path.stem for path in (tmp_path / "cells").glob("[!.]*")} == set(results["cells"]) - left | finished
    again, names = made(tmp_path)
    assert set(names) == left - finished and without_seconds(again) == without_seconds(results)
    assert not [*(tmp_path / "cells").glob(".*")], "what was left of a write is gone"


def test_a_killed_process_leaves_whole_cells(small, whole, tmp_path):
    folder, results = whole
    code = (
        "import pytest, sys, pathlib, test_demo_full as t\n"
        "t.torch_threads()\n"
        "t.shrink(pytest.MonkeyPatch())\n"
        "t.full.run_full([0], pathlib.Path(sys.argv[1]), progress=False)\n"
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
    setting = full.SETTINGS["random"]
    monkeypatch.setitem(full.SETTINGS, "random", replace(setting, lr=2 * setting.lr))
    assert made(folder)[1] == ["methods-0-random"]
    monkeypatch.setitem(full.SETTINGS, "random", setting)
    assert made(folder)[1] == ["methods-0-random"]


def test_a_damaged_cell_is_made_again(small, whole):
    folder, results = whole
    (folder / "cells" / "methods-0-before.json").write_text('{"key": ')
    again, names = made(folder)
    assert names == ["methods-0-before"] and without_seconds(again) == without_seconds(results)


def test_a_diverged_cell_is_recorded_and_the_run_goes_on(small, whole, monkeypatch):
    folder, before = whole
    monkeypatch.setattr(full, "DIRECTIONS", {"gaussian 1": {"seed": 1}, "gaussian 3": {"seed": 3}})

    def diverging(*args, **kwargs):
        raise DivergedError("step 1 has loss nan")

    monkeypatch.setattr(full, "rmisu", diverging)
    results, names = made(folder)
    assert names == ["directions-0-gaussian-3"]
    assert results["cells"][names[0]]["result"] == {"diverged": "step 1 has loss nan"}
    wrong = {"part": "directions", "row": "gaussian 3", "seed": 0, "flags": ["diverged: step 1 has loss nan"]}
    assert wrong in results["flags"] and len(results["directions"]["each"]) == 1
    assert "step 1" not in str(before["flags"]) and "gaussian 3" in page_of(results)


def question(topic, answer, pictures=()):
    return Question("?", answer, 0, topic, pictures, True)


def test_rates_and_agreement_by_hand():
    options = {"pet": ["cat", "dog"], "year": ["1951", "1954"]}
    asked = [question("pet", "cat")] * 4 + [question("year", "1951", (0,))] * 2
    answers = ["cat", "dog", "1951", "of", "1954", "the"]
    found = findings.rates(asked, answers, options)
    assert found == {"legal": {"text": 50.0, "image": 50.0}, "gibberish": {"text": 25.0, "image": 50.0}}
    other, third = ["cat", "cat", "1951", "the", "1951", "the"], ["dog"] * 6
    # text: 2/4 alike; 1/4 (the dog); 0/4. image: 1/2, 0, 0
    assert findings.agreement(asked, [answers, other, third]) == {
        "text": pytest.approx(25.0),
        "image": pytest.approx(100 / 6),
    }
    assert findings.agreement(asked, [answers]) == {}


def test_regions_and_gap_by_hand():
    def accuracy(forget, retain, general):
        return {g: {"text": a, "image": b} for g, (a, b) in zip(GROUPS, (forget, retain, general), strict=True)}

    before = accuracy((100, 100), (100, 100), (100, 100))
    good, one_sided = accuracy((0, 10), (90, 100), (80, 90)), accuracy((10, 100), (100, 100), (100, 100))
    gone = accuracy((0, 0), (90, 14), (80, 90))
    assert findings.gap(good) == 90 - 5
    assert findings.flagged(good, before) == []
    assert [flag.split(":")[0] for flag in findings.flagged(one_sided, before)] == ["inconsistent_modality"]
    assert [flag.split(":")[0] for flag in findings.flagged(gone, before)] == ["collapse"]
    named = [findings.region(a, findings.flagged(a, before)) for a in (good, one_sided, gone)]
    assert named == ["stable", "not forgotten", "collapsed"]
    assert findings.region({}, ["diverged: x"]) == "collapsed"


def test_facts_are_dealt_in_exact_shares_and_equal_numbers():
    split = run.load_base()[1].world.split(0)
    sets = {share: full.deal(split, 1, share) for share in (0.0, 0.25, 0.5, 1.0)}
    for share, dealt in sets.items():
        text, image = (dealt.facts[kind] for kind in MODALITIES)
        assert len(text) == len(image) == 12 and len(text & image) == 12 * share
        assert text == sets[0.0].facts["text"]
        for kind in MODALITIES:
            asked = dealt.select("forget", test=False, modality=kind)
            assert len(asked) == 12 * 9 and {(q.subject, q.topic) for q in asked} == dealt.facts[kind]
        assert dealt.select("forget", test=True) == split.select("forget", test=True)
        assert dealt.select("retain", test=False) == split.select("retain", test=False)
        where = [dealt.where(q) for q in full.forget_questions(dealt)]
        known = len(text | image)
        assert [where.count(w) for w in ("same", "other", "neither")] == [
            3 * 24,
            3 * 2 * (known - 12),
            3 * 2 * (25 - known),
        ]


def page_of(results):
    from mipfast.experiment import page

    return html.unescape(page.markdown(evidence.parts(results)))


def fake_results(seeds=(0, 1, 2)):
    """Without a model: three rows, two attacks, and every part."""

    def values(x):
        return {kind: [x + seed for seed in seeds] for kind in MODALITIES}

    def row(key, stage, *means):
        accuracy = {group: values(mean) for group, mean in zip(GROUPS, means, strict=True)}
        return {"key": key, "name": key, "stage": stage, "note": "n", "neurons": 9, "accuracy": accuracy}

    def one(name):
        rates = {rate: {"text": 1.0, "image": 2.0} for rate in ("legal", "gibberish")}
        return {"name": name, "accuracy": {g: {k: 50.0 for k in MODALITIES} for g in GROUPS}} | rates

    rows = [row("before", "before", 97, 97, 97), row("MIP", "RMisU", 4, 90, 92), row("random", "RMisU", 6, 90, 92)]
    rows.append(row("retrained", "reference", 7, 97, 97))
    attack = {"before": values(97), "MIP": values(30), "retrained": values(5)}
    unchanged = {"before": values(97), "MIP": values(9), "retrained": values(5)}
    arms = [
        {
            "share": share,
            "seen": {"same": values(3), "other": values(40) if share < 1 else {k: [] for k in MODALITIES}}
            | {"neither": values(60)},
            "accuracy": {group: values(90) for group in GROUPS},
        }
        for share in (0.0, 1.0)
    ]
    swept = {"accuracy": {g: {k: 50.0 for k in MODALITIES} for g in GROUPS}, "gap": 0.0, "region": "not forgotten"}
    diverged = {"accuracy": None, "gap": None, "region": "collapsed"}
    return {
        "title": "A page",
        "seeds": list(seeds),
        "rows": rows,
        "attacks": {"membership": attack, "relearned 0": unchanged, "relearned 5": copy.deepcopy(attack)},
        "rates": {"MIP": {"legal": values(3), "gibberish": values(40)}},
        "directions": {"each": [one("gaussian 1"), one("gaussian 2")], "agreement": {"text": 12.0, "image": 34.0}},
        "cross_modal": arms,
        "sweep": [
            {"ratio": 0.1, "batch": 24, "lr": 0.01} | swept,
            {"ratio": 0.1, "batch": 24, "lr": 0.1} | diverged,
        ],
        "flags": [{"part": "sweep", "row": "10 % lr 0.1", "seed": 0, "flags": ["diverged: step 3"]}],
        "limits": ["A tiny model."],
        "seconds": {"methods": 61.0, "all": 61.0},
        "config": {"steps": 80},
        "versions": {"torch": "2.13.0"},
        "machine": {"cores": 2},
        "cells": {},
    }


def test_the_page_has_every_table_with_its_numbers():
    shown = page_of(fake_results())
    tables = re.findall(r"^### (.*)$", shown, re.MULTILINE)
    assert tables == [
        "Accuracy after each edit",
        "What comes back, percent, text / image",
        "MIP along other directions, one forget set, the same batches",
        "Which words are answered, percent of forget questions",
        "MIP on facts in text, in pictures, or both",
        "MIP by setting",
        "What is wrong with which row",
        "Seconds",
    ]
    # forget 4, 5, 6: mean 5, sample sd 1; gap 91 - 4, the same in every seed
    assert (
        "| MIP | RMisU | 9 |" + " 5.0 ± 1.0 |" * 2 + " 91.0 ± 1.0 |" * 2 + " 93.0 ± 1.0 |" * 2 + " 87.0 ± 0.0 |"
        in shown
    )
    assert "MIP's gap minus that of as many random neurons, paired by seed, is 2.0 ± 0.0 points." in shown
    assert "By mean gap: MIP (RMisU) 87.0; random (RMisU) 85.0." in shown
    # MIP: |4-7|, |90-97|, |92-97|, each twice: 30 / 6; random: 26 / 6
    assert "retrained model over the six columns, in points: random 4.3; MIP 5.0." in shown
    assert "text and image, in points. membership: MIP 25.0. relearned 0:" in shown
    assert "Gained by relearned 5, points: retrained 0.0, MIP 21.0." in shown
    assert "- 10 % lr 0.1, seed 0: diverged: step 3" in shown
    assert "12 percent of the forget questions in text and 34 percent in pictures" in shown
    assert "Of 2 settings: 0 stable, 1 collapsed, 1 not forgotten. The largest gap is 0.0 points, with lr 0.01" in shown
    assert "| 100 % |" in shown and shown.count("| – |") >= 2, "no fact is only in the other modality"
    assert "| sweep | 10 % lr 0.1 | diverged | 0 |" in shown and "diverged means" in shown
    assert not re.search(r"\bnan\b(?! or infinite)|None", shown)


def test_one_seed_claims_no_spread():
    shown = page_of(fake_results((0,)))
    assert not re.search(r"\d ±|\bnan\b(?! or infinite)", shown)


def test_every_picture_is_drawn_and_linked(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    results = fake_results()
    readme = evidence.write(results, tmp_path)
    names = {"accuracy.png", "attacks.png", "cross_modal.png", "sweep.png"}
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == names
    linked = re.findall(r"!\[([^\]]+)\]\(pictures/([^)]+)\)", readme.read_text())
    assert {name for _, name in linked} == names and all(alt for alt, _ in linked)
    assert json.loads((tmp_path / "report.json").read_text()) == results


def test_a_real_run_has_a_page_without_paths_of_the_machine(whole, tmp_path):
    _, results = whole
    text = evidence.write(results, tmp_path).read_text()
    assert not any(str(place) in text for place in (tmp_path, os.getcwd(), os.path.expanduser("~")))
    assert all(row["name"] in text for row in results["rows"])
    flagged = chain.from_iterable(one["flags"] for one in results["flags"])
    assert all(flag.split(":")[0] in text.replace("\\", "") for flag in flagged)


@pytest.mark.parametrize("extra", [["--retrain"], ["--forget", "0.05"]])
def test_full_refuses_what_its_references_do_not_fit(extra):
    result = invoke(["demo", "--full", *extra])
    shown = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    assert (
        result.exit_code == 2
        and extra[0] in shown
        and "retrained references" in " ".join(shown.replace("│", " ").split())
    )
