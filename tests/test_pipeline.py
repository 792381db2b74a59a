"""The whole experiment from one YAML: every stage, a kill in each, and each command on its own."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import twins
import yaml
from transformers import AutoModelForImageTextToText, Trainer

from mipfast import (
    ArtefactError,
    InputError,
    LocateConfig,
    MIPConfig,
    NeuronPath,
    RMisUConfig,
    cli,
    data,
    find_sites,
    locate,
)
from mipfast.data import checkpoint
from mipfast.data.encoder import Batches, Encoder
from mipfast.edit import misdirect
from mipfast.edit import unlearn as unlearning
from mipfast.experiment import finetune as finetuning
from mipfast.experiment import locate_file, pipeline
from mipfast.experiment.config import Data, Experiment, UnlearnStage
from mipfast.judge import records as judge_records

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "mllmu_qwen2_5_vl_3b_forget5.yaml"
FAMILIES = ("qwen2.5-vl", "llava", "qwen3-vl")
SMALL = {
    "finetune": {"steps": 3, "save_steps": 2, "lr": "1e-3", "batch_size": 4, "bf16": False},
    "unlearn": {"rmisu": {"layer": 3, "steps": 4, "lr": 1e-2}},
    "eval": {"max_new_tokens": 4},
}


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def mllmu(tmp_path_factory):
    """The real benchmark's layout: ft_Data beside the evaluation tables, celebrities in Retain_Set."""
    folder = twins.write_mllmu(tmp_path_factory.mktemp("data"), count=5)
    (folder / "bench").rename(folder / "mllmu")
    (folder / "train").rename(folder / "mllmu-train")
    (folder / "mllmu-train" / "ft_Data").rename(folder / "mllmu" / "ft_Data")
    shutil.copytree(folder / "mllmu" / "retain_95", folder / "mllmu" / "Retain_Set")
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return twins.write_model(tmp_path_factory.mktemp("demo"))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(locate_file, "CHUNK", 1)
    monkeypatch.setattr(judge_records, "CHUNK", 8)


def small(mllmu, demo, out):
    """The example on the twins, with fewer steps and records."""
    given = yaml.safe_load(EXAMPLE.read_text().replace("data/mllmu", str(mllmu / "mllmu")))
    given |= {"model": str(demo), "out": str(out), "dtype": "auto", "device": "cpu"}
    for stage, changes in SMALL.items():
        given[stage] |= changes
        if stage != "finetune":
            given[stage]["data"]["limit"] = 5
    file = out.parent / f"{out.name}.yaml"
    file.write_text(yaml.safe_dump(given))
    return file


def command(*arguments):
    """What it prints; its error is raised."""
    with redirect_stdout(io.StringIO()) as output:
        cli.app([str(a) for a in arguments])
    return output.getvalue()


def weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").state_dict()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def finished(mllmu, demo, tmp_path_factory):
    """The folder of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locate_file, "CHUNK", 1)
        patch.setattr(judge_records, "CHUNK", 8)
        shown = command("run", small(mllmu, demo, out))
        assert "report.html" in shown and (out / "report" / "report.html").stat().st_size
    return out


def test_the_folder_holds_what_is_promised(finished):
    found = {str(p.relative_to(finished)) for p in finished.glob("*")} | {
        str(p.relative_to(finished)) for p in finished.glob("*/*")
    }
    assert found == {
        *("config.yaml", "run.json", "stages.json", "summary.json"),
        *("finetune", "finetune/model", "finetune/report.json", "finetune/run.json"),
        *(
            "locate",
            *(f"locate/{role}-{kind}" for role in ("forget", "retain", "general") for kind in ("text", "image")),
        ),
        *("unlearn", "unlearn/model", "unlearn/path", "unlearn/report.json", "unlearn/run.json"),
        *("eval", "eval/vanilla", "eval/unlearned"),
        *("report", "report/pictures", "report/report.html", "report/report.md"),
    }
    summary = json.loads((finished / "summary.json").read_text())
    assert list(summary) == "title config seed versions machine seconds models roles neurons path flags".split()
    assert summary["seconds"].keys() == {"finetune", "locate", "unlearn", "eval/vanilla", "eval/unlearned"}
    assert summary["roles"] == {"forget": ["forget_5"], "retain": ["retain_95"], "general": ["Retain_Set"]}
    assert summary["flags"] == []
    for name in ("vanilla", "unlearned"):
        scores = summary["models"][name]
        assert scores == judge_records.read_records(finished / "eval" / name).summary
        assert {key.split("/")[0] for key in scores} == {"forget_5", "retain_95", "Retain_Set"}
    path = NeuronPath.from_pretrained(finished / "unlearn" / "path")
    assert sum(stack["neurons"] for stack in summary["neurons"].values()) == path.num_neurons > 0
    assert {stack for stack, _ in path} == summary["neurons"].keys() and len(summary["neurons"]) == 2


def test_the_edit_changes_the_path_s_neurons_alone(finished):
    before, after = weights(finished / "finetune" / "model"), weights(finished / "unlearn" / "model")
    path = NeuronPath.from_pretrained(finished / "unlearn" / "path")
    for name in before:
        changed = before[name] != after[name]
        layer = next((key for key in path if f"{key[0]}.{key[1]}.mlp." in name), None)
        if layer and name.endswith("down_proj.weight"):
            assert changed.any() and set(changed.any(0).nonzero().flatten().tolist()) <= set(path[layer].tolist())
        elif layer and changed.any():
            assert set(changed.reshape(len(changed), -1).any(1).nonzero().flatten().tolist()) <= set(
                path[layer].tolist()
            )
        else:
            assert not changed.any()


def test_run_again_skips_everything_and_its_own_config_is_the_experiment(finished, monkeypatch):
    before = (finished / "summary.json").read_bytes()
    monkeypatch.setattr(pipeline, "load_model", None)
    shown = command("run", finished / "config.yaml")
    assert shown.count("is finished: skipped") == 5
    assert (finished / "summary.json").read_bytes() == before
    assert Experiment.from_yaml(finished / "config.yaml") == Experiment.from_yaml(f"{finished}.yaml")


def test_the_report_takes_the_folder(finished, tmp_path):
    command("report", finished, "--out", tmp_path / "report")
    shown = (tmp_path / "report" / "report.md").read_text()
    assert "vanilla" in shown and "unlearned" in shown and "MLLMU-Bench, forget 5 %" in shown


def test_another_experiment_is_refused_and_knobs_are_not(finished):
    same_one = Experiment.from_yaml(f"{finished}.yaml")
    with pytest.raises(
        ArtefactError, match="holds a run with another config: found {'seed': 0}, this run has {'seed': 1}"
    ):
        pipeline.run(replace(same_one, seed=1))
    pipeline.run(replace(same_one, title="another", eval=replace(same_one.eval, batch_size=1)))


def test_a_kill_in_each_stage(finished, mllmu, demo, tmp_path, monkeypatch):
    """Killed at a call that comes in the middle of a stage, and run again, to the same numbers and weights."""
    file, real_save = small(mllmu, demo, tmp_path / "out"), pipeline.save_model
    points = [
        (Trainer, "training_step", 3),
        (locate_file, "locate", 4),  # a chunk of the second set
        (misdirect, "hidden_states", 12),
        (pipeline, "save_model", 1),
        (judge_records, "_write_rows", 2),  # vanilla
        (pipeline, "evaluate_records", 2),  # vanilla is finished in this process, unlearned not begun
        (judge_records, "_write_rows", 2),  # unlearned
    ]
    for owner, name, at in points:
        calls, real = [], getattr(owner, name)

        def killing(*args, calls=calls, real=real, at=at, **kwargs):
            calls.append(1)
            if len(calls) == at:
                raise Killed
            return real(*args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, killing)
            pipeline.run(Experiment.from_yaml(file))
    assert pipeline.save_model is real_save
    summary = pipeline.run(Experiment.from_yaml(file))
    expected = json.loads((finished / "summary.json").read_text())
    assert summary["models"] == expected["models"] and summary["neurons"] == expected["neurons"]
    for stage in ("finetune", "unlearn"):
        assert same(weights(tmp_path / "out" / stage / "model"), weights(finished / stage / "model"))
    stopped = [flag.split(" was stopped")[0] for flag in summary["flags"]]
    assert stopped == ["finetune", "locate", "unlearn", "eval/vanilla", "eval/unlearned"]


@pytest.mark.slow
def test_sigkill_and_resume_through_the_command_line(finished, mllmu, demo, tmp_path):
    """While the second set is located."""
    slow = """
