"""One forget set of the demo on one model: locate, the edits that are compared, and what they left."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from mipfast.demo import model as tiny
from mipfast.demo import people
from mipfast.edit import baselines, unlearn
from mipfast.edit.baselines import GA, MANU, NPO, RMU, AdaptiveRMU, BaselineConfig, GradDiff, KLMin
from mipfast.edit.config import MIPConfig, RMisUConfig
from mipfast.edit.lora import merge_adapter
from mipfast.edit.misdirect import misdirect
from mipfast.edit.neuron_path import NeuronPath
from mipfast.edit.prune import prune
from mipfast.edit.train import order
from mipfast.errors import InputError
from mipfast.experiment.figures import GROUPS, MODALITIES
from mipfast.judge.accuracy import evaluate
from mipfast.judge.attacks import relearned
from mipfast.model.batch import without_labels
from mipfast.model.positions import Rows, text_rows
from mipfast.model.sites import find_sites
from mipfast.scoring.attribution import Attribution, per_label
from mipfast.scoring.search import locate

PRUNE_FRACTION = 0.15
STEERING_LAYER, STEPS = 3, 80  # no row takes more steps: there is one batch for each
RELEARN_STEPS = 5
LOCATE_FORGET, LOCATE_RETAIN = 75, 40  # training questions scored, per modality and group
BATCH = {"forget": 24, "retain": 16, "general": 8}  # questions per step of an edit


@dataclass(frozen=True)
class Setting:
    """What is tuned; a row reads the fields it has a use for.

    fraction: share of the neurons edited, per layer; MANU's of a tower. lr: Adam's. alpha: weight of the retain loss;
    the forget loss has 1 - alpha, in every row. steps: of the optimiser, at most STEPS. coeff: length of RMU's target
    in mean hidden norms at the steering layer, of the retain set; adaptive RMU's of the forget set."""

    fraction: float = 1.0
    lr: float = 0.0
    alpha: float = 0.0
    steps: int = STEPS
    coeff: float = 1.0


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
        scores = (self.forget_snr, self.forget_vision)
        of_text, of_vision = map(_backwards, scores) if row == "least" else scores
        text = NeuronPath.select(of_text, fraction, aggregate="snr", retain=self.damage)
        text = text.up_to(self.sites.text.name, STEERING_LAYER)
        vision = NeuronPath.select(of_vision, fraction)
        if row == "random":
            return NeuronPath.random(self.sites, text | vision, self.seed)
        both = text | vision
        return {"MIP": both, "least": both, "IGI only": text, "IFI only": vision, "plain RMU": NeuronPath()}[row]

    def relearning(self, model: nn.Module | None = None, steps: int = RELEARN_STEPS) -> dict[str, float]:
        """Percent right by modality about the last two forget people, after a few steps on the others."""
        model = model or self.model
        *known, a, b = sorted(self.split.forget_people)
        rng = random.Random(f"relearn {self.seed}")
        pool = [q for q in self.split.select("forget", test=False) if q.subject in known]
        batches = [self.encoder.batch(rng.choices(pool, k=BATCH["forget"]), rng) for _ in range(steps)]
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
        """The model as the row's method leaves it, the neurons it pruned and its report; the original weights return on
        the way out. Raises InputError for a row without an edit."""
        edit = ROWS[row].edit
        if edit is None:
            raise InputError(f"row={row!r} edits nothing; expected {', '.join(r for r in ROWS if ROWS[r].edit)}")
        with self.applied(edit, setting) as found:
            yield found

    @contextmanager
    def applied(self, edit: Edit, setting: Setting) -> Iterator[tuple[NeuronPath, dict[str, Any]]]:
        """`edited` for an edit that is no row."""
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        try:
            with self._timed("edit"):
                found = edit(self, setting)
            yield found
        finally:
            self.model.load_state_dict(before)

    def edit_batches(
        self, sizes: dict[str, int] = BATCH, seed: int | None = None
    ) -> tuple[list[tiny.Batch], list[tiny.Batch]]:
        """One forget and one retain-and-general batch per step, the same for every row of a seed. sizes: questions.

        seed: misdirect's where it is not the trial's. It draws the direction and shuffles the batches, and its shuffle
        then ends in the order of the trial's: the direction alone is another one."""
        rng = random.Random(f"batches {self.seed}")
        pools = {group: self.split.select(group, test=False) for group in GROUPS}

        def draw(*groups: str) -> tiny.Batch:
            return self.encoder.batch([q for g in groups for q in rng.choices(pools[g], k=sizes[g])], rng)

        pair = [draw("forget") for _ in range(STEPS)], [draw("retain", "general") for _ in range(STEPS)]
        mine, its = (order(s, (STEPS, STEPS), STEPS) for s in (self.seed, self.seed if seed is None else seed))
        forget, retain = (
            [batches[i] for _, i in sorted(zip(shuffled, wanted, strict=True))]
            for batches, wanted, shuffled in zip(pair, mine, its, strict=True)
        )
        return forget, retain

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


