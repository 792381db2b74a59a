"""The pictures of the page, from the dict of `findings.collect`."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

from mipfast.experiment.figures import COLOUR, MODALITIES, PALE, drawing, sample_sd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = dict[str, list[float]]  # {modality: [per seed]}
PLACES = {"same": "this modality", "other": "only the other modality", "neither": "neither"}


@drawing
def attacks_figure(found: dict[str, dict[str, Values]]) -> Figure:
    """A panel for each attack, bars by row and modality with the sample sd, dashed lines at the retrained model."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    names = list(dict.fromkeys(row for values in found.values() for row in values))
    figure = Figure(figsize=(9, 0.8 + lines * (0.7 + 0.28 * len(names))), layout="constrained")
    figure.suptitle("What each attack brings back, percent: nearer the dashed lines is better")
    panels = figure.subplots(lines, columns, sharey=True, sharex=True, squeeze=False).flat
    for axes, (name, values) in zip(panels, found.items(), strict=False):
        axes.set_title(name)
        for kind, shift in (("text", -0.19), ("image", 0.19)):
            for y, row in enumerate(names):
                if some := values.get(row, {}).get(kind):
                    bar = {"xerr": sample_sd(some) or None, "error_kw": {"elinewidth": 0.9}}
                    axes.barh(y + shift, fmean(some), height=0.36, color=COLOUR[kind], **bar)
            if target := values.get("retrained", {}).get(kind):
                axes.axvline(fmean(target), color=COLOUR[kind], ls="--", linewidth=1)
        axes.set(xlim=(0, 110), ylim=(len(names) - 0.4, -0.6))
        axes.set_yticks(range(len(names)), names)
    for axes in list(panels)[len(found) :]:
        axes.set_axis_off()
    handles = [
        *(Patch(color=COLOUR[kind], label=f"{kind} questions") for kind in MODALITIES),
        Line2D([], [], color=COLOUR["retain"], ls="--", label="retrained"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


@drawing
def cross_modal_figure(arms: list[dict[str, Any]]) -> Figure:
    """Forget accuracy by share, a panel for each modality, a line for where the edit used the fact."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle("Facts the edit used in one modality, asked in both")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), MODALITIES, strict=True):
        for (where, name), style, colour in zip(
            PLACES.items(), ("o-", "s--", "^:"), (COLOUR["retain"], COLOUR["forget"], PALE), strict=True
        ):
            points = [(100 * arm["share"], arm["seen"][where][kind]) for arm in arms if arm["seen"][where][kind]]
            if points:
                xs, values = zip(*points, strict=True)
                sds = [sample_sd(some) for some in values]
                axes.errorbar(xs, [*map(fmean, values)], sds, fmt=style, color=colour, capsize=2, label=name)
        axes.set_title(f"{kind} questions")
        axes.set(
            xlabel="facts in both modalities, percent", ylim=(-2, 105), xticks=[100 * arm["share"] for arm in arms]
        )
    figure.axes[0].set_ylabel("forget accuracy, percent")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, title="the edit used the fact in", loc="outside right upper")
    return figure


@drawing
def sweep_figure(cells: list[dict[str, Any]]) -> Figure:
    """The gap by learning rate and forget batch, a panel for each ratio; what is not stable is hatched."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    ratios, batches, rates = (sorted({cell[name] for cell in cells}) for name in ("ratio", "batch", "lr"))
    hatch = {"collapsed": "xxx", "not forgotten": "..."}
    figure = Figure(figsize=(9, 1.6 + 0.5 * len(batches)), layout="constrained")
    figure.suptitle("Gap (retain and general minus forget, points) by setting")
    panels = figure.subplots(1, len(ratios), sharey=True, squeeze=False)[0]
    for axes, ratio in zip(panels, ratios, strict=True):
        for cell in (cell for cell in cells if cell["ratio"] == ratio):
            x, y = rates.index(cell["lr"]), batches.index(cell["batch"])
            shade = max(0.0, min(1.0, (cell["gap"] or 0) / 100))
            face = colormaps["Blues"](0.8 * shade)
            edge = COLOUR["retain"] if cell["region"] in hatch else PALE
            axes.add_patch(
                Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=face, edgecolor=edge, hatch=hatch.get(cell["region"]))
            )
            shown = "–" if cell["gap"] is None else f"{cell['gap']:.0f}"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axes.text(x, y, shown, ha="center", va="center", bbox=box)
        axes.set_title(f"{100 * ratio:.0f} % of the people")
        axes.set(xlim=(-0.5, len(rates) - 0.5), ylim=(-0.5, len(batches) - 0.5), xlabel="learning rate")
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axes.set_yticks(range(len(batches)), map(str, batches))
    panels[0].set_ylabel("forget questions a step")
    handles = [Patch(facecolor="white", edgecolor=COLOUR["retain"], hatch=h, label=name) for name, h in hatch.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure
