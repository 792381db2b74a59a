"""Does the model still know the answer? What it writes for a benchmark's records and how likely it finds their answers,
with every metric, on disk chunk by chunk."""

from __future__ import annotations

import inspect
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

from mipfast.data.records import LETTERS, Record, digest
from mipfast.errors import ArtefactError, InputError, ModelError
from mipfast.files import claim, parse_json, read_run, versions, write_atomic, write_json
from mipfast.judge import metrics
from mipfast.model.batch import Batch, find_labels, read_batch, without_labels
from mipfast.model.fingerprint import fingerprint
from mipfast.model.patching import frozen_eval, unwrapped

log = logging.getLogger("mipfast")
T = TypeVar("T")

CHUNK = 64  # records a file: enough to sort by length, few enough that a stop loses little
COPIED = ("id", "group", "modality", "task", "prompt", "target", "answer")  # from a record into its row
SAID = ("text", "nll", "token_hits", "nll_options", "nll_paraphrase", "nll_perturbed")
ADDED: dict[str, Any] = {"token_hits": []}  # what folders of before lack
CHOICE_TOKENS = 8  # only the first character counts; a model that forgot to stop would write on to the limit
ROW_FILES = "rows-*.jsonl"
PREFIX = "MIPFAST"  # of the files of Judgement.save


@dataclass(frozen=True)
class Judgement:
    """What a model made of a set of records.

    Example:
        >>> import math
        >>> from mipfast.evaluation import Judgement
        >>> row = {"id": "7", "group": "forget_5", "modality": "text", "task": "cloze", "answer": "Oslo"}
        >>> row |= {"text": "in Oslo", "nll": math.log(2), "token_hits": [True, False]}
        >>> row |= {"nll_options": [], "nll_paraphrase": [], "nll_perturbed": []}
        >>> judged = Judgement([row], facts={})
        >>> judged.summary["forget_5/text/cloze/accuracy"], judged.scores["forget_5/text/cloze/probability"]
        (1.0, {'7': 0.5})
    """

    rows: list[dict[str, Any]]
    """One per record, in their order, as its JSON has it: id, group, modality, task, prompt, target, answer; text: what
    the model wrote; nll: of the target, mean per token; token_hits: whether the model ranks each of the target's tokens
    first, the earlier ones given, empty in folders of before; nll_options, nll_paraphrase (none or one), nll_perturbed:
    lists of NLLs. null stands for a log-likelihood that is nan or infinite."""
    facts: dict[str, Any]
    """Config, number of records, versions."""

    @cached_property
    def scores(self) -> dict[str, dict[str, float]]:
        """{"group/modality/task/metric": {id: value}}; docs/metrics.md has the metrics."""
        scores: dict[str, dict[str, float]] = {}
        for row in self.rows:
            for metric, value in _scores(row).items():
                cell = "/".join([row["group"], row["modality"], row["task"], metric])
                scores.setdefault(cell, {})[row["id"]] = float(value)
        return scores

    @property
    def summary(self) -> dict[str, float]:
        """{"group/modality/task/metric": mean over its records}; nan where one is nan."""
        return {cell: fmean(values.values()) for cell, values in self.scores.items()}

    @property
    def not_finite(self) -> list[str]:
        """group/id of every record with a log-likelihood that is nan or infinite."""
        return [f"{row['group']}/{row['id']}" for row in self.rows if None in _nlls(row)]

    def save(self, folder: str | Path, name: str = PREFIX) -> None:
        """Write NAME_EVAL.json, {metric: {"agg_value": x, "value_by_index": {id: {metric: x}}}}, and NAME_SUMMARY.json,
        {metric: x}: open-unlearning's shape. What is not finite is null.

        Args:
            folder: where to write.
            name: the NAME of the files.
        """
        means = {cell: _finite(value) for cell, value in self.summary.items()}
        every = {
            cell: {
                "agg_value": means[cell],
                "value_by_index": {i: {cell.rsplit("/", 1)[1]: _finite(value)} for i, value in values.items()},
            }
            for cell, values in self.scores.items()
        }
        write_json(Path(folder) / f"{name}_EVAL.json", every)
        write_json(Path(folder) / f"{name}_SUMMARY.json", means)


