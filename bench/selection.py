"""Which neurons? The study of docs/selection.md: choices of text neurons on two fresh bases, forget sets 10-17.

    python bench/selection.py train                          the bases, about 4 minutes each on one core
    python bench/selection.py prune --width 1024 --out NEW   prune-only curves, about 15 minutes a width
    python bench/selection.py edit --width 1024 --out NEW    RMisU with `down` and `path`, relearning, 20 to 35 minutes
    python bench/selection_report.py --out NEW               tables, tests, picture

Every result is a line of OUT/PART-WIDTH.jsonl; what is there already, or packed in a .jsonl.gz beside it, is not run
again. The default OUT, bench/results/selection, has all of it, packed by gzip -n9.
"""

import argparse
import functools
import gzip
import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fixed import locate
from torch import nn

from mipfast import Attribution, NeuronPath, RMisUConfig, evaluate, find_sites, misdirect, prune
from mipfast.demo import model as tiny
from mipfast.demo import people
from mipfast.demo.trial import Trial
from mipfast.scoring.attribution import per_label

RESULTS = Path(__file__).parent / "results" / "selection"
WORLD_SEED = TRAIN_SEED = 1
WIDTHS, SETS = (1024, 256), range(10, 18)
CHOICES = ("snr", "mean", "random", "least", "cf-snr")
FRACTIONS = (0.02, 0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40)
BUDGETS, RATES = (0.01, 0.03, 0.10), {"down": 2e-2, "path": 3e-3}
LAYER, STEPS, ALPHA = 3, 60, 0.5
BATCH = {"forget": 12, "retain": 8, "general": 4}
JUDGED = {"retain": 150, "general": 100}  # questions per modality at most; of the forget people all
SCORED, KEPT, OTHERS = 75, 40, 12
SNR: dict[str, Any] = {"positions": "prompt", "objective": "log_odds"}


class Study:
    """One base and one forget set."""

    def __init__(self, model: nn.Module, encoder: tiny.Encoder, seed: int):
        self.model, self.encoder, self.seed = model, encoder, seed
        self.split = encoder.world.split(seed)
        self.sites = find_sites(model)
        self.relearning = Trial(model, encoder, self.split, seed, progress=False).relearning
        self.tests: dict[tuple[str, str], list[tiny.Batch]] = {}
        for group in ("forget", "retain", "general"):
            for kind in ("text", "image"):
                pool = self.split.select(group, test=True, modality=kind)
                count = min(JUDGED.get(group, len(pool)), len(pool))
                self.tests[group, kind] = encoder.batches(random.Random(f"judge {seed}").sample(pool, count), 256)

    def judge(self) -> dict[str, float]:
        """Percent right by "group modality"."""
        return {" ".join(place): evaluate(self.model, batches).accuracy for place, batches in self.tests.items()}

    @functools.cached_property
    def forget_questions(self) -> list[people.Question]:
        pool = self.split.select("forget", test=False, modality="text")
        return random.Random(f"locate {self.seed}").sample(pool, SCORED)

    @functools.cached_property
    def damage(self) -> list[Attribution]:
        rng = random.Random(f"kept {self.seed}")
        pools = [self.split.select(g, False, kind) for g in ("retain", "general") for kind in ("text", "image")]
        return [locate(self.model, self.encoder.batch(rng.sample(p, min(KEPT, len(p))), rng), **SNR) for p in pools]

    @functools.cached_property
    def snr(self) -> Attribution:
        return locate(self.model, self.encoder.batch(self.forget_questions), **SNR)

    @functools.cached_property
    def counterfactual(self) -> Attribution:
        names = self.encoder.world.people
        others = random.Random(f"others {self.seed}").sample(
            sorted(set(range(len(names))) - self.split.forget_people), OTHERS
        )
        asked = [
            [replace(q, text=q.text.replace(names[q.subject], names[other])) for q in self.forget_questions]
            for other in others
        ]
        batch, *against = (self.encoder.batch(questions) for questions in (self.forget_questions, *asked))
        return locate(self.model, batch, counterfactuals=against, **SNR)

    @functools.cached_property
    def mean(self) -> Attribution:
        return locate(self.model, self.encoder.batch(self.forget_questions))

    def path(self, choice: str, fraction: float, scope: str) -> NeuronPath:
        if choice == "snr":
            return NeuronPath.select(self.snr, fraction, aggregate="snr", retain=self.damage, scope=scope)
        if choice == "cf-snr":
            return NeuronPath.select(self.counterfactual, fraction, aggregate="snr", retain=self.damage, scope=scope)
        if choice == "mean":
            return NeuronPath.select(self.mean, fraction, scope=scope)
        if choice == "least":
            least = replace_scores(self.snr, -per_label(self.snr).mean(0, keepdim=True).abs())
            return NeuronPath.select(least, fraction, scope=scope)
        drawn = torch.rand(self.snr.scores.shape[1:], generator=torch.Generator().manual_seed(self.seed))
        return NeuronPath.select(replace_scores(self.snr, drawn[None]), fraction, scope=scope)

    @contextmanager
    def edited(self, path: NeuronPath, trainable: str) -> Iterator[None]:
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        config = RMisUConfig(
            layer=LAYER, alpha=ALPHA, trainable=trainable, steps=STEPS, lr=RATES[trainable], seed=self.seed
        )
        handle = prune(self.model, path)
        try:
            misdirect(self.model, path, *self.batches, config)
            yield
        finally:
            handle.undo()
            self.model.load_state_dict(before)

    @functools.cached_property
    def batches(self) -> tuple[list[tiny.Batch], list[tiny.Batch]]:
        rng = random.Random(f"batches {self.seed}")
        pools = {group: self.split.select(group, test=False) for group in BATCH}

        def draw(*groups: str) -> tiny.Batch:
            return self.encoder.batch([q for g in groups for q in rng.choices(pools[g], k=BATCH[g])], rng)

        return [draw("forget") for _ in range(STEPS)], [draw("retain", "general") for _ in range(STEPS)]


