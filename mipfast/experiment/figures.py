"""What pictures share: colours, style, bars with their spread."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from mipfast.errors import check_installed
from mipfast.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


GROUPS, MODALITIES = ("forget", "retain", "general"), ("text", "image")
AIM = {"forget": "lower is better", "retain": "higher is better", "general": "higher is better"}
# From Okabe and Ito's palette, which colour-blind readers can tell apart
COLOUR = {"text": "#0072B2", "image": "#E69F00", "forget": "#D55E00", "retain": "#404040"}
PALE = "#CCCCCC"
P = ParamSpec("P")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "figure.titlesize": 11,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a dollar in a run's name is no formula
}


def write_figure(path: Path, figure: Figure) -> None:
    # 200 dpi of 9 inches: twice the 900 pixels a page usually gives it
    write_atomic(path, functools.partial(figure.savefig, dpi=200))


def drawing(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Run draw in one style, whatever the user's matplotlibrc says, or say how to get matplotlib."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        check_installed("a figure", "eval", "matplotlib")
        import matplotlib.style

        with matplotlib.style.context(["default", STYLE]):
            return draw(*args, **kwargs)

    return styled


@drawing
def bars_figure(title: str, results: dict[str, Any], groups: Sequence[str] = GROUPS) -> Figure:
    """Bars by row and modality, one panel per group, percent; whiskers are the sample sd over seeds."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    headings: dict[float, str] = {}
    bars: dict[float, dict[str, Any]] = {}
    y = 0.0
    for stage, rows in stages(results):
        headings[y] = stage
        for row in rows:
            y += 1
            bars[y] = row
        y += 1.2
    ticks = headings | {y: row["name"] for y, row in bars.items()}
    figure = Figure(figsize=(9, 1.2 + 0.36 * y), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, group in zip(panels, groups, strict=True):
        axes.set_title(f"{group}: {AIM[group]}")
        for y, row in bars.items():
            for modality, shift in (("text", -0.19), ("image", 0.19)):
                _bar(axes, y + shift, accuracies(row, group, modality), COLOUR[modality])
        for y in list(headings)[1:]:
            axes.axhline(y - 0.6, color=PALE, linewidth=0.8)
        axes.set(xlim=(0, 140), xticks=range(0, 101, 25), ylim=(max(ticks) + 0.6, -0.6))
        axes.set_yticks(list(ticks), list(ticks.values()))
        axes.tick_params(axis="y", length=0)
        axes.spines["bottom"].set_bounds(0, 100)
    # only the first of panels that share their y axis shows labels
    for at, label in zip(ticks, panels[0].get_yticklabels(), strict=True):
        label.set_fontweight("bold" if at in headings else "normal")
    handles = [Patch(color=COLOUR[modality], label=f"{modality} questions") for modality in MODALITIES]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


@drawing
def size_figure(origin: dict[str, Any], title: str = "") -> Figure:
    """What `fit_path` tried, from its path's origin: NLL of forget answers, and damage to retain answers, over the
    number of neurons; a line marks the chosen size."""
    from matplotlib.figure import Figure

    (before, *sizes), limit = origin["curve"], origin["max_damage"]
    neurons = [size["neurons"] for size in sizes]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    figure.suptitle(f"{title}: {origin['neurons']} neurons" if title else f"{origin['neurons']} neurons")
    known, damage = figure.subplots(1, 2)
    known.axhline(before["forget"], color=PALE, label="unpruned")
    known.plot(neurons, [size["forget"] for size in sizes], marker="o", ms=4, color=COLOUR["forget"])
    known.set(title="forget answers: higher is more forgotten", ylabel="NLL, nats per token")
    damage.axhline(limit, color=PALE, label="allowed")
    damage.plot(neurons, [size["damage"] for size in sizes], marker="o", ms=4, color=COLOUR["retain"])
    damage.set_yscale("symlog", linthresh=limit)  # what counts is about the limit, and the last sizes are far beyond it
    damage.yaxis.set_major_formatter("{x:g}")  # symlog's own writes its 0 as a formula, which STYLE leaves as it is
    damage.set(title="retain answers: lower is better", ylabel="damage, nats per token")
    for axes in (known, damage):
        axes.axvline(origin["neurons"], color=COLOUR["retain"], linewidth=0.8, ls="--", label="chosen")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("neurons pruned")
        axes.legend(loc="upper left")
    return figure


def stages(results: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    return [(stage, list(rows)) for stage, rows in groupby(results["rows"], key=lambda row: row["stage"])]


def accuracies(row: dict[str, Any], group: str, modality: str) -> list[float]:
    return row["accuracy"].get(group, {}).get(modality, [])


def spread(values: list[float], seeds: int, digits: int = 1) -> str:
    """Mean ± sample sd, and n where not every seed has a value; a dash without values."""
    if not values:
        return "–"
    text = f"{fmean(values):.{digits}f}" + (f" ± {sample_sd(values):.{digits}f}" if len(values) > 1 else "")
    return text if len(values) == seeds else f"{text} (n={len(values)})"


def sample_sd(values: list[float]) -> float:
    """0 for a single value; nan for nan, where statistics.stdev fails."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _bar(axes: Axes, y: float, values: list[float], colour: str) -> None:
    if not values or not np.isfinite(values).all():
        why = "not finite" if values else "not measured"
        axes.text(2, y, why, va="center", fontsize=7.5, color="#595959")
        return
    mean, sd = fmean(values), sample_sd(values)
    axes.barh(y, mean, height=0.36, color=colour, xerr=sd or None, error_kw={"elinewidth": 0.9})
    axes.text(mean + sd + 2, y, f"{mean:.1f}", va="center", fontsize=7.5)
