"""Whether `locate(tol=...)` keeps what it says on a real model: the true error of every layer's scores, the estimate
beside it, and what it costs.

    python bench/real/converge.py FOLDER_OR_HUB_NAME [--tol 0.01 0.05] [--prompts 30] [--out FILE.json]

The truth of a sample is a search with --nodes substituted Gauss-Legendre nodes (alpha = t^2, which crowd where the
first layers peak): s* along the very path that was chosen, and the path it chooses itself. Prompts: prompts.json, of
five kinds, worded here. A model is read from the folder, or from the hub's cache: nothing is downloaded. A run that is
interrupted goes on where FILE.json stands.
"""

import argparse
import json
import statistics
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mipfast import locate
from mipfast.files import versions, write_json
from mipfast.model.accelerated import accelerated
from mipfast.scoring import fixed, quadrature, search
from mipfast.scoring.nodes import ResidualNodes

PROMPTS = Path(__file__).with_name("prompts.json")


def substituted(n):
    """Gauss-Legendre in t, alpha = t^2."""
    t, w = quadrature.RULES["gausslegendre"](n)
    return t**2, 2 * t * w


quadrature.RULES["substituted"] = substituted


def load(name):
    how = dict(local_files_only=True)
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **how).eval(), AutoTokenizer.from_pretrained(
        name, **how
    )


def batch_of(tokenizer, prompts, most=3):
    """Prompts and their answers' first tokens, padded on the right."""
    rows = []
    for one in prompts:
        prompt = tokenizer(one["prompt"]).input_ids
        rows.append((prompt, tokenizer(one["answer"], add_special_tokens=False).input_ids[:most]))
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels, attended = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end], labels[i, len(prompt) : end], attended[i, :end] = (
            torch.tensor(prompt + answer),
            torch.tensor(answer),
            1,
        )
    return {"input_ids": ids, "labels": labels, "attention_mask": attended}


def along(path, model, batch, truth=None, **settings):
    """A fixed rule's scores [1,L,F] along a given path [1,L,k]; as in truth, by the same rule, up to where that went
    another way."""
    shared = 0
    if truth is not None:
        same = (path.sort(2).values == truth.path.sort(2).values).all(2)[0]
        shared = int(same.long().cumprod(0).sum()) + 1
        if shared > len(same):
            return truth.scores
    score = ResidualNodes.score

    def given(captured, config, s1, s2, layers):
        return (s1 if config.score == "igi" else s2), path[:, list(layers)]

    def of_the_rest(group, act, groups, value_of):
        if len(group.replay.states) >= shared:
            return score(group, act, groups, value_of)
        group.baseline_output()
        return None, torch.zeros(group.copies, 1)

    with (
        mock.patch.object(fixed, "chosen", given),
        mock.patch.object(ResidualNodes, "score", of_the_rest),
        mock.patch.object(search, "_check_route", unchecked),  # which would find scores missing
    ):
        found = locate(model, batch, residuals="none", **settings).scores
    return found if truth is None else torch.cat([truth.scores[:, :shared], found[:, shared:]], 1)


def unchecked(call, batch, faster):
    faster.enter_context(accelerated(call.model, call.sites.stacks, call.known))


def relative(found, truth):
    """Error [n,L] of scores, over their norm or a thousandth of the sample's largest layer's."""
    norms = found.norm(dim=2)
    return (found - truth).norm(dim=2) / norms.maximum(1e-3 * norms.amax(1, keepdim=True))


def jaccard(found, expected):
    """Of the paths [n,L,k], [n,L]."""
    shared = (found[..., None] == expected[..., None, :]).any(-1).sum(-1)
    return shared / (2 * found.shape[-1] - shared)


@contextmanager
def counted(model):
    """Row-block passes of one sample: how often a copy goes through a block, and back."""
    passes = [0]

    def count(module, args):
        passes[0] += len(args[0]) * (2 if args[0].requires_grad else 1)

    with ExitStack() as hooks:  # the FFN: a block that is skipped is called, too
        for block in model.get_decoder().layers:
            hooks.enter_context(block.mlp.register_forward_pre_hook(count))
        yield passes


