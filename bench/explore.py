"""After the protocol: what else might choose better, or make relearning recover less. Looked at, not tested.

    python bench/explore.py text|vision|edit [--width 1024] [--bases DIR] [--out DIR]

text: prune-only curves of snr with pictures in its numerator, of snr located again after every pruned twentieth, and
the union of the samples' own five per layer, as large as it is.
vision: the vision tower, chosen by snr, by IFI and at random. edit: RMisU at 3 %, rows and columns, the forget
gradient projected off the retain gradient, a learned direction, two steering layers, twice the steps.
Lines go to OUT/explore-PART-WIDTH.jsonl; `selection.py`'s are their controls.
"""

import argparse
import random
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from fixed import locate
from selection import (
    ALPHA,
    FRACTIONS,
    KEPT,
    LAYER,
    RATES,
    RESULTS,
    SCORED,
    SETS,
    SNR,
    STEPS,
    WIDTHS,
    Lines,
    Study,
    base,
    world_and_encoder,
)

from mipfast import Attribution, NeuronPath, RMisUConfig, hidden_states, misdirect, prune, rmisu_loss
from mipfast.demo.model import Batch
from mipfast.edit.misdirect import trainable_parts, unedited
from mipfast.edit.steering import steering_target
from mipfast.edit.train import training

ROUNDS = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30)
BUDGET = 0.03
EDITS = ("snr", "projected", "two layers", "twice the steps", "learned", "learned, twice the steps")


def scored(study: Study, group: str, kind: str, count: int, **options: str) -> Attribution:
    pool = study.split.select(group, test=False, modality=kind)
    questions = random.Random(f"{group} {kind} {study.seed}").sample(pool, min(count, len(pool)))
    return locate(study.model, study.encoder.batch(questions), **options)


def text(study: Study, lines: Lines) -> None:
    both = [study.snr, scored(study, "forget", "image", SCORED, **SNR)]
    for fraction in FRACTIONS:
        if ["both", study.seed, "stack", fraction] not in lines:
            path = NeuronPath.select(both, fraction, aggregate="snr", retain=study.damage, scope="stack")
            with prune(study.model, path):
                lines.add(["both", study.seed, "stack", fraction], accuracy=study.judge())
    if ["union", study.seed] not in lines:
        path = NeuronPath.select(study.mean, aggregate="union")
        with prune(study.model, path):
            lines.add(["union", study.seed], accuracy=study.judge(), neurons=path.num_neurons)
    path = NeuronPath()
    for fraction in ROUNDS:
        if ["again", study.seed, "stack", fraction] in lines:
            return  # a set's rounds follow from one another: all or none
        with prune(study.model, path) if path else nullcontext():
            fresh = Study(study.model, study.encoder, study.seed)
            found = NeuronPath.select(fresh.snr, ROUNDS[0], aggregate="snr", retain=fresh.damage, scope="stack")
        path = NeuronPath(path | found, study.sites.fingerprint())
        with prune(study.model, path):
            lines.add(["again", study.seed, "stack", fraction], accuracy=study.judge(), neurons=path.num_neurons)


def vision(study: Study, lines: Lines) -> None:
    igi = {"modality": "vision", "score": "igi", "objective": "log_odds"}
    forget = scored(study, "forget", "image", SCORED, **igi)
    damage = [scored(study, group, "image", KEPT, **igi) for group in ("retain", "general")]
    ifi = scored(study, "forget", "image", SCORED, modality="vision")
    for fraction in FRACTIONS:
        snr = NeuronPath.select(forget, fraction, aggregate="snr", retain=damage)
        paths = {
            "snr": snr,
            "ifi": NeuronPath.select(ifi, fraction),
            "random": NeuronPath.random(study.sites, snr, study.seed),
        }
        for choice, path in paths.items():
            if [choice, study.seed, "layer", fraction] not in lines:
                with prune(study.model, path):
                    lines.add([choice, study.seed, "layer", fraction], accuracy=study.judge())


def edit(study: Study, lines: Lines) -> None:
    path = study.path("snr", BUDGET, "layer").up_to(study.sites.text.name, LAYER)
    config = RMisUConfig(layer=LAYER, alpha=ALPHA, steps=STEPS, lr=RATES["path"], seed=study.seed)
    for how in EDITS:
        if [how, study.seed, "path", BUDGET] in lines:
            continue
        before = {name: tensor.clone() for name, tensor in study.model.state_dict().items()}
        handle = prune(study.model, path)
        try:
            if how == "projected":
                projected(study, path, config)
            elif how == "two layers":
                for layer in (LAYER, 1):
                    half = replace(config, layer=layer, steps=STEPS // 2)
                    misdirect(study.model, path.up_to(study.sites.text.name, layer), *study.batches, half)
            else:
                changed = {
                    "snr": {},
                    "learned": {"direction": "learned"},
                    "twice the steps": {"steps": 2 * STEPS},
                    "learned, twice the steps": {"direction": "learned", "steps": 2 * STEPS},
                }[how]
                misdirect(study.model, path, *study.batches, replace(config, **changed))
            lines.add([how, study.seed, "path", BUDGET], accuracy=study.judge(), relearned=study.relearning())
        finally:
            handle.undo()
            study.model.load_state_dict(before)


def projected(study: Study, path: NeuronPath, config: RMisUConfig) -> None:
    """misdirect's loop, with the forget gradient's component along the retain gradient removed where they oppose."""

    def hidden(batch: Batch) -> torch.Tensor:
        return hidden_states(study.model, batch, LAYER, sites=study.sites)

    forget, retain = study.batches
    with training(study.model, trainable_parts(path, study.sites, "path")) as leaves:
        with unedited(study.model):
            kept = [hidden(batch) for batch in retain]
            target = steering_target(config, hidden(forget[0]), torch.cat(kept))
        tensors = [leaf.tensor for leaf in leaves]
        optimizer = torch.optim.Adam(tensors, lr=config.lr)
        for away, held, where in zip(forget, retain, kept, strict=True):
            gradients = []
            for states in ((hidden(away), None, target, None), (None, hidden(held), target, where)):
                rmisu_loss(*states, config.alpha).loss.backward()
                gradients.append([t.new_zeros(t.shape) if t.grad is None else t.grad.clone() for t in tensors])
                optimizer.zero_grad()
            dot, square = (
                sum(float((a * b).sum()) for a, b in zip(gradients[i], gradients[1], strict=True)) for i in (0, 1)
            )
            share = min(0.0, dot) / square
            for tensor, push, hold in zip(tensors, *gradients, strict=True):
                tensor.grad = push - share * hold + hold
            optimizer.step()
            for leaf in leaves:
                leaf.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"text": text, "vision": vision, "edit": edit}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--width", type=int, choices=WIDTHS, default=WIDTHS[0])
    parser.add_argument("--bases", type=Path, default=Path("selection-bases"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results are or go")
    args = parser.parse_args()
    torch.set_num_threads(1)
    encoder, model = world_and_encoder(), base(args.bases, args.width)
    lines = Lines(args.out / f"explore-{args.part}-{args.width}.jsonl")
    for seed in SETS:
        parts[args.part](Study(model, encoder, seed), lines)


if __name__ == "__main__":
    main()
