"""What scores of a stated error cost on a real model, against the procedures one would use otherwise.

    python bench/real/speed.py FOLDER_OR_HUB_NAME [--tol 0.01] [--rounds 3] [--out FILE.json]

CPU seconds of this process on one thread, medians of the rounds, baselines once; the self-check and the hash of the
weights are in no row. Before a time is shown, the error of the first sample's scores is taken against 128 substituted
nodes: ours must be at most twice tol, and of the plain procedure's 20 left steps ours at most a twentieth, in the
median layer. Plain: `bench/released.py`, 20 left steps, a sample at a time, as the released code runs. Of answers the
first token.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from converge import PROMPTS, along, batch_of, load, relative  # noqa: E402
from released import released_igi  # noqa: E402

from mipfast import locate  # noqa: E402
from mipfast.files import machine, versions, write_json  # noqa: E402
from mipfast.model.fingerprint import unchanged  # noqa: E402

LEFT = 20  # steps of the plain procedure: five times its own 4
TRUTH = dict(method="substituted", n_steps=128, residuals="none")


def seconds(call, rounds):
    """Median; a first call that is not timed fills caches."""
    took = []
    for _ in range(rounds + (rounds > 1)):
        start = time.process_time()
        call()
        took.append(time.process_time() - start)
    return statistics.median(took[-rounds:])


def checked(model, batch, tol):
    """(error of ours, of 20 left steps along the converged path) in every layer of one sample."""
    found, truth = locate(model, batch, tol=tol, residuals="none"), locate(model, batch, **TRUTH)
    settings = dict(method="substituted", n_steps=128)
    ours = relative(found.scores, along(found.path, model, batch, truth, **settings))[0]
    left = relative(along(truth.path, model, batch, method="riemann_left", n_steps=LEFT), truth.scores)[0]
    return ours, left


def samples_of(tokenizer, prompts, same, count):
    """So many prompts, in turns where there are fewer: of the commonest length, or of at least three lengths."""
    lengths = {}
    for one in prompts:
        lengths.setdefault(len(tokenizer(one["prompt"]).input_ids), []).append(one)
    if same:
        return (max(lengths.values(), key=len) * count)[:count]
    turns = [own[i] for i in range(count) for own in lengths.values() if len(own) > i]
    assert len(lengths) > 2
    return turns[:count]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or a name that is in the hub's cache")
    parser.add_argument("--tol", type=float, default=0.01)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(given.model)
    prompts = json.loads(PROMPTS.read_text())
    batches = {
        "one sample": samples_of(tokenizer, prompts, True, 1),
        "8 samples of one length": samples_of(tokenizer, prompts, True, 8),
        "8 samples of mixed lengths": samples_of(tokenizer, prompts, False, 8),
    }
    ours, left = checked(model, batch_of(tokenizer, batches["one sample"], 1), given.tol)
    assert ours.max() <= 2 * given.tol, f"error {ours.max():.3f}"
    assert ours.median() <= left.median() / 20, f"error {ours.median():.2g} beside {left.median():.2g} of left steps"
    errors = {"ours": ours.tolist(), "left": left.tolist()}
    print(f"median layer: error {ours.median():.2g}, of {LEFT} left steps {left.median():.2g}", flush=True)
    rows = {}
    with unchanged(model):
        for name, some in batches.items():
            batch, row = batch_of(tokenizer, some, 1), {}
            for search in ("greedy", "pointwise"):
                settings = dict(search=search, residuals="none")
                found = locate(model, batch, tol=given.tol, **settings)
                row[f"{search} unconverged"] = len(found.report["unconverged"])
                row[search] = seconds(lambda s=settings, b=batch: locate(model, b, tol=given.tol, **s), given.rounds)
                row[f"{search}, 4 nodes"] = seconds(
                    lambda s=settings, b=batch: locate(model, b, n_steps=4, **s), given.rounds
                )
            alone = [batch_of(tokenizer, [one], 1) for one in some]
            row["plain"] = sum(seconds(lambda one=one: released_igi(model, one, LEFT), 1) for one in alone)
            row["plain / greedy"] = row["plain"] / row["greedy"]
            row["pointwise / 4 nodes"] = row["pointwise"] / row["pointwise, 4 nodes"]
            rows[name] = row
            print(name, json.dumps({key: round(value, 2) for key, value in row.items()}, indent=1), flush=True)
    if given.out:
        about = {"model": given.model, "tol": given.tol, "machine": machine(), "versions": versions()}
        write_json(given.out, {**about, "errors": errors, "rows": rows})


if __name__ == "__main__":
    main()
