"""The tables, tests and picture of docs/selection.md from what bench/selection.py found.

python bench/selection_report.py [--out DIR]     writes DIR/tables.md and DIR/curves.png; bench/results/selection
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np
from explore import BUDGET, EDITS, ROUNDS
from scipy.stats import ttest_rel
from selection import BUDGETS, CHOICES, FRACTIONS, RATES, RESULTS, SETS, WIDTHS, Lines

LIMIT = 5.0  # points of damage at which a curve is read
OTHERS = ("mean", "random", "cf-snr")
TESTED, SHOWN = ("prune", "down 0.03"), ("prune per layer", "down 0.1", "path 0.03", "path 0.1")


def drop(before: dict[str, float], after: dict[str, float], *places: str) -> float:
    return float(np.mean([before[place] - after[place] for place in places]))


def curve(
    lines: Lines,
    choice: str,
    seed: int,
    scope: str,
    forget: tuple[str, ...],
    fractions: tuple[float, ...] = FRACTIONS,
    general: str = "general text",
    start: Lines | None = None,
) -> list[tuple[float, float]]:
    """(damage, forget drop) in points at every fraction, from nothing pruned. start: has the model before."""
    before = (start or lines)[["before", seed]]["accuracy"]
    points = [(0.0, 0.0)]
    for fraction in fractions:
        after = lines[[choice, seed, scope, fraction]]["accuracy"]
        damage = max(drop(before, after, "retain text", "retain image"), drop(before, after, general))
        points.append((damage, drop(before, after, *forget)))
    return points


def read_at(points: list[tuple[float, float]], limit: float = LIMIT) -> float:
    """The forget drop where damage first reaches the limit, linearly between two budgets; else the last one's."""
    for (d0, f0), (d1, f1) in zip(points, points[1:], strict=False):
        if d1 >= limit:
            return f0 + (f1 - f0) * (limit - d0) / (d1 - d0)
    return points[-1][1]


def gap(accuracy: dict[str, float]) -> float:
    kept = [value for place, value in accuracy.items() if not place.startswith("forget")]
    return float(np.mean(kept) - np.mean([accuracy["forget text"], accuracy["forget image"]]))


def shown(values: list[float]) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def holm(ps: list[float]) -> list[float]:
    order, corrected, worst = np.argsort(ps), [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, ps[i] * (len(ps) - rank)))
        corrected[i] = worst
    return corrected


def compared(ours: list[float], theirs: list[float]) -> list[str]:
    difference = np.subtract(ours, theirs)
    error = difference.std(ddof=1) / len(difference) ** 0.5
    return [f"{difference.mean():+.1f} ± {error:.1f}", f"{(difference > 0).sum()} of {len(difference)}"]


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"] + [
        "| " + " | ".join(row) + " |" for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results are, and the tables go")
    folder = parser.parse_args().out
    pruned = {width: Lines(folder / f"prune-{width}.jsonl") for width in WIDTHS}
    edited = {width: Lines(folder / f"edit-{width}.jsonl") for width in WIDTHS}
    text, numbers = [], {}
    for width, scope in product(WIDTHS, ("stack", "layer")):
        rows = []
        for choice in CHOICES:
            found = [[read_at(curve(pruned[width], choice, s, scope, places)) for s in SETS] for places in PLACES]
            numbers["prune" if scope == "stack" else "prune per layer", width, choice] = found[0]
            last = [curve(pruned[width], choice, s, scope, PLACES[0])[-1][0] for s in SETS]
            rows.append([choice, *map(shown, found), f"{sum(d >= LIMIT for d in last)} of {len(last)}"])
        where = "ranked over the tower" if scope == "stack" else "ranked per layer"
        text += [f"**Prune only, width {width}, {where}**: drop at 5 points of damage", ""]
        text += ["damaged: sets whose damage reaches 5 points by 40 %; of the others the 40 % point is read", ""]
        text += [*table(["choice", "forget text", "forget image", "both", "damaged"], rows), ""]
    for width, trainable in product(WIDTHS, RATES):
        rows = []
        for fraction, choice in product(BUDGETS, CHOICES):
            found = [edited[width][[choice, s, trainable, fraction]] for s in SETS]
            gaps = [gap(one["accuracy"]) for one in found]
            numbers[f"{trainable} {fraction}", width, choice] = gaps
            columns = [[one["accuracy"][place] for one in found] for place in found[0]["accuracy"]]
            back = [[one["relearned"][kind] for one in found] for kind in ("text", "image")]
            rows.append([f"{fraction:.0%}", choice, shown(gaps), *(f"{np.mean(c):.0f}" for c in [*columns, *back])])
        text += [f"**RMisU `{trainable}`, width {width}**", ""]
        places = [*found[0]["accuracy"], "relearned text", "relearned image"]
        text += [*table(["budget", "choice", "gap", *places], rows), ""]
    text += [
        "**snr against the others** (mean paired difference ± its standard error, points; p where it was claimed)",
        "",
    ]
    rows = []
    for names in (TESTED, SHOWN):
        tests = list(product(names, WIDTHS, OTHERS))
        pairs = [(numbers[what, width, "snr"], numbers[what, width, other]) for what, width, other in tests]
        corrected = holm([float(ttest_rel(*pair).pvalue) for pair in pairs])
        for (what, width, other), pair, p in zip(tests, pairs, corrected, strict=True):
            claimed = f"{p:.2g}" if names is TESTED else "–"
            rows.append([what, str(width), other, *compared(*pair), claimed])
    text += table(["what", "width", "against", "difference", "sets won", "p, Holm"], rows)
    if all(Lines(folder / f"explore-{part}-{WIDTHS[0]}.jsonl").found for part in ("text", "vision", "edit")):
        text += ["", *explored(folder, WIDTHS[0], pruned[WIDTHS[0]])]
    (folder / "tables.md").write_text("\n".join(text) + "\n")
    picture(folder, pruned)