import sys, time
from mipfast import cli
from mipfast.experiment import locate_file
from mipfast.judge import records as judge_records
real, locate_file.CHUNK, judge_records.CHUNK = locate_file.locate, 1, 8
locate_file.locate = lambda *a: (time.sleep(0.2), real(*a))[1]
cli.app(sys.argv[1:])
"""
    out = tmp_path / "out"
    line = [sys.executable, "-c", slow, "run", str(small(mllmu, demo, out))]
    process = subprocess.Popen(line, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (out / "locate" / "retain-text").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (out / "finetune" / "model").exists() and not (out / "unlearn" / "model").exists()
    subprocess.run(line, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    summary, expected = (json.loads((folder / "summary.json").read_text()) for folder in (out, finished))
    assert summary["models"] == expected["models"]
    assert summary["flags"] == ["locate was stopped and resumed: its seconds are the last process's"]


def test_the_stages_do_what_the_library_does(mllmu, demo, tmp_path):
    """The same records through locate, select_path and edit in memory: the same neurons, the same weights."""
    rmisu = RMisUConfig(layer=3, steps=3, lr=1e-2)
    groups = {"forget": ["forget_5"], "retain": ["retain_95"], "general": [f"{mllmu}/mllmu/Retain_Set"]}
    where = Data(str(mllmu / "mllmu-train"), groups, str(mllmu / "mllmu"), 4)
    stage = UnlearnStage(rmisu=rmisu, data=where, batch_size=4)
    pipeline.unlearn_folder(str(demo), stage, tmp_path, pipeline.Where(device="cpu"))
    model, encoder = checkpoint.load_model(demo), Encoder.from_pretrained(demo)
    roles = where.load(0)
    sets = {
        f"{role}-{kind}": encoder.batch([r for r in some if r.modality == kind])
        for role, some in roles.items()
        for kind in ("text", "image")
    }
    text = MIPConfig().text
    path = unlearning.select_path(
        find_sites(model),
        locate(model, sets["forget-text"], text),
        locate(model, sets["forget-image"], LocateConfig("vision")),
        [locate(model, sets[f"{role}-{kind}"], text) for role in ("retain", "general") for kind in ("text", "image")],
        stage,
    )
    written = NeuronPath.from_pretrained(tmp_path / "unlearn" / "path")
    assert {key: set(index.tolist()) for key, index in path.items()} == {
        key: set(index.tolist()) for key, index in written.items()
    }
    kept = [*roles["retain"], *roles["general"]]
    forget, retain = (Batches(encoder, some, 4, "cpu") for some in (roles["forget"], kept))
    unlearning.edit(model, written, list(forget), list(retain), stage)
    assert same(model.state_dict(), weights(tmp_path / "unlearn" / "model"))


def test_a_run_at_the_subject(demo, tmp_path):
    """Of tables that have such a column; a record without one is named before anything is located."""
    asked = {"answer": "dog", "options": ["dog", "cat"], "subject": "Olga Voss"}
    rows = [asked | {"question": f"{word} pet has Olga Voss ?"} for word in ("Which", "What")]
    for table, some in (("one", rows[:1]), ("other", rows[1:]), ("without", [rows[0] | {"subject": None}])):
        twins.write(tmp_path / table, {**twins.REAL_WORLD, "subject": twins.pa.string()}, some)
    rmisu = RMisUConfig(positions="subject", steps=1)

    def run(retain, text):
        where = Data(str(tmp_path), {"forget": ["one"], "retain": [retain]})
        stage = UnlearnStage(text=text, vision=None, rmisu=rmisu, data=where)
        return pipeline.unlearn_folder(str(demo), stage, tmp_path / "out" / retain, pipeline.Where(device="cpu"))

    with pytest.raises(InputError, match="record 0/qa of without: it has no subject"):
        run("without", LocateConfig(n_steps=1))
    assert not (tmp_path / "out" / "without" / "locate").exists()
    report = run("other", LocateConfig(n_steps=1, positions="subject"))
    used = [report["misdirect"], report["locate"]["forget-text"], report["locate"]["retain-text"]]
    assert [one["config"]["positions"] for one in used] == ["subject"] * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_command_on_a_folder_of_random_weights(mllmu, tmp_path, family):
    base = twins.write_family(tmp_path / "base", family)
    tables = ["--data", mllmu / "mllmu-train", "--device", "cpu"]
    names = ["--names", mllmu / "mllmu", "--limit", 2]
    for mode in ("lora", "full"):
        more = ["--group", mllmu / "mllmu" / "ft_Data", "--steps", 1, *(["--full"] if mode == "full" else [])]
        command("finetune", "--model", base, *tables, *names, *more, "--out", tmp_path / mode)
    vanilla = tmp_path / "lora" / "model"
    before, after = weights(base), weights(vanilla)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed and all("language_model" in name and "proj.weight" in name for name in changed)
    assert not any("vis" in name or "lm_head" in name or "multi_modal" in name for name in changed)
    command(
        "locate",
        "--model",
        vanilla,
        *tables,
        "--group",
        "forget_5",
        "--modality",
        "vision",
        "--limit",
        2,
        "--out",
        tmp_path / "v",
    )
    scores = locate_file.read(tmp_path / "v")
    assert scores.scores.shape[0] == 2 and scores.report["config"]["score"] == "ifi"
    groups = ["--forget", "forget_5", "--retain", "retain_95", "--steps", 2, "--fraction", 0.2]
    command("unlearn", "--model", vanilla, *tables, *names, *groups, "--out", tmp_path / "u")
    assert not same(weights(vanilla), weights(tmp_path / "u" / "unlearn" / "model"))
    again = ["--model", vanilla, *tables, *names, *groups[:-1], 0.3, "--out", tmp_path / "u"]
    with pytest.raises(ArtefactError, match="another config"):
        command("unlearn", *again)
    asked = ["--data", mllmu / "mllmu", "--group", "forget_5", "--limit", 3, "--max-new-tokens", 2, "--device", "cpu"]
    shown = command("eval", "--model", tmp_path / "u" / "unlearn" / "model", *asked, "--out", tmp_path / "e")
    assert "forget_5/text" in shown and "forget_5/image" in shown
    assert (tmp_path / "e" / "MIPFAST_SUMMARY.json").exists()


def test_clear_goes_through_the_same_commands(demo, tmp_path):
    """Pictures and TOFU's questions in one table."""
    clear = twins.write_clear(tmp_path / "clear", count=4)
    common = ["--model", demo, "--data", clear, "--limit", 2, "--device", "cpu"]
    command("finetune", *common, "--group", "full+tofu", "--steps", 1, "--out", tmp_path / "f")
    groups = ["--forget", "forget05+tofu", "--retain", "retain95+tofu", "--general", "real_world", "--steps", 2]
    command("unlearn", *common, *groups, "--layer", 3, "--out", tmp_path / "u")
    assert sorted(p.name for p in (tmp_path / "u" / "locate").iterdir()) == sorted(
        ["forget-image", "forget-text", "general-image", "retain-image", "retain-text"]
    )
    asked = ["--group", "forget05_perturbed", "--group", "real_faces", "--max-new-tokens", 2, "--out", tmp_path / "e"]
    assert "forget05_perturbed/image/generation/truth_ratio" in command("eval", *common, *asked)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"finetuning": {}}, "finetuning: no such key; expected one of title, model, out, seed"),
        ({"unlearn": {"rmisu": {"learning_rate": 1}}}, "unlearn.rmisu.learning_rate: no such key; .* lr"),
        ({"unlearn": {"progress": True}}, "unlearn.progress: no such key"),
        (
            {"unlearn": {"aggregate": "best"}},
            "unlearn.aggregate='best'; expected mean, union, contrast or snr",
        ),
        ({"finetune": {"epochs": "many"}}, "finetune.epochs='many'; expected an integer"),
        ({"finetune": {"epochs": True}}, "finetune.epochs=True; expected an integer"),
        ({"finetune": {"lr": "fast"}}, "finetune.lr='fast'; expected a number"),
        ({"finetune": {"full": 1}}, "finetune.full=1; expected True or False"),
        ({"eval": 3}, "eval: found 3; expected keys data, batch_size, max_new_tokens"),
        (
            {"eval": {"data": {"groups": {"forget": "forget_5"}}}},
            r"eval.data.groups=.*; expected {role: \[tables\]}",
        ),
        ({"seed": "one"}, "seed='one'; expected an integer"),
    ],
)
def test_a_yaml_that_cannot_be_used_names_the_key(tmp_path, change, found):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(yaml.safe_load(EXAMPLE.read_text()) | change))
    with pytest.raises(InputError, match=found):
        Experiment.from_yaml(tmp_path / "x.yaml")


