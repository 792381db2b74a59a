"""Choose the demo's settings: eight per row, judged on forget sets 100-102, which no reported number uses.

    python bench/tune_demo.py [--seeds 100 101 102] [--rows MIP random ...] [--out bench/results/demo_tuning.json]

The score of a setting is mean accuracy on retain and general minus mean accuracy on forget, both modalities, all seeds.
First looks on forget set 100 placed the grids. Every result is a line of the .jsonl file beside out as soon as it is
there. What either file has is not run again: a run that was cut off goes on where it stopped, and two runs of other
rows may share the files.
"""

import argparse
import json
import logging
import statistics
from dataclasses import asdict
from pathlib import Path

import torch

from mipfast.demo import run
from mipfast.demo.trial import ROWS, Setting, Trial
from mipfast.files import write_atomic

PRUNES = ("snr", "mean", "random prune")
PATH_GRID = [Setting(fraction, lr, 0.5) for fraction in (0.03, 0.10) for lr in (3e-3, 1e-2)]
PATH_GRID += [Setting(0.10, lr, alpha) for alpha in (0.25, 0.1) for lr in (3e-3, 1e-2)]
# less trains than in MIP: higher rates, and more weight on what should stay
PART_GRID = [Setting(fraction, lr, 0.5) for fraction in (0.03, 0.10) for lr in (1e-2, 2e-2)]
PART_GRID += [Setting(0.10, lr, alpha) for alpha in (0.25, 0.75) for lr in (1e-2, 2e-2)]
# without a retain loss there is one good moment to stop: two lengths of the way (lr x steps) at four rates; 3e-3, tried
# on the three sets too, left three quarters of forget text
ASCENT_GRID = [Setting(lr=lr, steps=round(way / lr)) for lr in (1e-4, 2.5e-4, 5e-4, 1e-3) for way in (6e-3, 8e-3)]
PAIR_GRID = [Setting(lr=lr, alpha=alpha) for alpha in (0.5, 0.8) for lr in (2.5e-4, 5e-4)]
PAIR_GRID += [Setting(lr=5e-4, alpha=0.9), Setting(lr=5e-4, alpha=0.8, steps=40)]
PAIR_GRID += [Setting(lr=1e-3, alpha=alpha) for alpha in (0.8, 0.9)]
RMU_GRID = [Setting(lr=lr, alpha=0.5) for lr in (3e-3, 1e-2, 2e-2)]
RMU_GRID += [Setting(lr=lr, alpha=alpha) for lr, alpha in ((1e-2, 0.25), (1e-2, 0.75), (2e-2, 0.75))]
RMU_GRID += [Setting(lr=1e-2, alpha=0.5, coeff=coeff) for coeff in (0.5, 2.0)]
GRID = {
    "MIP": PATH_GRID,
    "random": PATH_GRID,
    "IGI only": PATH_GRID,
    "IFI only": PATH_GRID,
    "plain RMU": [Setting(1.0, lr, 0.5) for lr in (2.5e-4, 5e-4, 1e-3, 2e-3)]
    + [Setting(1.0, lr, alpha) for alpha in (0.25, 0.1) for lr in (5e-4, 1e-3)],
    "MIP down": PART_GRID,
    "MIP learned": PATH_GRID,
    "MIP LoRA": PART_GRID,
    "GradDiff": PAIR_GRID,
    "NPO + retain": PAIR_GRID,
    "KL": PAIR_GRID,
    "NPO": ASCENT_GRID,
    "GA": ASCENT_GRID,
    "RMU": RMU_GRID,
    "adaptive RMU": RMU_GRID,
    "MANU": [Setting(fraction) for fraction in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)],
    "least": PATH_GRID,
}


def found(out: Path) -> dict[tuple, dict]:
    """What was tried: {(seed, row, setting): result}."""
    lines = out.with_suffix(".jsonl")
    tried = json.loads(out.read_text())["tried"] if out.exists() else []
    tried += [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    return {(one["seed"], one["row"], one["setting"] and Setting(**one["setting"])): one for one in tried}


def means(tried: dict[tuple, dict], seeds: list[int]) -> dict[str, dict[Setting, float]]:
    """{row: {setting: score}} of the rows that are complete."""
    return {
        row: {
            setting: statistics.mean(run.gap(tried[seed, row, setting]["accuracy"]) for seed in seeds)
            for setting in grid
        }
        for row, grid in GRID.items()
        if all((seed, row, setting) in tried for seed in seeds for setting in grid)
    }


def shown(seeds: list[int], best: dict[str, dict], tried: dict[tuple, dict]) -> str:
    """JSON, with a line for each try."""
    lines = ",\n".join(json.dumps(one) for one in tried.values())
    return f'{{"seeds": {json.dumps(seeds)},\n"chosen": {json.dumps(best)},\n"tried": [\n{lines}\n]}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--rows", nargs="+", default=list(GRID))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "demo_tuning.json")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    have = found(args.out)
    model, encoder = run.load_base()
    trials = {seed: Trial(model, encoder, encoder.world.split(seed), seed, progress=False) for seed in args.seeds}

    def located(seed: int) -> Trial:
        if "locate" not in trials[seed].seconds:
            trials[seed].locate()
        return trials[seed]

    def keep(seed: int, row: str, setting: Setting | None, accuracy: dict) -> None:
        line = json.dumps({"seed": seed, "row": row, "setting": setting and asdict(setting), "accuracy": accuracy})
        with args.out.with_suffix(".jsonl").open("a") as lines:
            lines.write(line + "\n")
        print(line, flush=True)

    for name, seed in [(name, seed) for name in PRUNES for seed in args.seeds]:
        if (seed, name, None) not in have:
            with trials[seed].pruned(located(seed).prune_paths()[name]):
                keep(seed, name, None, trials[seed].judge()[0])
    for row, seed in [(row, seed) for row in args.rows for seed in args.seeds]:
        for setting in [setting for setting in GRID[row] if (seed, row, setting) not in have]:
            trial = located(seed) if ROWS[row].stage == "RMisU" else trials[seed]
            with trial.edited(row, setting):
                keep(seed, row, setting, trial.judge()[0])
    tried = found(args.out)
    best = {}
    for row, scores in means(tried, args.seeds).items():
        best[row] = asdict(max(scores, key=scores.__getitem__))
        print(row, {str(setting): round(value, 1) for setting, value in scores.items()})
    write_atomic(args.out, lambda path: path.write_text(shown(args.seeds, best, tried)))


if __name__ == "__main__":
    main()
