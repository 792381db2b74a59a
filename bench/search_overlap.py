"""What each way of searching costs, and how far its path is from a fine one, on the trained demo model.

    python bench/search_overlap.py [--samples 40] [--out bench/results/cpu/search_overlap.json]

Per layer and sample: Jaccard of the top 5 and Spearman of all scores with those of a greedy search of 12 Gauss nodes.
Random weights would not do: on them nearly everything agrees. Samples are questions in the held-out wording, one text
and one vision set, drawn with seed 0. One thread, no residuals; times are CPU seconds, medians of rounds that take
every setting once.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from fixed import locate

from mipfast.demo.run import load_base
from mipfast.files import versions
from mipfast.judge.accuracy import evaluate

FINE = dict(search="greedy", method="gausslegendre", n_steps=12)
SETTINGS = {
    "text": {
        "greedy Gauss-Legendre 4": {},
        "greedy Radau 3": dict(method="gaussradau", n_steps=3),
        "greedy left 4": dict(method="riemann_left", n_steps=4),
        "greedy left 20": dict(method="riemann_left", n_steps=20),
        "greedy Gauss-Legendre 8": dict(n_steps=8),
        "greedy Gauss-Legendre 24": dict(n_steps=24),  # how fine 12 nodes are
        "pointwise Gauss-Legendre 4": dict(search="pointwise"),
        "one-pass": dict(search="one-pass"),
    },
    "vision": {
        "greedy Radau 2": {},
        "greedy Gauss-Legendre 2": dict(method="gausslegendre", n_steps=2),
        "greedy left 4": dict(method="riemann_left", n_steps=4),
        "pointwise Radau 2": dict(search="pointwise"),
        "one-pass": dict(search="one-pass"),
    },
}


def draw(encoder, modality, count):
    kind = "text" if modality == "text" else "image"
    pool = [q for q in encoder.world.questions if q.test and q.modality == kind and q.subject is not None]
    return encoder.batch(random.Random(0).sample(pool, count))


def rows_per_layer(settings, modality):
    """Copies of a sample that run per layer; the clean run of all layers is one more, once."""
    method = settings.get("method", "gausslegendre" if modality == "text" else "gaussradau")
    steps = settings.get("n_steps", 4 if modality == "text" else 2)
    if settings.get("search") == "one-pass":
        return 0
    return steps - 1 if method in ("gaussradau", "riemann_right") else steps


def jaccard(a, b):
    """[n,L,k] and [n,L,k] -> [n,L]."""
    both = (a[..., :, None] == b[..., None, :]).sum((-1, -2)).float()
    return both / (2 * a.shape[-1] - both)


def spearman(a, b):
    """[n,L,F] and [n,L,F] -> [n,L]."""
    ranks = [x.argsort(-1).argsort(-1).double() for x in (a, b)]
    a, b = (r - r.mean(-1, keepdim=True) for r in ranks)
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def rounded(values):
    return [float(f"{v:.2g}") for v in values.tolist()]


def measure(model, batch, modality, rounds):
    options = dict(modality=modality, residuals="none")
    truth = locate(model, batch, **options, **FINE)
    found, seconds = {}, {}
    for _ in range(rounds):
        for name, settings in SETTINGS[modality].items():
            start = time.process_time()
            found[name] = locate(model, batch, **options, **settings)
            seconds.setdefault(name, []).append(time.process_time() - start)
    table = []
    for name, settings in SETTINGS[modality].items():
        jac, rho = jaccard(found[name].path, truth.path), spearman(found[name].scores, truth.scores)
        took = statistics.median(seconds[name])
        table.append(
            {
                "modality": modality,
                "search": name,
                "jaccard": round(jac.mean().item(), 3),
                "jaccard_per_layer": [round(v, 3) for v in jac.mean(0).tolist()],
                "spearman": round(rho.mean().item(), 3),
                "spearman_per_layer": [round(v, 3) for v in rho.mean(0).tolist()],
                "rows_per_layer": rows_per_layer(settings, modality),
                "cpu_seconds": round(took, 4),
                "cpu_ratio": round(took / statistics.median(seconds[next(iter(SETTINGS[modality]))]), 2),
            }
        )
    return table


def changes(model, batch, modality):
    """|F(1) - F(0)| [n,L] of the default's layers without a path: how much there is to attribute."""
    settings = dict(modality=modality, search="pointwise", method="gausslegendre", n_steps=24, score="igi")
    return locate(model, batch, **settings, residuals="none").scores.sum(-1).abs()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu" / "search_overlap.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, encoder = load_base()
    table, facts = [], {}
    for modality in SETTINGS:
        batch = draw(encoder, modality, args.samples)
        table += measure(model, batch, modality, args.rounds)
        residuals = torch.tensor(locate(model, batch, modality=modality, residuals="all").report["residuals"])
        facts[modality] = {
            "percent_right": evaluate(model, [batch]).accuracy,
            "change_median_per_layer": rounded(changes(model, batch, modality).quantile(0.5, dim=0)),
            "default_residual_median_per_layer": rounded(residuals.quantile(0.5, dim=0)),
        }
    for modality in SETTINGS:
        print(f"\n{modality}: {facts[modality]}")
        print(f"\n| {modality} | Jaccard | per layer | Spearman | per layer | rows per layer | CPU time |")
        print("|---|---|---|---|---|---|---|")
        for row in table:
            if row["modality"] == modality:
                layers = (" ".join(f"{v:.2f}" for v in row[f"{key}_per_layer"]) for key in ("jaccard", "spearman"))
                jac, rho = layers
                print(
                    f"| {row['search']} | {row['jaccard']:.2f} | {jac} | {row['spearman']:.3f} | {rho} "
                    f"| {row['rows_per_layer']} | {row['cpu_ratio']:.2f} |"
                )
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg(), "threads": 1}
    config = {"samples": args.samples, "rounds": args.rounds, "seed": 0, "truth": FINE, "top_k": 5}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps(
            {"machine": machine, "versions": versions(), "config": config, "samples": facts, "rows": table}, indent=1
        )
        + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