def evaluate_records(
    model: Any,
    encoder: Any,
    records: Iterable[Record],
    out: str | Path | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 50,
    name: str = PREFIX,
    progress: bool = False,
) -> Judgement:
    """What the model writes under greedy decoding, and how likely it finds each record's answers.

    Of the model's generation config only the end tokens count, and nothing is drawn at random.

    Args:
        model: a transformers model that can generate.
        encoder: a `mipfast.samples.Encoder`, or what has its batch(records), prompts(records), tokenizer and
            fingerprint().
        records: with ids that are unique within their groups.
        out: a folder: rows-*.jsonl are written there chunk by chunk, a stopped run goes on from them, and at the end
            come the files of `Judgement.save`. run.json tells whose folder it is: config, records, hash of all weights,
            and the first record's NLL, which sees hooks and switched-off adapters.
        batch_size: a memory knob, halved where memory runs out: results do not depend on it but for rounding, which in
            16 bits may decide between two equally likely tokens.
        max_new_tokens: the most that the model writes for a record, CHOICE_TOKENS = 8 for a choice.
        name: the NAME of the files of `Judgement.save`.
        progress: show a bar.

    Returns:
        What the model wrote for every record, its likelihoods and scores.

    Raises:
        ArtefactError: where out is another run's.
        InputError: for records that cannot be judged.
        ModelError: for a model that cannot write.
        MipfastError: without a metric's library.

    Example:
        >>> import mipfast, tempfile
        >>> from pathlib import Path
        >>> from mipfast.data import Record
        >>> from mipfast.evaluation import evaluate_records, read_records
        >>> from mipfast.samples import Encoder, load_model
        >>> demo = Path(mipfast.__file__).parent / "demo" / "weights" / "base"
        >>> record = Record("7", "pets", "text", "cloze", "Name the pet __", "dog")
        >>> folder = tempfile.mkdtemp()
        >>> judged = evaluate_records(load_model(demo), Encoder.from_pretrained(demo), [record], folder)
        >>> sorted(name.split("/")[-1] for name in judged.summary)
        ['accuracy', 'exact_match', 'exact_memorisation', 'extraction_strength', 'probability']
        >>> read_records(folder).rows == judged.rows
        True
    """
    model, records = unwrapped(model), list(records)
    _check(records, batch_size, max_new_tokens)
    runner = _Runner(model, encoder, batch_size, max_new_tokens)
    facts = {
        "config": {"decoding": "greedy", "max_new_tokens": max_new_tokens, "choice_tokens": CHOICE_TOKENS},
        "seed": None,  # nothing here is drawn at random
        "records": len(records),
        "versions": versions(),
    }
    out = None if out is None else Path(out)
    rows: list[dict[str, Any]] = []
    with frozen_eval(model), torch.no_grad():
        if out:
            identity = {
                "config": facts["config"],
                "dtype": str(model.dtype),
                "encoder": encoder.fingerprint(),
                "data": digest(records),
                "model": fingerprint(model),
                "probe": runner.probe(records[0]),
            }
            claim(out, identity, facts)
        with tqdm(desc="evaluate", total=len(records), unit="record", smoothing=0, disable=not progress) as bar:
            for start in range(0, len(records), CHUNK):
                chunk = records[start : start + CHUNK]
                if not out:
                    rows += runner.rows(chunk)
                elif not _is_whole(shard := out / ROW_FILES.replace("*", f"{start:06d}"), chunk):
                    _write_rows(shard, runner.rows(chunk))
                bar.update(len(chunk))
    judged = read_records(out) if out else Judgement(rows, facts)
    if bad := judged.not_finite:
        of = f"{len(bad)} of {len(records)} records"
        log.warning("%s have a log-likelihood that is nan or infinite, their scores are nan; the first: %s", of, bad[0])
    if out:
        judged.save(out, name)
    return judged


