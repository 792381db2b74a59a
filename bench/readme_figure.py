"""The README's picture, from what `mipfast demo` wrote: `python bench/readme_figure.py [demo-report] [OUT.png]`.
The reference that never saw the people is there after `mipfast demo --retrain`.

Left: every FFN neuron of the demo's model as a dot, those of the located path lit. Right: what is still answered
about the forgotten people and about the others, beside as many random neurons and a model that never saw them.
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mipfast.experiment.figures import COLOUR, drawing, write_figure

OUT = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "demo.png"
LIT, KEPT, DIM, TEXT = COLOUR["forget"], COLOUR["text"], "#D9D9D9", "#404040"
TALL = 8  # dots in a column: a layer of 1024 neurons is 128 wide
ROWS = [  # a heading, or (stage, row) of the report and its label
    ("before", "before", "before"),
    "neurons switched off",
    ("prune only", "snr", "located"),
    ("prune only", "random", "random"),
    "off, then trained (RMisU)",
    ("RMisU", "MIP", "located"),
    ("RMisU", "random", "random"),
    "trained without the five",
    ("reference", "retrained", "reference"),
]


@drawing
def picture(results: dict[str, Any]) -> Figure:
    """The report's first forget set. Raises KeyError for a report without the rows and paths that are drawn."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    neurons, text, image = figure.subplots(1, 3, width_ratios=[2.75, 1, 1])
    draw_neurons(neurons, results["paths"]["MIP"]["stacks"])
    rows = {(row["stage"], row["name"]): row for row in results["rows"]}
    draw_answers(text, rows, "text", "% right, asked in words")
    draw_answers(image, rows, "image", "% right, by picture")
    image.tick_params(labelleft=False)
    handles = text.get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside lower right", ncols=2, fontsize=8.5, handletextpad=0.2)
    figure.text(0.01, 0.02, "Toy model, invented people, one forget set.", fontsize=8.5, color=TEXT)
    return figure


def draw_neurons(axes: Axes, stacks: dict[str, Any]) -> None:
    """Layers upwards: the vision tower, then the language model, all dots on one scale."""
    widest = max(-(-stack["num_neurons"] // TALL) for stack in stacks.values())
    small = {"fontsize": 8, "color": TEXT, "va": "center"}
    y, lit = 0.0, 0
    for name, stack in sorted(stacks.items(), key=lambda item: "visual" not in item[0]):
        kind, entry = ("vision", "picture ↑") if "visual" in name else ("text", "question ↑")
        left = (widest + stack["num_neurons"] // -TALL) / 2
        axes.text(widest / 2 if kind == "vision" else 0, y - 4.5, entry, ha="center" if y == 0 else "left", **small)
        for layer in range(stack["num_layers"]):
            chosen = set(stack["neurons"].get(str(layer), ()))
            for colour, size, which in ((DIM, 1.8, False), (LIT, 8, True)):
                dots = [j for j in range(stack["num_neurons"]) if (j in chosen) == which]
                xs, ys = [left + j // TALL for j in dots], [y + j % TALL for j in dots]
                axes.scatter(xs, ys, size, colour, linewidths=0, zorder=2 + which)
            lit += len(chosen)
            axes.text(left - 3, y + TALL / 2 - 0.5, f"{kind} {layer}", ha="right", **small)
            y += TALL + 3
        y += 6
    axes.text(widest / 2, y - 5, "answer ↑", ha="center", **small)
    axes.set_title(f"Lit: the {lit} neurons located")
    axes.set(xlim=(-17, widest + 1), ylim=(-8, y - 2))
    axes.set_aspect("equal", anchor="N")
    axes.axis("off")


def draw_answers(axes: Axes, rows: dict[tuple[str, str], Any], modality: str, title: str) -> None:
    """A line a row: the forgotten people's dot and everybody else's square, in percent."""
    ticks: list[tuple[float, str]] = []
    y = 0.0
    for entry in ROWS:
        if isinstance(entry, str):
            y += 0.25
            ticks.append((y, entry))
        else:
            stage, name, shown = entry
            accuracy = rows[stage, name]["accuracy"]
            if not accuracy["forget"][modality]:  # no reference was trained
                ticks.pop()
                y -= 1.25
                continue
            forget, retain = (accuracy[group][modality][0] for group in ("forget", "retain"))
            axes.plot([forget, retain], [y, y], color=DIM, linewidth=3, zorder=1, solid_capstyle="round")
            style = {"linewidths": 0, "zorder": 3, "clip_on": False}
            marks = ((retain, KEPT, "s", 60, "everybody else"), (forget, LIT, "o", 26, "the five to be forgotten"))
            for at, colour, marker, size, what in marks:
                axes.scatter([at], [y], size, colour, marker=marker, label=None if y else what, **style)
            axes.text(forget, y - 0.3, f"{forget:.0f}", ha="center", va="bottom", fontsize=7.5, color=LIT)
            ticks.append((y, shown))
        y += 1
    axes.set_yticks(*zip(*ticks, strict=True))
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in ROWS else "normal")
    axes.set(xlim=(-4, 104), ylim=(y - 0.4, -0.8), xticks=(0, 50, 100))
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_bounds(0, 100)
    axes.set_title(title, fontsize=9)


if __name__ == "__main__":
    folder, out = (*sys.argv[1:], *("demo-report", OUT)[len(sys.argv) - 1 :])
    write_figure(Path(out), picture(json.loads((Path(folder) / "report.json").read_text())))
