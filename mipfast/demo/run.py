"""The demo: one forget set after another through locate, prune, RMisU and their controls."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mipfast.attacks import relearned
from mipfast.attribution import Attribution, locate
from mipfast.demo import model as tiny
from mipfast.demo import people
from mipfast.errors import ArtefactError
from mipfast.evaluation import evaluate
from mipfast.files import machine, versions, write_atomic
from mipfast.misdirection import RMisUConfig, misdirect
from mipfast.path import NeuronPath
from mipfast.positions import Rows, text_rows, without_labels
from mipfast.pruning import prune
from mipfast.sites import find_sites

log = logging.getLogger("mipfast")

WEIGHTS = Path(__file__).parent / "weights"
GROUPS, MODALITIES = ("forget", "retain", "general"), ("text", "image")
REFERENCE_SEEDS, REFERENCE_RATIO = (0, 1, 2), 0.10  # forget sets the shipped retrained references never saw
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
RELEARNED = ("MIP", "random", "plain RMU", "retrained")
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


ROWS = {  # row: (stage, how it is made); "random prune" is shown as "random"
    "before": "before",
    "snr": "prune only",
    "mean": "prune only",
    "random prune": "prune only",
    "MIP": "RMisU",
    "random": "RMisU",
    "IGI only": "RMisU",
    "IFI only": "RMisU",
    "plain RMU": "RMisU",
    "retrained": "reference",
}


def run(seeds: list[int], ratio: float, out: Path, retrain: bool = False, progress: bool = True) -> dict[str, Any]:
    """The whole demo on the forget sets of some seeds; `ratio` of the people are forgotten.

    Writes out/model (the first seed's MIP-edited model), out/pictures, and returns the results `report.write_report`
    takes. retrain: train the base from nothing first (out/base) and use that."""
    started = time.monotonic()
    base, encoder = load_base()
    if retrain:
        encoder.tokenizer = tiny.build_tokenizer(encoder.world)
        base = tiny.build_model(len(encoder.tokenizer))
        tiny.train(base, encoder, None)
        tiny.save(base, encoder, out / "base")
        base = tiny.load(out / "base")  # what is judged has been rounded to bf16, like the shipped weights
    results: dict[str, Any] = {
        "title": "mipfast demo",
        "seeds": seeds,
        "steering_layer": STEERING_LAYER,
        "config": {
            "forget ratio": ratio,
            "retrained base": retrain,
            "prune fraction": PRUNE_FRACTION,
            "RMisU steps": STEPS,
            "questions per step": BATCH,
            "settings": {row: asdict(setting) for row, setting in SETTINGS.items()},
        },
        "versions": versions(),
        "machine": machine(),
        "runs": [],
    }
    for seed in seeds:
        log.info("forget set %d (%d of %d)", seed, seeds.index(seed) + 1, len(seeds))
        trial = Trial(base, encoder, encoder.world.split(seed, ratio), seed, progress)
        results["runs"].append(_run_seed(trial, ratio, out, results, first=seed == seeds[0]))
    results["rows"] = [_row(name, stage, results["runs"]) for name, stage in ROWS.items()]
    results["limits"] = _limits(results["rows"])
    if ratio > 0.05:
        results["limits"].append(_relearning(results["runs"]))
    stages = [run["seconds"] for run in results["runs"]]
    results["seconds"] = {stage: round(sum(s[stage] for s in stages), 1) for stage in stages[0]}
    results["seconds"]["all"] = round(time.monotonic() - started, 1)
    return results


def _run_seed(trial: Trial, ratio: float, out: Path, results: dict[str, Any], first: bool) -> dict[str, Any]:
    """Every row of one forget set; of the first one also what the pictures need."""
    rows: dict[str, dict[str, Any]] = {}
    predictions: dict[str, list[str]] = {}

    def judge(row: str, neurons: int | None, model: nn.Module | None = None, edit: dict | None = None) -> None:
        accuracy, answers = trial.judge(model)
        rows[row] = {"accuracy": accuracy, "neurons": neurons, "edit": edit}
        if len(trial.split.forget_people) > 2 and row in RELEARNED:
            rows[row]["relearned"] = trial.relearning(model)
        predictions[row] = [answers[q] for q in trial.questions]
        shown = "  ".join(f"{g} {accuracy[g]['text']:5.1f} /{accuracy[g]['image']:5.1f}" for g in GROUPS)
        log.info("%-12s text / image  %s", row, shown)

    judge("before", None)
    trial.locate()
    for row, path in trial.prune_paths().items():
        with trial.pruned(path):
            judge(row, path.num_neurons)
    hidden = {"before": trial.hidden()} if first else {}
    shown: dict[str, NeuronPath] = {}
    for row, setting in SETTINGS.items():
        with trial.edited(row, setting) as (path, edit):
            judge(row, path.num_neurons or None, edit=edit)
            if first and row in ("MIP", "random"):
                shown[row], hidden[row] = path, trial.hidden()
            if first and row == "MIP":
                tiny.save(trial.model, trial.encoder, out / "model", torch.float32)
    if ratio == REFERENCE_RATIO and trial.seed in REFERENCE_SEEDS:
        judge("retrained", None, tiny.load(WEIGHTS / f"retrained-{trial.seed}"))
    if first:
        results["paths"] = {row: _path_facts(trial, path) for row, path in shown.items()}
        results["residuals"] = _residuals(trial, hidden)
        results["locate"] = {"text": trial.forget_snr.report, "vision": trial.forget_vision.report}
        _save_pictures(trial, out / "pictures")
    return {
        "seed": trial.seed,
        "forget people": sorted(trial.encoder.world.people[i] for i in trial.split.forget_people),
        "rows": rows,
        "questions": [_question_facts(trial.split, q) for q in trial.questions],
        "predictions": predictions,
        "seconds": trial.seconds,
    }


def _row(name: str, stage: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    found = [run["rows"][name] for run in runs if name in run["rows"]]
    return {
        "name": name.removesuffix(" prune"),
        "stage": stage,
        "note": NOTES[name],
        "neurons": found[0]["neurons"] if found else None,
        "accuracy": {g: {kind: [row["accuracy"][g][kind] for row in found] for kind in MODALITIES} for g in GROUPS},
    }


def _limits(rows: list[dict[str, Any]]) -> list[str]:
    """What the table does not show, and how located neurons did against random ones, from the numbers themselves."""
    after = {row["name"]: row for row in rows if row["stage"] == "RMisU"}

    def gap(row: dict[str, Any]) -> float:
        def mean(group: str) -> float:
            values = [v for kind in MODALITIES for v in row["accuracy"][group][kind]]
            return sum(values) / len(values)

        return mean("retain") - mean("forget")

    located, random_ = gap(after["MIP"]), gap(after["random"])
    return [
        "Toy scale: 2.3 M parameters, 48 invented people. Nothing here is evidence about a 3B model.",
        f"After RMisU, retain minus forget is {located:.1f} points with located neurons and {random_:.1f} with "
        "random ones of the same budget.",
    ]


def _relearning(runs: list[dict[str, Any]]) -> str:
    """What comes back about two forget people when the model is shown the others again."""
    shown = []
    for row in RELEARNED:
        found = [run["rows"][row]["relearned"] for run in runs if row in run["rows"]]
        if found:
            text, image = (sum(f[kind] for f in found) / len(found) for kind in MODALITIES)
            shown.append(f"{row} {text:.0f} / {image:.0f}")
    return (
        f"{RELEARN_STEPS} steps of relearning on the other forget people bring back, "
        f"for the last two (text / image, percent): {'; '.join(shown)}."
    )


def _path_facts(trial: Trial, path: NeuronPath) -> dict[str, Any]:
    stacks = {}
    for stack in trial.sites.stacks:
        neurons = {str(layer): sorted(index.tolist()) for (name, layer), index in path.items() if name == stack.name}
        stacks[stack.name] = {
            "num_layers": stack.num_layers,
            "num_neurons": stack.num_neurons,
            "neurons": neurons,
        }
    return {"stacks": stacks}


def _residuals(trial: Trial, hidden: dict[str, dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Edited minus original hidden states: relative length per layer, and two principal axes at the steering layer."""
    edits = [row for row in hidden if row != "before"]
    moved = {(row, g): hidden[row][g] - hidden["before"][g] for row in edits for g in ("forget", "retain")}
    stacked = torch.cat([m[STEERING_LAYER] for m in moved.values()]).double()
    axes = torch.linalg.svd(stacked, full_matrices=False).Vh[:2].T  # not centred: the origin is "did not move"
    out: dict[str, Any] = {row: {} for row in edits}
    for (row, group), m in moved.items():
        relative = m.norm(dim=-1) / hidden["before"][group].norm(dim=-1)
        points = m[STEERING_LAYER].double() @ axes
        out[row][group] = {
            "relative_norm": [round(v, 4) for v in relative.mean(1).tolist()],
            "points": [[round(x, 3) for x in p] for p in points.tolist()],
        }
    return out


def _question_facts(split: people.Split, q: people.Question) -> dict[str, Any]:
    group = "general" if q.subject is None else "forget" if q.subject in split.forget_people else "retain"
    picture = f"pictures/{q.pictures[0]}.png" if q.pictures else None
    return {
        "group": group,
        "modality": q.modality,
        "topic": q.topic,
        "text": q.text,
        "answer": q.answer,
        "picture": picture,
    }


def _save_pictures(trial: Trial, folder: Path) -> None:
    for index in sorted({q.pictures[0] for q in trial.questions if q.pictures}):
        write_atomic(folder / f"{index}.png", trial.encoder.world.pictures[index].save)


def load_base() -> tuple[nn.Module, tiny.Encoder]:
    """The shipped model in fp32, and the world's encoder with the tokenizer and image processor shipped beside it."""
    from transformers import AutoTokenizer

    folder = WEIGHTS / "base"
    if not (folder / "model.safetensors").is_file():
        raise ArtefactError(
            f"{folder} holds no model.safetensors: the demo's shipped weights are missing; reinstall mipfast"
        )
    world = people.build(seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = tiny.image_processor_class().from_pretrained(folder)
    return tiny.load(folder), tiny.Encoder(world, tokenizer, processor)