def measure(model, batch, tol, truth, nodes):
    start = time.process_time()
    with counted(model) as passes:
        found = locate(model, batch, tol=tol, residuals="none")
    seconds = time.process_time() - start
    settings = dict(method="substituted", n_steps=nodes)
    exact = along(found.path, model, batch, truth, **settings)
    used, margins = torch.tensor(found.report["nodes"]), torch.tensor(found.report["margins"])
    settled = (margins > 1).cummin(1).values  # up to here
    return {
        "error": relative(found.scores, exact)[0].tolist(),
        "estimate": found.error[0].tolist(),
        "nodes": used[0].tolist(),
        "settled": settled[0].tolist(),
        "jaccard": jaccard(found.path, truth.path)[0].tolist(),
        "row_block_passes": passes[0],
        "seconds": seconds,
    }


def summary(rows, tol):
    def all_of(name):
        return torch.tensor([row[name] for row in rows], dtype=torch.float64)

    error, estimate, overlap, settled = (all_of(name) for name in ("error", "estimate", "jaccard", "settled"))
    within = (error <= 2 * tol) & (estimate <= tol)
    return {
        "tol": tol,
        "sample_layers": error.numel(),
        "within_2_tol": within.double().mean().item(),
        "estimate_above_error": (estimate >= error).double().mean().item(),
        "unconverged": int((estimate > tol).sum()),
        "worst_error": error.max().item(),
        "mean_jaccard": overlap.mean().item(),
        "settled_layers": settled.mean().item(),
        "mean_jaccard_settled": overlap[settled.bool()].mean().item(),
        "row_block_passes_median": statistics.median(row["row_block_passes"] for row in rows),
        "nodes_first_layer_median": statistics.median(row["nodes"][0] for row in rows),
        "nodes_other_layers_mean": statistics.mean(n for row in rows for n in row["nodes"][1:]),
        "seconds_median": statistics.median(row["seconds"] for row in rows),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or a name that is in the hub's cache")
    parser.add_argument("--tol", type=float, nargs="+", default=[0.01, 0.05])
    parser.add_argument("--prompts", type=int, default=30, help="as many of every kind as give this number")
    parser.add_argument("--nodes", type=int, default=128, help="of the truth")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(given.model)
    prompts = json.loads(PROMPTS.read_text())
    kinds = list(dict.fromkeys(one["kind"] for one in prompts))
    each = given.prompts // len(kinds)
    prompts = [one for kind in kinds for one in [p for p in prompts if p["kind"] == kind][:each]]
    found = {str(tol): [] for tol in given.tol}
    if given.out and given.out.exists():
        before = json.loads(given.out.read_text())
        if (before["model"], before["truth_nodes"]) == (given.model, given.nodes):
            found |= before["samples"]
    for one in prompts:
        missing = [tol for tol in given.tol if one["prompt"] not in [row["prompt"] for row in found[str(tol)]]]
        if not missing:
            continue
        batch = batch_of(tokenizer, [one])
        truth = locate(model, batch, method="substituted", n_steps=given.nodes, residuals="none")
        for tol in missing:
            row = measure(model, batch, tol, truth, given.nodes)
            found[str(tol)].append({"kind": one["kind"], "prompt": one["prompt"], **row})
            print(
                f"{one['prompt']!r} tol {tol}: worst {max(row['error']):.4f}, {row['row_block_passes']} passes",
                flush=True,
            )
        if given.out:
            about = {"model": given.model, "class": type(model).__name__, "layers": model.config.num_hidden_layers}
            result = {**about, "truth_nodes": given.nodes, "versions": versions(), "summary": summaries(found)}
            write_json(given.out, {**result, "samples": found})
    print(json.dumps(summaries(found), indent=1))


def summaries(found):
    return [summary(rows, float(tol)) for tol, rows in found.items()]


if __name__ == "__main__":
    main()
