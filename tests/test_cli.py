"""The command line: what it explains, and how it fails."""

import re

from typer.testing import CliRunner

from mipfast import MipfastError, cli


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_help_names_the_commands_and_their_options():
    shown = plain(CliRunner().invoke(cli.app, ["--help"]).output)
    assert all(name in shown for name in "demo doctor locate finetune unlearn eval run".split())
    options = plain(CliRunner().invoke(cli.app, ["demo", "--help"]).output)
    assert all(name in options for name in ("--seeds", "--forget", "--retrain", "--out"))


def test_doctor_reports_every_backend_with_a_reason():
    result = CliRunner().invoke(cli.app, ["doctor"])
    shown = plain(result.output)
    assert result.exit_code == 0
    for name in ("reference", "triton", "cpp", "cuda"):
        assert f"backend {name}" in shown
    assert "GPU" in shown and "torch" in shown


def test_a_forget_ratio_without_split_is_refused():
    result = CliRunner().invoke(cli.app, ["demo", "--forget", "0.5"])
    assert result.exit_code == 2 and "0.05" in plain(result.output)


def test_our_errors_are_one_line_and_exit_2(monkeypatch, capsys):
    def fail():
        raise MipfastError("found x; expected labels [n,S]; do z")

    monkeypatch.setattr(cli, "app", fail)
    try:
        cli.main()
    except SystemExit as stop:
        assert stop.code == 2
    assert "expected labels [n,S]" in capsys.readouterr().out