def replace_scores(attribution: Attribution, scores: torch.Tensor) -> Attribution:
    """One sample with other scores: a ranking that no aggregate makes."""
    report = attribution.report | {"num_labels": [1]}
    return Attribution(scores, attribution.path[:1], report)


class Lines:
    """A JSONL file of results by key, and what was packed of it."""

    def __init__(self, path: Path):
        self.path, packed = path, path.with_suffix(".jsonl.gz")
        lines = gzip.decompress(packed.read_bytes()).decode().splitlines() if packed.exists() else []
        lines += path.read_text().splitlines() if path.exists() else []
        self.found = {json.dumps(one["key"]): one for one in map(json.loads, lines)}

    def __getitem__(self, key: list) -> dict[str, Any]:
        return self.found[json.dumps(key)]

    def __contains__(self, key: list) -> bool:
        return json.dumps(key) in self.found

    def add(self, key: list, **values: Any) -> None:
        line = {"key": key, **values}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.found[json.dumps(key)] = line
        print(json.dumps(line), flush=True)


def world_and_encoder() -> tiny.Encoder:
    world = people.build(seed=WORLD_SEED)
    return tiny.Encoder(world, tiny.build_tokenizer(world), tiny.image_processor_class()())


def train(folder: Path) -> None:
    encoder = world_and_encoder()
    for width in WIDTHS:
        model = tiny.build_model(len(encoder.tokenizer), TRAIN_SEED, width)
        tiny.train(model, encoder, None, TRAIN_SEED)
        tiny.save(model, encoder, folder / f"fresh-{width}")


def base(folder: Path, width: int) -> nn.Module:
    if not (folder / f"fresh-{width}").is_dir():
        sys.exit(f"{folder} holds no base fresh-{width}; make it: python bench/selection.py train --bases {folder}")
    return tiny.load(folder / f"fresh-{width}")


def run(part: str, width: int, folder: Path, choices: list[str], out: Path) -> None:
    encoder, model = world_and_encoder(), base(folder, width)
    lines = Lines(out / f"{part}-{width}.jsonl")
    for seed in SETS:
        study = Study(model, encoder, seed)
        if ["before", seed] not in lines:
            lines.add(["before", seed], accuracy=study.judge(), relearned=study.relearning())
        for choice in choices:
            (prune_curves if part == "prune" else edits)(study, choice, lines)


def prune_curves(study: Study, choice: str, lines: Lines) -> None:
    for scope in ("stack", "layer"):
        for fraction in FRACTIONS:
            key = [choice, study.seed, scope, fraction]
            if key in lines:
                continue
            with prune(study.model, study.path(choice, fraction, scope)):
                lines.add(key, accuracy=study.judge())


def edits(study: Study, choice: str, lines: Lines) -> None:
    for trainable in RATES:
        for fraction in BUDGETS:
            key = [choice, study.seed, trainable, fraction]
            if key in lines:
                continue
            path = study.path(choice, fraction, "layer").up_to(study.sites.text.name, LAYER)
            with study.edited(path, trainable):
                lines.add(key, accuracy=study.judge(), relearned=study.relearning())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("train", "prune", "edit"))
    parser.add_argument("--width", type=int, choices=WIDTHS, default=WIDTHS[0], help="of the base's text FFNs")
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=list(CHOICES), help="which to run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results are or go")
    parser.add_argument("--bases", type=Path, default=Path("selection-bases"), help="where the bases are or go")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part == "train":
        train(args.bases)
    else:
        run(args.part, args.width, args.bases, args.choices, args.out)


if __name__ == "__main__":
    main()