def _backwards(found: Attribution) -> Attribution:
    """What is selected by it first is what matters least: the smallest mean score in size."""
    mean = per_label(found).mean(0, keepdim=True)
    return Attribution(-mean.abs(), found.path[:1], found.report | {"num_labels": [1]})


Edit = Callable[[Trial, Setting], tuple[NeuronPath, dict[str, Any]]]


def rmisu(
    neurons: str,
    trainable: Literal["path", "down", "lora", "all"] = "path",
    direction: Literal["gaussian", "uniform", "learned"] = "gaussian",
    seed: int | None = None,
    sizes: dict[str, int] = BATCH,
) -> Edit:
    """Prune the neurons of a row of `Trial.edit_path`, then RMisU. An adapter is folded and merged. seed: of the
    direction, None is the trial's. sizes: questions per step."""

    def edit(trial: Trial, setting: Setting) -> tuple[NeuronPath, dict[str, Any]]:
        path = trial.edit_path(neurons, setting.fraction)
        config = RMisUConfig(
            layer=STEERING_LAYER,
            steering_coeff=setting.coeff,
            alpha=setting.alpha,
            trainable=trainable,
            steps=min(setting.steps, STEPS),
            lr=setting.lr,
            direction=direction,
            seed=trial.seed if seed is None else seed,
            progress=trial.progress,
        )
        batches = trial.edit_batches(sizes, seed)
        if path:
            report = unlearn.edit(trial.model, path, *batches, MIPConfig(rmisu=config, progress=trial.progress))
        else:
            report = misdirect(trial.model, path, *batches, config)
        if trainable == "lora":
            merge_adapter(trial.model)
        return path, report

    return edit


def _baseline(method: Callable[[Setting], baselines.Method | baselines.MANU]) -> Edit:
    """One of `mipfast.baselines` on the data RMisU has; the path is what MANU prunes."""

    def edit(trial: Trial, setting: Setting) -> tuple[NeuronPath, dict[str, Any]]:
        config = BaselineConfig(
            steps=min(setting.steps, STEPS), lr=setting.lr, seed=trial.seed, progress=trial.progress
        )
        report = baselines.run(trial.model, method(setting), *trial.edit_batches(), config)
        return NeuronPath(report.pop("path", {})), report

    return edit


def _rmu(method: type[RMU], unit: Literal["retain", "forget"]) -> Edit:
    def of(setting: Setting) -> RMU:
        weight = setting.alpha / (1 - setting.alpha)  # beside a forget loss of weight 1
        return method(
            layer=STEERING_LAYER, steering_coeff=setting.coeff, unit=unit, alpha=weight, positions="last_prompt"
        )

    return _baseline(of)


@dataclass(frozen=True)
class Row:
    """A line of the demo's tables. edit: what makes its model, in place; None where `Trial.edited` has no part."""

    stage: str
    note: str
    edit: Edit | None = None


ROWS = {
    "before": Row("before", "the shipped model, trained on everybody"),
    "snr": Row(
        "prune only",
        "columns zeroed: the 15 % of text neurons with the largest IGI signal-to-noise, forget over the rest",
    ),
    "mean": Row("prune only", "columns zeroed: as many, by the forget set's mean IGI per layer, as in the paper"),
    "random prune": Row("prune only", "columns zeroed: as many, drawn at random"),
    "MIP": Row(
        "RMisU", "IGI text path (snr) and IFI vision path, pruned, then RMisU on exactly these neurons", rmisu("MIP")
    ),
    "random": Row("RMisU", "the same prune and RMisU on as many random neurons of every layer", rmisu("random")),
    "least": Row("RMisU", "MIP on as many neurons of every layer whose scores are nearest zero", rmisu("least")),
    "IGI only": Row("RMisU", "MIP with its text path alone", rmisu("IGI only")),
    "IFI only": Row("RMisU", "MIP with its vision path alone", rmisu("IFI only")),
    "MIP down": Row("RMisU", "MIP that trains its neurons' output columns alone", rmisu("MIP", "down")),
    "MIP learned": Row(
        "RMisU", "MIP steered to where forget answers are least likely", rmisu("MIP", direction="learned")
    ),
    "MIP LoRA": Row(
        "RMisU", "MIP through LoRA of rank 8 on its neurons, merged into the weights", rmisu("MIP", "lora")
    ),
    "plain RMU": Row(
        "RMisU", "RMU on every FFN weight up to the steering layer; nothing pruned", rmisu("plain RMU", "all")
    ),
    "GA": Row(
        "baselines",
        "gradient ascent on the forget answers; this and the next four train every weight",
        _baseline(lambda setting: GA()),
    ),
    "GradDiff": Row(
        "baselines",
        "ascent on the forget answers, descent on the rest",
        _baseline(lambda setting: GradDiff(1 - setting.alpha, setting.alpha)),
    ),
    "KL": Row(
        "baselines",
        "ascent on the forget answers, the rest's predictions held by KL divergence",
        _baseline(lambda setting: KLMin(1 - setting.alpha, setting.alpha)),
    ),
    "NPO": Row("baselines", "negative preference optimisation on the forget answers", _baseline(lambda setting: NPO())),
    "NPO + retain": Row(
        "baselines",
        "NPO and descent on the rest",
        _baseline(lambda setting: NPO(gamma=1 - setting.alpha, alpha=setting.alpha)),
    ),
    "RMU": Row(
        "baselines",
        "RMU on the output projections of three blocks, steered at the last prompt token, as RMisU is",
        _rmu(RMU, "retain"),
    ),
    "adaptive RMU": Row(
        "baselines", "RMU with a target measured in the forget set's hidden norms", _rmu(AdaptiveRMU, "forget")
    ),
    "MANU": Row(
        "baselines",
        "neurons whose activations are larger on the forget set pruned, nothing trained",
        _baseline(lambda setting: MANU(setting.fraction)),
    ),
    "retrained": Row("reference", "trained from nothing without the forget people: what forgetting would look like"),
}

# Chosen among eight per row on forget sets 100-102 by bench/tune_demo.py; all in bench/results/demo_tuning.json.
SETTINGS = {
    "MIP": Setting(0.1, 1e-2, 0.25),
    "random": Setting(0.1, 1e-2, 0.25),
    "least": Setting(0.1, 1e-2, 0.5),
    "IGI only": Setting(0.1, 1e-2, 0.25),
    "IFI only": Setting(0.1, 1e-2, 0.25),
    "MIP down": Setting(0.1, 2e-2, 0.5),
    "MIP learned": Setting(0.1, 1e-2, 0.5),
    "MIP LoRA": Setting(0.1, 1e-2, 0.5),
    "plain RMU": Setting(1.0, 1e-3, 0.25),
    "GA": Setting(lr=1e-4, steps=60),
    "GradDiff": Setting(lr=5e-4, alpha=0.8),
    "KL": Setting(lr=5e-4, alpha=0.8),
    "NPO": Setting(lr=1e-4, steps=60),
    "NPO + retain": Setting(lr=5e-4, alpha=0.5),
    "RMU": Setting(lr=1e-2, alpha=0.5, coeff=2.0),
    "adaptive RMU": Setting(lr=1e-2, alpha=0.5, coeff=2.0),
    "MANU": Setting(0.5),
}
