"""Two runs of the benches side by side, or one as a table.

    python bench/compare.py RUN.json                       its kernels
    python bench/compare.py OLD.json NEW.json [--threshold 0.1]

The files are pytest-benchmark's (--benchmark-json). A row whose median grew by more than the threshold is a
regression; the exit status is 1 if there is one. Runs of different machines are refused with status 2: another device,
CPU, core or thread count. Another torch, triton, driver or commit is what one compares, and is printed.
"""

import argparse
import json
import sys
from pathlib import Path

MACHINE = ("device", "multiprocessors", "threads", "cpu", "cores")
SOFTWARE = ("commit", "torch", "triton", "cuda", "driver")


class Unusable(Exception):
    """A file that is no bench run, or two that do not compare."""


def read(path):
    """(machine_info's facts, {row: median seconds}, rows of the table) of a pytest-benchmark file."""
    try:
        run = json.loads(Path(path).read_text())
        info, rows = run["machine_info"], run["benchmarks"]
        facts = info["mipfast"] | {"cpu": info["cpu"].get("brand_raw", "unknown"), "cores": info["cpu"].get("count")}
        medians = {row["fullname"]: row["stats"]["median"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unusable(f"{path} is no pytest-benchmark file of this folder: {type(error).__name__}: {error}") from error
    shown = [
        dict(
            group=row["group"], provider=row["params"]["provider"], seconds=row["stats"]["median"], **row["extra_info"]
        )
        for row in rows
        if "times_eager" in row["extra_info"]
    ]
    return facts, medians, shown


def slim(run):
    """Keep of a pytest-benchmark run, in place, what `read` reads: raw rounds and CPU flags are most of the file."""
    info = run["machine_info"]
    cpu = {name: info["cpu"].get(name) for name in ("brand_raw", "count")}
    run["machine_info"] = {"mipfast": info["mipfast"], "cpu": cpu}
    run["benchmarks"] = [
        {name: row[name] for name in ("group", "fullname", "extra_info")}
        | {"params": {name: value for name, value in (row["params"] or {}).items() if name == "provider"}}
        | {"stats": {name: row["stats"][name] for name in ("median", "iqr", "rounds")}}
        for row in run["benchmarks"]
    ]


def check_machine(old, new):
    """Raises Unusable where the two runs' machines differ."""
    differing = [f"{key} {old.get(key)!r} and {new.get(key)!r}" for key in MACHINE if old.get(key) != new.get(key)]
    if differing:
        raise Unusable(f"different machines: {', '.join(differing)}; run the bench again on one of them")


def compare(old, new, threshold):
    """(lines, number of regressions) of two {row: median seconds}."""
    lines, regressions = [], 0
    for row in sorted(old.keys() & new.keys(), key=lambda row: old[row] / new[row]):
        ratio = new[row] / old[row]
        word = "REGRESSION" if ratio > 1 + threshold else "improved" if ratio < 1 / (1 + threshold) else "same"
        regressions += word == "REGRESSION"
        if word != "same":
            lines.append(f"{word:11}{ratio:6.2f}x  {_time(old[row])} -> {_time(new[row])}  {row}")
    lines.append(f"{len(old.keys() & new.keys())} rows compared, {regressions} slower by more than {threshold:.0%}")
    for name, rows in (("old", old.keys() - new.keys()), ("new", new.keys() - old.keys())):
        if rows:
            lines.append(f"{len(rows)} rows only in the {name} run")
    return lines, regressions


def table(rows):
    """Rows of `measure` as text: each kernel and shape against eager (interleaved) and the best torch.compile."""
    lines = [f"{'':66}{'time':>12}{'/ eager':>9}{'/ compiled':>12}  of a copy  of a product      peak"]
    for row in sorted(rows, key=lambda row: row["group"]):
        if row["provider"] in ("eager", "reference") or row["provider"].startswith("compile-"):
            continue
        others = [other for other in rows if other["group"] == row["group"]]
        compiled = [other["seconds"] for other in others if other["provider"].startswith("compile-")]
        against = f"{min(compiled) / row['seconds']:.2f}" if compiled else "-"
        product = f"{row['share_of_matmul']:.0%}" if "share_of_matmul" in row else "-"
        lines.append(
            f"{row['group'] + ' ' + row['provider']:66}{_time(row['seconds'])}{row['times_eager']:9.2f}{against:>12}"
            f"{row['share_of_copy']:11.0%}{product:>14}{row['peak_mib']:6.1f} MiB"
        )
    return "\n".join(lines)


def _time(seconds):
    return f"{seconds * 1e3:9.3f} ms"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="RUN.json")
    parser.add_argument("--threshold", type=float, default=0.1, help="share by which a median may grow (0.1)")
    args = parser.parse_args(arguments)
    if len(args.files) > 2:
        parser.error("expected one file or two")
    try:
        runs = [read(path) for path in args.files]
        if len(runs) == 1:
            print(table(runs[0][2]))
            return 0
        (old, before, _), (new, after, _) = runs
        check_machine(old, new)
    except Unusable as error:
        print(error, file=sys.stderr)
        return 2
    print(*(f"{key}: {old.get(key)} -> {new.get(key)}" for key in SOFTWARE if old.get(key) != new.get(key)), sep="\n")
    lines, regressions = compare(before, after, args.threshold)
    print(*lines, sep="\n")
    return 1 if regressions else 0


if __name__ == "__main__":
    sys.exit(main())
