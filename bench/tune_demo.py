"""Choose the demo's settings: eight per row, judged on forget sets 100-102, which no reported number uses.

    python bench/tune_demo.py [--seeds 100 101 102] [--rows MIP random ...] [--out bench/results/demo_tuning.json]

The score of a setting is mean accuracy on retain and general minus mean accuracy on forget, both modalities, all seeds.
"""

import argparse
import json
import logging
import statistics
from dataclasses import asdict
from pathlib import Path

import torch

from mipfast.demo import run
from mipfast.demo.trial import MODALITIES, Setting, Trial

PATH_GRID = [Setting(fraction, lr, 0.5) for fraction in (0.03, 0.10) for lr in (3e-3, 1e-2)]
PATH_GRID += [Setting(0.10, lr, alpha) for alpha in (0.25, 0.1) for lr in (3e-3, 1e-2)]
GRID = {
    "MIP": PATH_GRID,
    "random": PATH_GRID,
    "IGI only": PATH_GRID,
    "IFI only": PATH_GRID,
    "plain RMU": [Setting(1.0, lr, 0.5) for lr in (2.5e-4, 5e-4, 1e-3, 2e-3)]
    + [Setting(1.0, lr, alpha) for alpha in (0.25, 0.1) for lr in (5e-4, 1e-3)],
}


def score(accuracy: dict) -> float:
    kept = [accuracy[group][kind] for group in ("retain", "general") for kind in MODALITIES]
    return statistics.mean(kept) - statistics.mean(accuracy["forget"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--rows", nargs="+", default=list(GRID))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "demo_tuning.json")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    model, encoder = run.load_base()
    results = []
    for seed in args.seeds:
        trial = Trial(model, encoder, encoder.world.split(seed), seed, progress=False)
        trial.locate()
        for name, path in trial.prune_paths().items():
            with trial.pruned(path):
                results.append({"seed": seed, "row": name, "setting": None, "accuracy": trial.judge()[0]})
                print(json.dumps(results[-1]), flush=True)
        for row in args.rows:
            for setting in GRID[row]:
                with trial.edited(row, setting):
                    accuracy = trial.judge()[0]
                results.append(
                    {
                        "seed": seed,
                        "row": row,
                        "setting": asdict(setting),
                        "accuracy": accuracy,
                        "score": score(accuracy),
                    }
                )
                print(json.dumps(results[-1]), flush=True)
        print(trial.seconds, flush=True)
    best = {}
    for row in args.rows:
        means = {
            setting: statistics.mean(r["score"] for r in results if r["row"] == row and r["setting"] == asdict(setting))
            for setting in GRID[row]
        }
        best[row] = asdict(max(means, key=means.__getitem__))
        print(row, {str(s): round(v, 1) for s, v in means.items()})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"seeds": args.seeds, "chosen": best, "tried": results}, indent=1))


if __name__ == "__main__":
    main()