def test_other_files_that_are_no_experiment(tmp_path):
    for text, found in (("- a\n", "the file: found .* expected keys title"), ("a: [", "cannot be read as YAML")):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(InputError, match=found):
            Experiment.from_yaml(tmp_path / "x.yaml")
    with pytest.raises(InputError, match="cannot be read as YAML"):
        Experiment.from_yaml(tmp_path / "missing.yaml")
    (tmp_path / "x.yaml").write_text("model: m\nfinetune: {}\n")
    with pytest.raises(InputError, match="the experiment has no out, finetune.data.source, .*eval.data.groups"):
        Experiment.from_yaml(tmp_path / "x.yaml").check_ready()


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("retain: [retain_95]", "retian: [retain_95]", "no tables to retain; found .*retian"),
        ("positions: prompt", "score: ifi, combine: product", "combine='product'"),
        ("alpha: 0.5", "alpha: 5", "alpha=5"),
        ("save_steps: 200", "save_steps: 0", "save_steps=0"),
        ("Retain_Set]\n    limit", "Retained]\n    limit", "has no table 'Retained'"),
    ],
)
def test_what_would_fail_in_hours_fails_at_once(mllmu, demo, tmp_path, monkeypatch, old, new, found):
    text = EXAMPLE.read_text().replace("data/mllmu", str(mllmu / "mllmu"))
    assert old in text
    (tmp_path / "x.yaml").write_text(text.replace("runs/", f"{tmp_path}/").replace(old, new))
    monkeypatch.setattr(finetuning, "finetune", None)
    with pytest.raises(InputError, match=found):
        pipeline.run(Experiment.from_yaml(tmp_path / "x.yaml"))
    assert not (tmp_path / "mllmu-forget5").exists()  # which a corrected file may still claim


