"""What the cells of bench/evidence say together, and the page, by hand."""

import copy
import html
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bench_evidence import cells, findings, page

from mipfast.demo import run
from mipfast.demo.people import Question
from mipfast.experiment.figures import GROUPS, MODALITIES


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
    sets = {share: cells.deal(split, 1, share) for share in (0.0, 0.25, 0.5, 1.0)}
    for share, dealt in sets.items():
        text, image = (dealt.facts[kind] for kind in MODALITIES)
        assert len(text) == len(image) == 12 and len(text & image) == 12 * share
        assert text == sets[0.0].facts["text"]
        for kind in MODALITIES:
            asked = dealt.select("forget", test=False, modality=kind)
            assert len(asked) == 12 * 9 and {(q.subject, q.topic) for q in asked} == dealt.facts[kind]
        assert dealt.select("forget", test=True) == split.select("forget", test=True)
        assert dealt.select("retain", test=False) == split.select("retain", test=False)
        where = [dealt.where(q) for q in cells.forget_questions(dealt)]
        known = len(text | image)
        assert [where.count(w) for w in ("same", "other", "neither")] == [
            3 * 24,
            3 * 2 * (known - 12),
            3 * 2 * (25 - known),
        ]


def page_of(results):
    return html.unescape(page.page.markdown(page.parts(results)))


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
    }


def test_the_page_has_every_table_with_its_numbers():
    shown = page_of(fake_results())
    tables = re.findall(r"^### (.*)$", shown, re.MULTILINE)
    assert tables == [
        "Accuracy after each edit",
        "What mipfast demo shows, retrained with --retrain",
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
    readme = page.write(results, tmp_path)
    names = {"accuracy.png", "attacks.png", "cross_modal.png", "sweep.png"}
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == names
    linked = re.findall(r"!\[([^\]]+)\]\(pictures/([^)]+)\)", readme.read_text())
    assert {name for _, name in linked} == names and all(alt for alt, _ in linked)
    assert json.loads((tmp_path / "report.json").read_text()) == results


def test_the_short_demo_s_rows_are_the_first_forget_set_alone():
    shown = page_of(fake_results())
    assert "| MIP | 9 | 4.0 | 4.0 | 90.0 | 90.0 | 92.0 | 92.0 |" in shown and "one seed: 0" in shown
    results = fake_results()
    for values in results["rows"][1]["accuracy"].values():
        values["text"].pop()  # which forget set is missing is not known
    assert "| MIP | 9 | – | 4.0 | – | 90.0 | – | 92.0 |" in page_of(results)


def test_the_command_explains_itself():
    command = Path(__file__).parents[1] / "bench" / "evidence"
    shown = subprocess.run([sys.executable, command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--out" in shown and "goes on" in shown