def read_records(folder: str | Path) -> Judgement:
    """The Judgement of a finished run, without a model.

    Args:
        folder: the out of `evaluate_records`.

    Raises:
        ArtefactError: for an unfinished or damaged folder.
    """
    folder = Path(folder)
    facts = read_run(folder)
    if facts is None or "records" not in facts:
        raise ArtefactError(f"{folder} has no run.json of evaluate_records; expected a folder it wrote")
    rows = [row for path in sorted(folder.glob(ROW_FILES)) for row in _read_rows(path)]
    if len(rows) != facts["records"]:
        raise ArtefactError(
            f"{folder} holds {len(rows)} of {facts['records']} records; run the same evaluation again to go on"
        )
    return Judgement(rows, facts)


class _Runner:
    """A model, asked in batches of a size that memory allows."""

    def __init__(self, model: Any, encoder: Any, batch_size: int, max_new_tokens: int):
        self.model, self.encoder, self.size, self.max_new_tokens = model, encoder, batch_size, max_new_tokens
        if not hasattr(model, "generate"):
            raise ModelError(f"{type(model).__name__} has no generate; expected a transformers model that writes")
        self.accepts = inspect.signature(model.forward).parameters

    def probe(self, record: Record) -> float | None:
        """The record's NLL, alone in its batch, to two digits: enough to see an edit, too few to see rounding."""
        value = _finite(self._each([record], self._nll)[0][0][0])
        return value if value is None else round(value, 2)

    def rows(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """As `Judgement.rows`."""
        answers = [_answers(record) for record in records]
        likely = iter(self._each([answer for some in answers for answer in some], self._nll))
        with self._greedy():
            texts = self._each(records, self._write)
        rows = []
        for record, some, text in zip(records, answers, texts, strict=True):
            nlls, hits = zip(*(next(likely) for _ in some), strict=True)
            (nll, *options), *others = [[_finite(value) for value in values] for values in nlls]
            paraphrases = len(others) - len(record.perturbed) if others else 0
            rows.append(
                {name: getattr(record, name) for name in COPIED}
                | {
                    "text": text,
                    "nll": nll,
                    "token_hits": hits[0],
                    "nll_options": options,
                    "nll_paraphrase": [value for (value,) in others[:paraphrases]],
                    "nll_perturbed": [value for (value,) in others[paraphrases:]],
                }
            )
        return rows

    def _each(self, records: Sequence[Record], ask: Callable[[list[Record]], list[T]]) -> list[T]:
        """ask's answers in the records' order. A batch has records of one kind (a picture's tokens do not show in the
        prompt's length) and of similar length, longest first; it is halved where memory runs out, for good."""

        def kind(i: int) -> tuple[bool, bool]:
            return records[i].image is None, records[i].task == "choice"

        answers: dict[int, T] = {}
        order = sorted(range(len(records)), key=lambda i: (*kind(i), -len(records[i].prompt) - len(records[i].target)))
        for _, same in groupby(order, key=kind):
            todo = list(same)
            while todo:
                some = todo[: self.size]
                if (said := self._asked([records[i] for i in some], ask)) is None:
                    self.size = (len(some) + 1) // 2
                    log.warning("out of memory: going on with batches of %d", self.size)
                    continue
                answers |= zip(some, said, strict=True)
                todo = todo[len(some) :]
        return [answers[i] for i in range(len(records))]

    def _asked(self, records: list[Record], ask: Callable[[list[Record]], list[T]]) -> list[T] | None:
        """None where memory ran out: asking again inside `except` would keep the failed tensors alive."""
        try:
            return ask(records)
        except torch.OutOfMemoryError as error:
            if len(records) == 1:
                name = f"record {records[0].id} of {records[0].group}"
                raise InputError(f"{name} alone does not fit into memory; shorten it, or its picture") from error
            return None

    def _nll(self, records: list[Record]) -> list[tuple[list[float], list[bool]]]:
        """(-1/T sum_t log p(target_t), and of a choice -log p of every option's letter; which target_t are ranked
        first): one forward, logits from the first label on."""
        batch, labels = read_batch(self.model, self.encoder.batch(records))
        batch = self._inputs(batch)
        length = batch["labels"].shape[1]
        kept = length - int(labels.index[labels.mask].min())
        only = {"logits_to_keep": kept} if "logits_to_keep" in self.accepts else {}
        logits = self.model(**without_labels(batch), use_cache=False, **only).logits[:, -kept:]
        rows = (labels.index - length + kept).clamp_min(0)  # padding's may be negative
        scored = logits.gather(1, rows[..., None].expand(-1, -1, logits.shape[-1]).to(logits.device)).float()
        total = scored.logsumexp(-1)
        target, mask = labels.target.to(logits.device), labels.mask.to(logits.device)
        losses = (total - scored.gather(-1, target[..., None])[..., 0]).where(mask, 0)
        nlls = (losses.sum(1) / mask.sum(1))[:, None]
        if records[0].task == "choice":
            nlls = torch.cat([nlls, total[:, :1] - scored[:, 0, self._letters(records)]], 1)
        first = scored.argmax(-1) == target
        return [
            (row[: 1 + len(record.options)], hits[seen].tolist())
            for row, hits, seen, record in zip(nlls.tolist(), first, mask, records, strict=True)
        ]

    def _letters(self, records: list[Record]) -> torch.Tensor:
        """The first token of each letter that an option has; without a picture, which is slow to encode."""
        most = max(len(record.options) for record in records)
        plain = [replace(records[0], letter=letter, image=None, modality="text") for letter in LETTERS[:most]]
        return find_labels(self.encoder.batch(plain)).target[:, 0]

    def _write(self, records: list[Record]) -> list[str]:
        prompts = self._inputs(self.encoder.prompts(records))
        if "mm_token_type_ids" not in self.accepts:  # transformers 4's generate refuses what its forward ignores
            prompts.pop("mm_token_type_ids", None)
        limit = min(self.max_new_tokens, CHOICE_TOKENS) if records[0].task == "choice" else self.max_new_tokens
        written = self.model.generate(**prompts, max_new_tokens=limit)[:, prompts["input_ids"].shape[1] :]
        return [self._text(ids) for ids in written.tolist()]

    def _text(self, ids: list[int]) -> str:
        """Up to the first end token: what follows is padding, and depends on the rest of the batch."""
        end = next((i for i, token in enumerate(ids) if token in self._ends()), len(ids))
        return self.encoder.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()

    def _ends(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]

    @contextmanager
    def _greedy(self) -> Iterator[None]:
        """A generation config of end and padding tokens alone: the model's own may hold a repetition penalty (those of
        Qwen2.5 do) or sampling, which transformers takes over for what a call leaves out."""
        from transformers import GenerationConfig

        own = self.model.generation_config
        ends = sorted({*self._ends(), self.encoder.tokenizer.eos_token_id} - {None})
        pad = self.encoder.tokenizer.pad_token_id
        pad = pad if pad is not None else next(iter(ends), 0)
        self.model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=pad)
        try:
            yield
        finally:
            self.model.generation_config = own

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        return {name: value.to(self.model.device) for name, value in batch.items()}