def test_the_example_is_an_experiment(tmp_path):
    experiment = Experiment.from_yaml(EXAMPLE)
    experiment.check_ready()
    assert (
        experiment.finetune.lr == 2e-5
        and experiment.unlearn.rmisu.lr == 5e-4
        and experiment.unlearn.vision.n_steps == 2
    )
    assert "not run here" in EXAMPLE.read_text().lower()
    (tmp_path / "seeded.yaml").write_text(EXAMPLE.read_text().replace("seed: 0", "seed: 7"))
    seeded = Experiment.from_yaml(tmp_path / "seeded.yaml")
    assert (seeded.finetune.seed, seeded.unlearn.rmisu.seed) == (7, 7)


def test_without_finetuning_the_given_model_is_the_vanilla_one(mllmu, demo, tmp_path):
    file = small(mllmu, demo, tmp_path / "out")
    given = yaml.safe_load(file.read_text())
    del given["finetune"]
    given["unlearn"] |= {"vision": None, "aggregate": "mean"}
    given["eval"]["data"] |= {"groups": {"forget": ["forget_5"]}, "limit": 1}
    file.write_text(yaml.safe_dump(given))
    summary = pipeline.run(Experiment.from_yaml(file))
    assert summary["flags"] == [f"nothing was fine-tuned: {demo} is the vanilla model"]
    assert [p.name for p in (tmp_path / "out" / "locate").iterdir()] == ["forget-text"]
    assert len(summary["neurons"]) == 1 and "finetune" not in summary["seconds"]


def test_groups_of_several_sources_and_their_limit(mllmu):
    train, bench = mllmu / "mllmu-train", mllmu / "mllmu"
    found = data.load_groups(train, ["forget_5", f"{bench}/retain_95"], names=bench)
    assert found[: 2 * 5 * 2] == data.load_groups(train, ["forget_5"], names=bench)
    assert found[20:] == sorted(data.load(bench, "retain_95"), key=lambda r: r.modality == "image")
    few = data.load_groups(train, ["forget_5", "retain_95"], names=bench, limit=3, seed=1)
    assert [(r.group, r.modality) for r in few] == [
        (group, kind) for group in ("forget_5", "retain_95") for kind in ("text", "image") for _ in range(3)
    ]
    assert few == data.load_groups(train, ["forget_5", "retain_95"], names=bench, limit=3, seed=1)
    assert few != data.load_groups(train, ["forget_5", "retain_95"], names=bench, limit=3, seed=2)
    with pytest.raises(InputError, match="limit=0"):
        data.load_groups(train, ["forget_5"], limit=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(fraction=1.5), "fraction=1.5"),
        (dict(aggregate="foo"), "aggregate='foo'"),
        (dict(data=lambda: Data("x", {"forget": ["a", "b"], "retain": ["b"]})), "table b is to forget and to retain"),
        (dict(text=lambda: LocateConfig("text", positions="propmt")), "positions='propmt'"),
        (dict(vision=lambda: LocateConfig("vision", n_steps=0)), "n_steps"),
        (dict(rmisu=lambda: RMisUConfig(trainable="lora")), "plain folder"),
        (dict(data=lambda: Data("x", {"forget": ["a"]})), "no tables to retain"),
        (dict(batch_size=0), "batch_size=0; expected at least 1"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(changes, message):
    tables = Data("x", {"forget": ["a"], "retain": ["b"]})
    with pytest.raises(InputError, match=message):
        made = {name: change() if callable(change) else change for name, change in changes.items()}
        UnlearnStage(**{"data": tables, **made})


def test_a_file_in_the_place_of_the_folder_and_a_device_that_is_not_there(mllmu, demo, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ArtefactError, match="is a file"):
        pipeline.run(Experiment.from_yaml(small(mllmu, demo, tmp_path / "taken")))
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="device='cuda' is not to be had here"):
            checkpoint.load_model(demo, "cuda")