def explored(folder: Path, width: int, pruned: Lines) -> list[str]:
    """Tables of what bench/explore.py found."""
    text, rows, first = [], [], []
    chosen = Lines(folder / f"explore-text-{width}.jsonl")
    for choice, lines in (("snr", pruned), ("both", chosen), ("again", chosen)):
        curves = [[curve(lines, choice, s, "stack", kind, ROUNDS, start=pruned) for s in SETS] for kind in PLACES]
        found = [[read_at(one) for one in some] for some in curves]
        first = found[0] if choice == "snr" else first
        rows.append([choice, *map(shown, found), *compared(found[0], first)])
    text += ["**Prune only, explored**: drop at 5 points of damage, 30 % of the tower at most", ""]
    text += [*table(["choice", "forget text", "forget image", "both", "text, minus snr's", "sets won"], rows), ""]
    union = [chosen[["union", s]] for s in SETS]
    sizes = [one["neurons"] for one in union]
    places = list(union[0]["accuracy"])
    rows = [[f"{np.mean(sizes):.0f}", *(f"{np.mean([one['accuracy'][p] for one in union]):.0f}" for p in places)]]
    text += ["**The union of the samples' own five per layer**, pruned", "", *table(["neurons", *places], rows), ""]
    seen, rows = Lines(folder / f"explore-vision-{width}.jsonl"), []
    for choice in ("snr", "ifi", "random"):
        curves = [curve(seen, choice, s, "layer", ("forget image",), FRACTIONS, "general image", pruned) for s in SETS]
        damage, fell = np.mean([one[-1] for one in curves], axis=0)
        rows.append([choice, shown([read_at(one) for one in curves]), f"{fell:.1f}", f"{damage:.1f}"])
    heads = ["choice", "forget image at 5 points of damage", "forget image at 40 %", "damage at 40 %"]
    text += ["**Prune only, vision tower**: damage on retain people and general pictures", "", *table(heads, rows), ""]
    edits, rows = Lines(folder / f"explore-edit-{width}.jsonl"), []
    for how in EDITS:
        found = [edits[[how, s, "path", BUDGET]] for s in SETS]
        columns = [[one["accuracy"][place] for one in found] for place in places]
        back = [[one["relearned"][kind] for one in found] for kind in ("text", "image")]
        gaps = [gap(one["accuracy"]) for one in found]
        first = gaps if how == EDITS[0] else first
        rows.append([how, shown(gaps), *(f"{np.mean(c):.0f}" for c in columns), *map(shown, back)])
        rows[-1] += compared(gaps, first)
    heads = ["edit", "gap", *places, "relearned text", "relearned image", "gap, minus snr's", "sets won"]
    return [*text, "**RMisU `path` at 3 %, explored**", "", *table(heads, rows), ""]


PLACES = (("forget text",), ("forget image",), ("forget text", "forget image"))


def picture(folder: Path, pruned: dict[int, Lines]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, (width, lines) in zip(figure.subplots(1, len(pruned), sharey=True), pruned.items(), strict=True):
        for choice in CHOICES:
            points = np.mean([curve(lines, choice, s, "stack", ("forget text",)) for s in SETS], 0)
            axes.plot(*points.T, marker="o", ms=3, label=choice)
        axes.axvline(LIMIT, color="#CCCCCC", zorder=0)
        axes.set(title=f"FFN width {width}", xlabel="damage to retain or general, points", xlim=(-2, 40))
    figure.axes[0].set_ylabel("drop of forget text, points")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(CHOICES), frameon=False)
    figure.savefig(folder / "curves.png", dpi=200)


if __name__ == "__main__":
    main()
