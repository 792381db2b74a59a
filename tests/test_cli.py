"""The command line: what it explains, and how it fails."""

import re
import shlex
from pathlib import Path

import pytest
from commands import invoke

from mipfast import MipfastError, cli
from mipfast.experiment import finetune as finetuning
from mipfast.experiment import locate_file, pipeline

ROOT = Path(__file__).resolve().parents[1]


def test_help_names_the_commands_and_their_options():
    shown = invoke(["--help"])
    assert shown.exit_code == 0
    assert all(name in shown.output for name in "demo report doctor locate finetune unlearn eval run".split())
    assert invoke([]).output == shown.output
    options = invoke(["demo", "--help"]).output
    assert all(name in options for name in ("--seeds", "--forget", "--retrain", "--out"))


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_command_s_help_explains_every_option(command):
    shown = invoke([command, "--help"])
    assert shown.exit_code == 0
    lines = shown.output.splitlines()
    for i, line in enumerate(lines):
        if re.match("│ (--|PATH)", line):
            text = re.sub(r"^│ +[^ ]*(, --[^ ]+)?( [A-Z][^ ]*)?( \{[^ ]*)?", "", line).strip(" │") + lines[i + 1].strip(
                " │"
            )
            assert len(text.split()) > 1, f"{command}: no help in {line}"


def test_what_stands_beside_a_field_is_the_help_of_its_option():
    shown = " ".join(invoke(["finetune", "--help"]).output.replace("│", " ").split())
    assert "Learning rate of AdamW without weight decay, falling linearly to 0. (default: 2e-05)" in shown
    shown = " ".join(invoke(["locate", "--help"]).output.replace("│", " ").split())
    assert "{logprob,prob,log_odds,loss}" in shown and "larger supports the answer, except for loss." in shown


def test_doctor_reports_every_backend_with_a_reason():
    result = invoke(["doctor"])
    assert result.exit_code == 0
    for name in ("reference", "triton", "cpp", "cuda"):
        assert f"backend {name}" in result.output
    assert "GPU" in result.output and "torch" in result.output


def test_a_forget_ratio_without_split_is_refused():
    result = invoke(["demo", "--forget", "0.5"])
    assert result.exit_code == 2 and "0.05" in result.output


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("unlrn", "there is no command unlrn; expected demo, report"),
        ("unlearn --model m", "Missing from mipfast unlearn"),
        ("finetune --model m --data d --group g --out o --lr fast", "float"),
        ("finetune --model m --data d --group g --out o --lr 0", "lr=0.0; expected a positive number"),
        ("finetune --model m --data d --group g --out o --dtype int8", "bfloat16"),
        ("locate --model m --data d --out o --objective best", "log_odds"),
        ("locate --model m --data d --out o --positions end", "positions='end'; expected last_prompt"),
        ("unlearn --model m --data d --forget a --retain a --out o", "table a is to forget and to retain"),
        ("unlearn --model m --data d --retain a --out o", "no tables to forget"),
    ],
)
def test_a_line_that_cannot_be_used_is_told_and_exits_2(line, found):
    result = invoke(line.split())
    assert result.exit_code == 2 and found in " ".join(result.output.replace("│", " ").split())


def documented():
    """The lines of README.md and docs/ that call a stage."""
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = file.read_text().replace("\\\n", " ")
        yield from re.findall(r"^mipfast ((?:finetune|unlearn|eval|locate) .*)", text, re.MULTILINE)


def test_the_documented_lines_say_what_they_mean(monkeypatch):
    """Up to the call that works for hours."""
    calls = []
    for owner, name in (
        (finetuning, "finetune"),
        (pipeline, "unlearn_folder"),
        (pipeline, "evaluate_folder"),
        (locate_file, "locate_file"),
        (locate_file, "survey"),
    ):

        def stop(*args, name=name, **kwargs):
            calls.append((name, args))
            raise MipfastError("enough")

        monkeypatch.setattr(owner, name, stop)
    monkeypatch.setattr("mipfast.data.load_groups", lambda *args, **kwargs: [])
    monkeypatch.setattr("mipfast.experiment.config.load_groups", lambda *args, **kwargs: [])
    monkeypatch.setattr("mipfast.data.encoder.Encoder.from_pretrained", lambda *args: None)
    monkeypatch.setattr("mipfast.data.checkpoint.load_model", lambda *args: None)
    lines = list(documented())
    for line in lines:
        assert "enough" in invoke(shlex.split(line, comments=True)).output, line
    assert len(calls) == len(lines) >= 6
    by_name = {name: args for name, args in calls}
    _, stage, _, where = by_name["unlearn_folder"]
    assert stage.data.groups["general"] == ["data/mllmu/Retain_Set"] and stage.data.limit == 200
    assert (stage.rmisu.layer, stage.rmisu.lr, stage.batch_size, stage.vision.modality) == (7, 5e-4, 4, "vision")
    assert by_name["evaluate_folder"][1].data.groups == {"all": ["forget_5", "retain_95"]}
    assert by_name["finetune"][3].bf16 and by_name["finetune"][5] == "bfloat16"
    invoke("unlearn --model m --data d --forget a --retain b --out o --no-vision --positions 0,1 --seed 3".split())
    _, stage, _, where = calls[-1][1]
    assert stage.vision is None and stage.rmisu.positions == [0, 1] and stage.rmisu.seed == where.seed == 3


def test_our_errors_are_one_line_and_exit_2(monkeypatch, capsys):
    def fail():
        raise MipfastError("found x; expected labels [n,S]; do z")

    monkeypatch.setattr(cli, "app", fail)
    try:
        cli.main()
    except SystemExit as stop:
        assert stop.code == 2
    assert "expected labels [n,S]" in capsys.readouterr().out
