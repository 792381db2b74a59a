"""The tables, tests and picture of docs/selection.md from what bench/selection.py found.

python bench/selection_report.py     writes bench/results/selection/{tables.md,curves.png}
"""

from itertools import product

import numpy as np
from scipy.stats import ttest_rel
from selection import BUDGETS, CHOICES, FRACTIONS, RATES, RESULTS, SETS, WIDTHS, Lines

LIMIT = 5.0  # points of damage at which a curve is read
OTHERS = {"prune": ("mean", "random", "cf-snr"), "down 0.03": ("mean", "random", "cf-snr")}


def drop(before: dict[str, float], after: dict[str, float], *places: str) -> float:
    return float(np.mean([before[place] - after[place] for place in places]))


def curve(lines: Lines, choice: str, seed: int, scope: str, *forget: str) -> list[tuple[float, float]]:
    """(damage, forget drop) in points at every fraction, from nothing pruned."""
    before = lines[["before", seed]]["accuracy"]
    points = [(0.0, 0.0)]
    for fraction in FRACTIONS:
        after = lines[[choice, seed, scope, fraction]]["accuracy"]
        damage = max(drop(before, after, "retain text", "retain image"), drop(before, after, "general text"))
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


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"] + [
        "| " + " | ".join(row) + " |" for row in rows
    ]


def main() -> None:
    pruned = {width: Lines(RESULTS / f"prune-{width}.jsonl") for width in WIDTHS}
    edited = {width: Lines(RESULTS / f"edit-{width}.jsonl") for width in WIDTHS}
    text, numbers = [], {}
    for width, scope in product(WIDTHS, ("stack", "layer")):
        rows = []
        for choice in CHOICES:
            found = [[read_at(curve(pruned[width], choice, s, scope, *places)) for s in SETS] for places in PLACES]
            numbers["prune" if scope == "stack" else "prune per layer", width, choice] = found[0]
            rows.append([choice, *map(shown, found)])
        where = "ranked over the tower" if scope == "stack" else "ranked per layer"
        text += [f"**Prune only, width {width}, {where}**: drop at 5 points of damage", ""]
        text += [*table(["choice", "forget text", "forget image", "both"], rows), ""]
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
    tests = [(what, width, other) for what, others in OTHERS.items() for width in WIDTHS for other in others]
    pairs = [(numbers[what, width, "snr"], numbers[what, width, other]) for what, width, other in tests]
    corrected = holm([float(ttest_rel(*pair).pvalue) for pair in pairs])
    rows = []
    for (what, width, other), (ours, theirs), p in zip(tests, pairs, corrected, strict=True):
        difference = np.subtract(ours, theirs)
        error = difference.std(ddof=1) / len(difference) ** 0.5
        wins = f"{(difference > 0).sum()} of {len(difference)}"
        rows.append([what, str(width), other, f"{difference.mean():+.1f} ± {error:.1f}", wins, f"{p:.2g}"])
    text += ["**snr against the others** (mean paired difference ± its standard error, points)", ""]
    text += table(["what", "width", "against", "difference", "sets won", "p, Holm"], rows)
    (RESULTS / "tables.md").write_text("\n".join(text) + "\n")
    picture(pruned)


PLACES = (("forget text",), ("forget image",), ("forget text", "forget image"))


def picture(pruned: dict[int, Lines]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, (width, lines) in zip(figure.subplots(1, len(pruned), sharey=True), pruned.items(), strict=True):
        for choice in CHOICES:
            points = np.mean([curve(lines, choice, s, "stack", "forget text") for s in SETS], 0)
            axes.plot(*points.T, marker="o", ms=3, label=choice)
        axes.axvline(LIMIT, color="#CCCCCC", zorder=0)
        axes.set(title=f"FFN width {width}", xlabel="damage to retain or general, points", xlim=(-2, 40))
    figure.axes[0].set_ylabel("drop of forget text, points")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(CHOICES), frameon=False)
    figure.savefig(RESULTS / "curves.png", dpi=200)


if __name__ == "__main__":
    main()
