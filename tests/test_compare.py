"""bench/compare.py: what it calls a regression, and the runs it refuses to put side by side."""

import importlib.util
import json
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("compare", Path(__file__).parents[1] / "bench" / "compare.py")
compare = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(compare)


@pytest.fixture
def run(tmp_path):
    """run(name, medians, machine facts): a file as pytest-benchmark writes it."""

    def write(name, medians, **facts):
        machine = dict(device="cpu", multiprocessors=None, threads=1, torch="2.13", commit="abc") | facts
        rows = [
            dict(
                fullname=row,
                group="op shape cpu",
                params=dict(provider=row),
                stats=dict(median=median),
                extra_info=dict(times_eager=2.0, gb_per_s=10.0, share_of_copy=0.5, peak_mib=1.0),
            )
            for row, median in medians.items()
        ]
        cpu = dict(brand_raw=machine.pop("cpu", "X"), count=machine.pop("cores", 2))
        path = tmp_path / name
        path.write_text(json.dumps(dict(machine_info=dict(mipfast=machine, cpu=cpu), benchmarks=rows)))
        return str(path)

    return write


def test_regressions_and_improvements(run, capsys):
    old = run("old.json", dict(slower=1.0, faster=1.0, same=1.0, gone=1.0))
    new = run("new.json", dict(slower=1.3, faster=0.5, same=1.05, added=1.0), commit="def")
    assert compare.main([old, new]) == 1
    out = capsys.readouterr().out
    assert "commit: abc -> def" in out
    assert "REGRESSION   1.30x" in out and "improved     0.50x" in out and " same" not in out
    assert "3 rows compared, 1 slower by more than 10%" in out
    assert "1 rows only in the old run" in out and "1 rows only in the new run" in out


def test_threshold(run):
    old, new = run("old.json", dict(row=1.0)), run("new.json", dict(row=1.3))
    assert compare.main([old, new, "--threshold", "0.5"]) == 0


@pytest.mark.parametrize("fact", ["device", "cpu", "cores", "threads", "multiprocessors"])
def test_other_machines_are_refused(run, capsys, fact):
    old, new = run("old.json", dict(row=1.0)), run("new.json", dict(row=1.0), **{fact: 99})
    assert compare.main([old, new]) == 2
    error = capsys.readouterr().err
    assert f"different machines: {fact} " in error and "and 99" in error


def test_a_slim_run_reads_the_same(tmp_path):
    row = dict(
        group="op shape cpu",
        name="test_op[cpp]",
        fullname="bench/test_op.py::test_op[cpp]",
        params=dict(provider="cpp", shape=["small", 4]),
        extra_info=dict(times_eager=2.0, gb_per_s=10.0, share_of_copy=0.5, peak_mib=1.0),
        options=dict(min_rounds=5),
        stats=dict(median=1.0, iqr=0.1, rounds=3, data=[1.0, 0.9, 1.1]),
    )
    cpu = dict(brand_raw="X", count=2, flags=["avx2"])
    made = dict(machine_info=dict(mipfast=dict(device="cpu"), cpu=cpu), benchmarks=[row, row | dict(params=None)])
    made["benchmarks"][1]["extra_info"] = {}
    (tmp_path / "run.json").write_text(json.dumps(made))
    before = compare.read(tmp_path / "run.json")
    compare.slim(made)
    (tmp_path / "run.json").write_text(json.dumps(made))
    assert compare.read(tmp_path / "run.json") == before
    assert "flags" not in made["machine_info"]["cpu"] and "data" not in made["benchmarks"][0]["stats"]


def test_files_that_are_no_run_are_named(run, tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    assert compare.main([run("old.json", {}), str(tmp_path / "other.json")]) == 2
    assert "other.json is no pytest-benchmark file" in capsys.readouterr().err
    assert compare.main([str(tmp_path / "absent.json")]) == 2


def test_one_file_is_a_table(run, capsys):
    assert compare.main([run("run.json", dict(cpp=0.002, eager=0.004, **{"compile-loop": 0.003}))]) == 0
    (_, line) = capsys.readouterr().out.splitlines()
    assert line.split() == "op shape cpu cpp 2.000 ms 2.00 1.50 50% - 1.0 MiB".split()