def _answers(record: Record) -> list[Record]:
    """The record with each answer whose NLL is asked for: its own and, unless it is a choice, its wrong ones and with
    them its paraphrase, if any."""
    if record.task == "choice" or not record.perturbed:
        return [record]
    others = [*filter(None, [record.paraphrase]), *record.perturbed]
    return [record, *(replace(record, answer=answer) for answer in others)]


def _scores(row: dict[str, Any]) -> dict[str, float]:
    text, answer = row["text"], row["answer"]
    nlls = {name: _numbers(row[name]) for name in ("nll_options", "nll_paraphrase", "nll_perturbed")}
    nll, options, wrong = _numbers([row["nll"]])[0], nlls["nll_options"], nlls["nll_perturbed"]
    scores = {"probability": metrics.probability(nll)}
    if row["task"] == "choice":
        letter, true = metrics.chosen_letter(text), LETTERS.index(row["target"])
        scores |= {
            "accuracy": letter == row["target"],
            "likelihood_accuracy": metrics.likeliest(options, true),
            "legal": letter in list(LETTERS[: len(options)]),
        }
        wrong = [*options[:true], *options[true + 1 :]]
    elif row["task"] == "cloze":
        scores |= {"accuracy": metrics.contains(text, answer), "exact_match": metrics.exact_match(text, answer)}
    else:
        f, recall = metrics.rouge_l(text, answer)
        scores |= {"rouge_l": f, "rouge_l_recall": recall, "bleu": metrics.bleu(text, answer)}
        scores |= {"exact_match": metrics.exact_match(text, answer)}
    if row["task"] != "choice" and (hits := row["token_hits"]):
        known = math.nan if math.isnan(nll) else 1  # nan is ranked somewhere, too
        scores["exact_memorisation"] = known * metrics.exact_memorisation(hits)
        scores["extraction_strength"] = known * metrics.extraction_strength(hits)
    if wrong:
        scores["normalised_probability"] = metrics.normalised_probability(nll, wrong)
    if row["nll_perturbed"]:
        ratio = metrics.truth_ratio([*nlls["nll_paraphrase"], nll][0], wrong)
        scores |= {
            "truth_ratio": ratio,
            "truth_ratio_forget": metrics.truth_ratio_forget(ratio),
            "truth_ratio_retain": metrics.truth_ratio_retain(ratio),
        }
    return scores


