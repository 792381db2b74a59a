"""One forget set of the demo on one model: locate, the edits that are compared, and what they left."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mipfast.attacks import relearned
from mipfast.attribution import Attribution, locate
from mipfast.demo import model as tiny
from mipfast.demo import people
from mipfast.evaluation import evaluate
from mipfast.misdirection import RMisUConfig, misdirect
from mipfast.path import NeuronPath
from mipfast.positions import Rows, text_rows, without_labels
from mipfast.pruning import prune
from mipfast.sites import find_sites

GROUPS, MODALITIES = ("forget", "retain", "general"), ("text", "image")
PRUNE_FRACTION = 0.15
STEERING_LAYER, STEPS = 3, 80
RELEARN_STEPS = 5
LOCATE_FORGET, LOCATE_RETAIN = 75, 40  # training questions scored, per modality and group
BATCH = {"forget": 24, "retain": 16, "general": 8}  # questions per RMisU step


@dataclass(frozen=True)
class Setting:
    """What is tuned for a row: share of neurons per layer, learning rate, weight of the retain loss."""

    fraction: float
    lr: float
    alpha: float


# Chosen among eight per row on forget sets 100-102 by bench/tune_demo.py; all in bench/results/demo_tuning.json.
SETTINGS = {
    "MIP": Setting(0.1, 1e-2, 0.25),
    "random": Setting(0.1, 1e-2, 0.25),
    "IGI only": Setting(0.1, 1e-2, 0.25),
    "IFI only": Setting(0.1, 1e-2, 0.25),
    "plain RMU": Setting(1.0, 1e-3, 0.25),
}
NOTES = {
    "before": "the shipped model, trained on everybody",
    "snr": "columns zeroed: the 15 % of text neurons with the largest IGI signal-to-noise, forget over the rest",
    "mean": "columns zeroed: as many, by the forget set's mean IGI per layer, as in the paper",
    "random prune": "columns zeroed: as many, drawn at random",
    "MIP": "IGI text path (snr) and IFI vision path, pruned, then RMisU on exactly these neurons",
    "random": "the same prune and RMisU on as many random neurons of every layer",
    "IGI only": "MIP with its text path alone",
    "IFI only": "MIP with its vision path alone",
    "plain RMU": "RMU on every FFN weight up to the steering layer; nothing pruned",
    "retrained": "trained from nothing without the forget people: what forgetting would look like",
}


class Trial:
    """One forget set on one model: its test questions, its attributions, and edits that are undone after judging."""

    def __init__(self, model: nn.Module, encoder: tiny.Encoder, split: people.Split, seed: int, progress: bool = True):
        self.model, self.encoder, self.split, self.seed, self.progress = model, encoder, split, seed, progress
        self.sites = find_sites(model)
        self.seconds: dict[str, float] = {}
        self.questions = [q for g in GROUPS for m in MODALITIES for q in split.select(g, test=True, modality=m)]
        self._batches = encoder.batches(self.questions, 256)
        # batches() puts all text questions before all image questions
        self._order = [q for kind in MODALITIES for q in self.questions if q.modality == kind]

    def judge(self, model: nn.Module | None = None) -> tuple[dict[str, dict[str, float]], dict[people.Question, str]]:
        """(percent right by group and modality, predicted answer by question)."""
        with self._timed("evaluate"):
            found = evaluate(model or self.model, self._batches, progress=self.progress)
        hit = dict(zip(self._order, found.hits, strict=True))
        predicted = [self.encoder.tokenizer.decode(ids) for ids in found.predicted]
        accuracy: dict[str, dict[str, float]] = {}
        for group in GROUPS:
            accuracy[group] = {}
            for kind in MODALITIES:
                hits = [hit[q] for q in self.split.select(group, test=True, modality=kind)]
                accuracy[group][kind] = 100 * sum(hits) / len(hits)
        return accuracy, dict(zip(self._order, predicted, strict=True))

    def locate(self) -> None:
        """The attributions the rows choose from: log-odds over the prompt for snr, the paper's default, and IFI."""
        rng = random.Random(f"locate {self.seed}")

        def sample(group: str, kind: str, count: int) -> tiny.Batch:
            pool = self.split.select(group, test=False, modality=kind)
            return self.encoder.batch(rng.sample(pool, min(count, len(pool))), rng)

        with self._timed("locate"):
            text, images = (sample("forget", kind, LOCATE_FORGET) for kind in MODALITIES)
            snr: dict[str, Any] = {"positions": "prompt", "objective": "log_odds", "progress": self.progress}
            self.forget_snr = locate(self.model, [text], **snr)
            groups = [sample(g, kind, LOCATE_RETAIN) for g in ("retain", "general") for kind in MODALITIES]
            self.damage: list[Attribution] = [locate(self.model, [batch], **snr) for batch in groups]
            self.forget_mean = locate(self.model, [text], progress=self.progress)
            self.forget_vision = locate(self.model, [images], modality="vision", progress=self.progress)

    def prune_paths(self) -> dict[str, NeuronPath]:
        """The prune-only rows' paths, all of one budget in the text tower."""
        snr = NeuronPath.select(self.forget_snr, PRUNE_FRACTION, aggregate="snr", retain=self.damage, scope="stack")
        mean = NeuronPath.select(self.forget_mean, PRUNE_FRACTION)
        return {"snr": snr, "mean": mean, "random prune": NeuronPath.random(self.sites, snr, self.seed)}

    def edit_path(self, row: str, fraction: float) -> NeuronPath:
        """The neurons a row prunes and trains; all of them lie at or below the steering layer."""
        text = NeuronPath.select(self.forget_snr, fraction, aggregate="snr", retain=self.damage)
        text = text.up_to(self.sites.text.name, STEERING_LAYER)
        vision = NeuronPath.select(self.forget_vision, fraction)
        if row == "random":
            return NeuronPath.random(self.sites, text | vision, self.seed)
        return {"MIP": text | vision, "IGI only": text, "IFI only": vision, "plain RMU": NeuronPath()}[row]

    def relearning(self, model: nn.Module | None = None) -> dict[str, float]:
        """Percent right by modality about the last two forget people, after a few steps on the others."""
        model = model or self.model
        *known, a, b = sorted(self.split.forget_people)
        rng = random.Random(f"relearn {self.seed}")
        pool = [q for q in self.split.select("forget", test=False) if q.subject in known]
        batches = [self.encoder.batch(rng.choices(pool, k=BATCH["forget"]), rng) for _ in range(RELEARN_STEPS)]
        with self._timed("relearn"), relearned(model, batches):
            return {
                kind: evaluate(model, self.encoder.batches([q for q in unseen if q.subject in (a, b)])).accuracy
                for kind in MODALITIES
                if (unseen := self.split.select("forget", test=True, modality=kind))
            }

    @contextmanager
    def pruned(self, path: NeuronPath) -> Iterator[None]:
        with prune(self.model, path):
            yield

    @contextmanager
    def edited(self, row: str, setting: Setting) -> Iterator[tuple[NeuronPath, dict[str, Any]]]:
        """Prune and RMisU as the row says; the original weights return on the way out."""
        path = self.edit_path(row, setting.fraction)
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        config = RMisUConfig(
            layer=STEERING_LAYER,
            alpha=setting.alpha,
            trainable="all" if row == "plain RMU" else "path",
            steps=STEPS,
            lr=setting.lr,
            seed=self.seed,
            progress=self.progress,
        )
        handle = prune(self.model, path)
        try:
            with self._timed("misdirect"):
                report = misdirect(self.model, path, *self._edit_batches(), config)
            yield path, report
        finally:
            handle.undo()
            self.model.load_state_dict(before)

    def _edit_batches(self) -> tuple[list[tiny.Batch], list[tiny.Batch]]:
        """One forget and one retain-and-general batch per step, the same for every row of a seed."""
        rng = random.Random(f"batches {self.seed}")
        pools = {group: self.split.select(group, test=False) for group in GROUPS}

        def draw(*groups: str) -> tiny.Batch:
            return self.encoder.batch([q for g in groups for q in rng.choices(pools[g], k=BATCH[g])], rng)

        return [draw("forget") for _ in range(STEPS)], [draw("retain", "general") for _ in range(STEPS)]

    def hidden(self, count: int = 75) -> dict[str, torch.Tensor]:
        """Hidden states [layers,questions,D] after every text block at the last prompt position, text questions."""
        out = {}
        for group in ("forget", "retain"):
            batch = self.encoder.batch(self.split.select(group, test=True, modality="text")[:count])
            rows = text_rows(batch, "last_prompt")
            states: list[torch.Tensor] = []

            def keep(module: nn.Module, args: tuple, output: Any, rows: Rows = rows, states: list = states) -> None:
                state = output[0] if isinstance(output, tuple) else output
                states.append(state.reshape(-1, state.shape[-1])[rows.index])

            with ExitStack() as hooks, torch.no_grad():
                for block in self.sites.text.blocks:
                    hooks.callback(block.register_forward_hook(keep).remove)
                self.model(**without_labels(batch))
            out[group] = torch.stack(states)
        return out

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - started
