"""What a person looks at: one plain results dict as a table, pictures and a page.

results, JSON-only values:
    title: str; seeds: list[int]; config, versions, machine: dicts; seconds: {stage: float}; limits: list[str]
    rows: [{name, stage, note: str; neurons: int or None; accuracy: {group: {modality: [percent per seed]}}}];
        rows of one stage follow one another; an accuracy that was not measured is an empty list or absent
    paths (may be absent): {"MIP" and "random": {"stacks":
        {name: {num_layers: int, num_neurons: int, neurons: {layer as str: [index]}}}}}
    residuals (may be absent): {"MIP" and "random": {"forget" and "retain":
        {relative_norm: [per layer], points: [[x, y]]}}}
    steering_layer: int, wherever there are residuals
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mipfast.errors import InputError
from mipfast.experiment import page
from mipfast.experiment.figures import (
    COLOUR,
    GROUPS,
    MODALITIES,
    PALE,
    accuracies,
    bars_figure,
    drawing,
    spread,
    stages,
)
from mipfast.experiment.page import Bullets, Fold, Grid, Heading, Part, Plot, Verbatim
from mipfast.files import write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = [(group, modality) for group in GROUPS for modality in MODALITIES]


def accuracy_table(results: dict[str, Any]) -> Grid:
    """A line per row under a line per stage: accuracy in percent (mean ± sample sd over seeds)."""
    heads = ["method", "neurons", *map("\n".join, COLUMNS)]
    rows = []
    for stage, members in stages(results):
        rows += [[f"{stage}:", *[""] * (len(heads) - 1)], *(_cells(row, len(results["seeds"])) for row in members)]
    note = f"Accuracy in percent ({_seeds(results)}). Forget should be low, retain and general high."
    return Grid(results["title"], heads, rows, note=note)


def parts(results: dict[str, Any]) -> list[Part]:
    """The whole page."""
    facts = {key: results[key] for key in ("seeds", "config", "versions", "machine")}
    return [
        "What the model still answers, before and after each way of making it forget the forget set.",
        accuracy_table(results),
        *(
            Plot(name, alt, partial(draw, results))
            for name, (key, draw, alt) in FIGURES.items()
            if key == "rows" or _found(results, key)
        ),
        Heading("What each row is"),
        Bullets([f"{row['name']} ({row['stage']}): {row['note']}" for row in results["rows"]]),
        Heading("Time"),
        Grid("Seconds", ["stage", "seconds"], [[stage, f"{s:.2f}"] for stage, s in results["seconds"].items()]),
        Heading("Limits"),
        Bullets(results["limits"]),
        Fold("Configuration, versions, machine", [Verbatim(json.dumps(facts, indent=1))]),
    ]


def write_report(results: dict[str, Any], folder: str | Path) -> Path:
    """Write report.json, report.md with pictures/ (those whose data are there) and report.html; returns the path of
    report.md.

    Raises MipfastError without matplotlib; report.json is on disk by then.
    """
    folder = Path(folder)
    write_json(folder / "report.json", results)
    page.write(folder, results["title"], parts(results))
    return folder / "report.md"


def accuracy_figure(results: dict[str, Any]) -> Figure:
    """The test accuracy of every row as `bars_figure`."""
    return bars_figure(f"Test accuracy after each edit, percent ({_seeds(results)})", results)


@drawing
def path_figure(results: dict[str, Any]) -> Figure:
    """Every selected neuron as a tick, layers upwards, panels by stack; MIP beside the random path.

    Raises InputError where results["paths"] holds neither.
    """
    from matplotlib.figure import Figure

    methods = _methods(results, "paths")
    depths = [stack["num_layers"] for stack in results["paths"][methods[0]]["stacks"].values()]
    figure = Figure(figsize=(9, 0.6 + sum(0.9 + 0.22 * depth for depth in depths)), layout="constrained")
    figure.suptitle(f"The neurons of each path, with their number per layer (seed {results['seeds'][0]})")
    grid = figure.subplots(len(depths), len(methods), squeeze=False, height_ratios=[n + 1 for n in depths])
    for column, method in enumerate(methods):
        colour = COLOUR["forget"] if method == "MIP" else COLOUR["retain"]
        for line, (name, stack) in enumerate(results["paths"][method]["stacks"].items()):
            axes, layers, width = grid[line, column], range(stack["num_layers"]), stack["num_neurons"]
            rows = [stack["neurons"].get(str(layer), []) for layer in layers]
            axes.eventplot(rows, lineoffsets=layers, linelengths=0.8, linewidths=0.7, colors=colour)
            for layer, row in enumerate(rows):
                axes.annotate(str(len(row)), (1.01, layer), xycoords=("axes fraction", "data"), va="center")
            total, size = sum(map(len, rows)), len(rows) * width
            axes.set_title(f"{method}: {total:,} of {size:,} neurons in\n{name}")
            axes.set(xlim=(-0.01 * width, 1.01 * width), xlabel="neuron")
            axes.set(ylim=(-0.6, len(rows) - 0.4), yticks=layers[:: 1 + len(rows) // 16], ylabel="layer")
    return figure


@drawing
def residual_figure(results: dict[str, Any]) -> Figure:
    """How far the edit moved hidden states: relative norms per layer, residuals at the steering layer.

    Raises InputError where results["residuals"] holds neither MIP nor random.
    """
    from matplotlib.figure import Figure

    methods, steering = _methods(results, "residuals"), results["steering_layer"]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    figure.suptitle(f"How far the edit moved hidden states (seed {results['seeds'][0]})")
    norms, *scatters = figure.subplots(1, 1 + len(methods), width_ratios=[1.2, *(1 for _ in methods)])
    norms.axvline(steering, color=PALE, linewidth=6, zorder=0)
    every: list[list[float]] = []
    for method, axes in zip(methods, scatters, strict=True):
        line = "-" if method == "MIP" else "--"
        for group, marker in (("forget", "o"), ("retain", "^")):
            residual, colour = results["residuals"][method][group], COLOUR[group]
            label = f"{method}, {group}"
            norms.plot(residual["relative_norm"], color=colour, ls=line, marker=marker, ms=4, label=label)
            xs, ys = zip(*residual["points"], strict=True) if residual["points"] else ((), ())
            axes.scatter(xs, ys, 12, colour, marker=marker, alpha=0.6, linewidths=0)
            every += residual["points"]
        axes.set_title(f"{method}: residuals at layer {steering}")
        axes.set_xlabel("principal axis 1")
    scatters[0].set_ylabel("principal axis 2")
    # one scale for all scatters, x and y alike: else a small cloud looks as large as a big one
    ranges = [(min(values), max(values)) for values in zip(*every, strict=True)] or [(0.0, 0.0)] * 2
    half = 0.55 * max(high - low for low, high in ranges) or 1.0
    xlim, ylim = (((low + high) / 2 - half, (low + high) / 2 + half) for low, high in ranges)
    for axes in scatters:
        axes.set(xlim=xlim, ylim=ylim, aspect="equal")
    norms.set_title(f"mean |edited − original| / |original|\n(grey band: steering layer {steering})")
    norms.set(xlabel="layer", ylim=(0, None))
    norms.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


FIGURES: dict[str, tuple[str, Callable[[dict[str, Any]], Figure], str]] = {
    "accuracy.png": ("rows", accuracy_figure, "Accuracy by method, group and modality"),
    "path.png": ("paths", path_figure, "Neurons of the path by stack and layer"),
    "residuals.png": ("residuals", residual_figure, "How far hidden states moved, by layer and direction"),
}


def _found(results: dict[str, Any], key: str) -> list[str]:
    return [method for method in ("MIP", "random") if method in (results.get(key) or {})]


def _methods(results: dict[str, Any], key: str) -> list[str]:
    methods = _found(results, key)
    if not methods:
        holds = list(results.get(key) or {})
        raise InputError(f"nothing to draw: results[{key!r}] holds {holds}, expected 'MIP', 'random' or both")
    return methods


def _cells(row: dict[str, Any], seeds: int) -> list[str]:
    neurons = "–" if row["neurons"] is None else f"{row['neurons']:,}"
    return [row["name"], neurons, *(spread(accuracies(row, *column), seeds) for column in COLUMNS)]


def _seeds(results: dict[str, Any]) -> str:
    count, seeds = len(results["seeds"]), ", ".join(map(str, results["seeds"]))
    return f"one seed: {seeds}" if count == 1 else f"mean ± sample sd of {count} seeds: {seeds}"