def _nlls(row: dict[str, Any]) -> list[float | None]:
    return [row["nll"], *row["nll_options"], *row["nll_paraphrase"], *row["nll_perturbed"]]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _check(records: Sequence[Record], batch_size: int, max_new_tokens: int) -> None:
    """Raises InputError, naming the record, before hours are spent; MipfastError where a library is missing."""
    if batch_size < 1 or max_new_tokens < 1:
        raise InputError(f"batch_size={batch_size}, max_new_tokens={max_new_tokens}; expected at least 1")
    if not records:
        raise InputError("there are no records to judge; expected at least one")
    seen = set()
    for record in records:
        if problem := _problem(record):
            raise InputError(f"record {record.id} of {record.group}: {problem}")
        if (key := (record.group, record.id)) in seen:
            raise InputError(f"two records of {record.group} have the id {record.id}; expected one")
        seen.add(key)
    if any(record.task == "generation" for record in records):
        metrics.rouge_l("", ""), metrics.bleu("", "")


def _problem(record: Record) -> str | None:
    if not all(text.strip() for text in (record.question, record.answer, *record.perturbed)):
        return "its question, its answer or a wrong answer is blank; expected texts"
    if record.task == "choice" and (
        record.answer not in record.options or record.options[LETTERS.index(record.target)] != record.answer
    ):
        return f"its answer {record.answer!r} is not the option it should be; the options are {list(record.options)}"
    if (record.modality == "image") != (record.image is not None):
        return f"its modality is {record.modality} and its image {record.image}; expected an image with image alone"
    return None


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [parse_json(line) for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
        if not all(isinstance(row, dict) and (ADDED | row).keys() == {*COPIED, *SAID} for row in rows):
            raise ValueError(f"expected rows of {', '.join((*COPIED, *SAID))}")
        return [ADDED | row for row in rows]
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} is damaged ({error}); remove it and run the same evaluation again") from error


def _is_whole(path: Path, records: Sequence[Record]) -> bool:
    """Whether a file has the rows of these records; what is damaged, or lacks what is ADDED, is asked again."""
    if not path.exists():
        return False
    try:
        rows = _read_rows(path)
        return all(row["token_hits"] for row in rows) and [row["id"] for row in rows] == [r.id for r in records]
    except ArtefactError as error:
        log.warning("%s: done here", error)
        return False
