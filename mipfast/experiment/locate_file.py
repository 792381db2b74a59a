"""Locating over a data file of any length, or over records, results on disk chunk by chunk; a run that was stopped at
any moment goes on to the same result.

A chunk is what one file on disk holds: CHUNK batches of consecutive samples, sorted by length inside it so that a batch
holds little padding. A file is renamed into place, so a folder holds whole chunks only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import compress, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from mipfast.data.encoder import Encoded, Encoder, in_batches
from mipfast.data.jsonl import EXPECTED, read_lines
from mipfast.data.records import Record, digest
from mipfast.errors import ArtefactError, InputError, MipfastError
from mipfast.files import RUN, claim, read_run, write_atomic
from mipfast.model.fingerprint import unchanged
from mipfast.model.sites import find_sites
from mipfast.scoring.attribution import PER_SAMPLE, Attribution, convergence, per_label
from mipfast.scoring.config import LocateConfig
from mipfast.scoring.cost import DEVICES, Device, Estimate, Shape, estimate
from mipfast.scoring.search import locate

log = logging.getLogger("mipfast")
CHUNK = 8  # batches per chunk: enough for a sort to help, few enough that a stop loses little
SHARDS, AGGREGATE = "shard-*.safetensors", "aggregate.safetensors"
Samples = str | Path | Sequence[Record]  # a JSONL file, or records as they are
Advance = Callable[[list[Encoded]], None]  # a batch is done
Size = tuple[int, int, int, int]  # of a batch: samples, tokens before the first answer and after, patches per sample
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


@dataclass(frozen=True)
class Survey:
    """What the data holds."""

    samples: int
    tokens: int
    """Of all samples together, prompts and answers."""
    digest: str
    """sha256 of the file, or the records' hash."""
    inputs: str
    """sha256 of every sample's tokens, as the template, which may write the date, made them."""
    chunks: list[Counter[Size]]
    """How many batches of each size every chunk has."""


def survey(
    encoder: Encoder,
    data: Samples,
    config: LocateConfig,
    batch_size: int = 8,
    limit: int | None = None,
) -> Survey:
    """Read and tokenise all of it once, so that a malformed line shows before hours are spent.

    Of images only the sizes are read.

    Args:
        encoder: of the model's folder.
        data: a JSONL file (docs/streaming.md), or records.
        config: its modality says whether every sample needs a picture.
        batch_size: samples per batch.
        limit: the most samples.

    Raises:
        InputError: with the line's number, for a sample that cannot be located on.

    Example:
        >>> import mipfast
        >>> from pathlib import Path
        >>> from mipfast.data import Record
        >>> from mipfast.samples import Encoder
        >>> from mipfast.streaming import survey
        >>> encoder = Encoder.from_pretrained(Path(mipfast.__file__).parent / "demo" / "weights" / "base")
        >>> record = Record("7", "", "text", "generation", "Name the pet", "dog")
        >>> surveyed = survey(encoder, [record], mipfast.LocateConfig())
        >>> surveyed.samples, surveyed.tokens
        (1, 4)
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise InputError(f"batch_size={batch_size}, limit={limit}; expected at least 1")
    samples, tokens, chunks, inputs = 0, 0, [], hashlib.sha256()
    for lines in _chunks(data, batch_size, limit):
        chunk = _encoded(encoder, lines, config, data)
        samples, tokens = samples + len(chunk), tokens + sum(s.tokens for s in chunk)
        inputs.update(repr([(s.prompt, s.answer, s.patches) for s in chunk]).encode())
        chunks.append(Counter(_size([chunk[i] for i in order]) for order in in_batches(chunk, batch_size)))
    if not samples:
        raise InputError(f"{data} is empty; {EXPECTED if isinstance(data, str | Path) else 'expected records'}")
    return Survey(samples, tokens, _digest(data), inputs.hexdigest(), chunks)


@dataclass(frozen=True)
class Forecast:
    """What a run would take at least."""

    flops: float
    seconds: dict[str, float]
    """On each device, by name."""
    memory: float
    """Bytes, of the largest batch."""


def forecast(shape: Shape, surveyed: Survey, config: LocateConfig, devices: Iterable[Device] = ()) -> Forecast:
    """The cost model (`mipfast.estimate`) summed over a file's batches.

    Args:
        shape: of the model, `mipfast.cost.Shape.of`.
        surveyed: what `survey` found in the file.
        config: what `locate_file` will be given.
        devices: whose seconds are told beside those of `mipfast.cost.DEVICES`.

    Example:
        >>> import mipfast
        >>> from pathlib import Path
        >>> from mipfast.cost import Shape
        >>> from mipfast.data import Record
        >>> from mipfast.samples import Encoder
        >>> from mipfast.streaming import forecast, survey
        >>> encoder = Encoder.from_pretrained(Path(mipfast.__file__).parent / "demo" / "weights" / "base")
        >>> config = mipfast.LocateConfig()
        >>> surveyed = survey(encoder, [Record("7", "", "text", "generation", "Name the pet", "dog")], config)
        >>> sorted(forecast(Shape.of(encoder.config), surveyed, config).seconds)
        ['H100', 'H200']
    """
    devices = [*devices, *DEVICES.values()]
    seconds = {device.name: 0.0 for device in devices}
    flops, memory = 0.0, 0.0
    batches = sum(surveyed.chunks, Counter[Size]())
    # residuals="first" measures each chunk's first batch alone: every batch is counted with that share of the cost
    share = len(surveyed.chunks) / batches.total() if config.residuals == "first" else 1.0

    def summed(phases: dict[str, float]) -> float:
        return sum(value * (share if phase == "completeness" else 1) for phase, value in phases.items())

    for size, count in batches.items():
        for device in devices:
            one = _estimated(shape, size, config, device)
            seconds[device.name] += count * summed(one.seconds)
        flops, memory = flops + count * summed(one.flops), max(memory, one.memory)
    return Forecast(flops, seconds, memory)


def _estimated(shape: Shape, size: Size, config: LocateConfig, device: Device) -> Estimate:
    samples, before, after, patches = size
    text = max(1, before - patches // shape.merge)
    sizes = {"prompt": text, "answer": after, "patches": patches, "samples": samples, "batch_size": samples}
    return estimate(shape, **sizes, config=config, device=device)


def locate_file(
    model: nn.Module,
    encoder: Encoder,
    data: Samples,
    out: str | Path,
    config: LocateConfig | None = None,
    *,
    batch_size: int = 8,
    aggregate: bool = False,
    limit: int | None = None,
) -> None:
    """Locate on every sample of a data file, or every record, into a folder that `read` reads; what is there already is
    not done again.

    Args:
        model: a transformers model.
        encoder: of the model's folder.
        data: a JSONL file (docs/streaming.md), or records.
        out: the folder, for one process at a time: shard-*.safetensors, one per chunk, and run.json.
        config: as of `mipfast.locate`; its progress shows a bar.
        batch_size: samples per batch.
        aggregate: write one file of running sums instead, whatever the number of samples.
        limit: the most samples.

    Raises:
        ArtefactError: where the folder belongs to another model, file or config.
        InputError: for a malformed file.
        MipfastError: whatever `locate` raises, with the lines or records it happened on.

    Example:
        >>> import mipfast, tempfile
        >>> from pathlib import Path
        >>> from mipfast import streaming
        >>> from mipfast.data import Record
        >>> from mipfast.samples import Encoder, load_model
        >>> demo = Path(mipfast.__file__).parent / "demo" / "weights" / "base"
        >>> records = [Record(pet, "", "text", "generation", "Name the pet", pet) for pet in ("dog", "cat")]
        >>> config = mipfast.LocateConfig(search="pointwise", n_steps=1)
        >>> folder = tempfile.mkdtemp()
        >>> streaming.locate_file(load_model(demo), Encoder.from_pretrained(demo), records, folder, config)
        >>> streaming.read(folder).scores.shape  # samples, layers, neurons
        torch.Size([2, 5, 1024])
    """
    out, config = Path(out), (config or LocateConfig()).resolved()
    surveyed = survey(encoder, data, config, batch_size, limit)
    claim(out, _identity(model, encoder, surveyed, config, batch_size, aggregate, limit))
    _remove_damaged(out)
    sums = _Sums.load(out) if aggregate else None
    shards = [out / SHARDS.replace("*", f"{number:06d}") for number in range(len(surveyed.chunks))]
    done = [number < sums.facts["chunks"] if sums else shards[number].exists() for number in range(len(shards))]
    if all(done):
        log.info("%s is finished: all %d samples are there, nothing left to do", out, surveyed.samples)
        return
    with unchanged(model), _progress(model, surveyed, config, done) as advance:
        for number, lines in enumerate(_chunks(data, batch_size, limit)):
            if done[number]:
                continue
            chunk = _encoded(encoder, lines, config, data)
            scored = _locate_chunk(model, encoder, chunk, replace(config, progress=False), batch_size, data, advance)
            if sums:
                sums.add(scored)
                sums.save(out)
            else:
                tensors = {"scores": scored.scores, "path": scored.path, "error": scored.error}
                _save(shards[number], tensors, {"report": scored.report})


@contextmanager
def _progress(model: nn.Module, surveyed: Survey, config: LocateConfig, done: list[bool]) -> Iterator[Advance]:
    """A bar over the work that `mipfast.estimate` expects, so that the time left counts long samples still to come: by
    FLOPs an answer of 24 tokens takes 20 times one of a single token, a prompt of 600 no more than 4 times one of 20.
    Yields what to call after each batch."""
    shape = Shape.of(model, config.stack)

    @cache
    def work(size: Size) -> float:
        flops = _estimated(shape, size, config, DEVICES["H200"]).flops
        return flops["capture"] + flops["search"]  # not the residuals: every chunk has those of its first batch

    chunks = [sum(count * work(size) for size, count in chunk.items()) for chunk in surveyed.chunks]
    before = sum(count * size[0] for chunk in compress(surveyed.chunks, done) for size, count in chunk.items())
    located, initial, desc = 0, sum(compress(chunks, done)), f"locate {config.modality}"

    def advance(batch: list[Encoded]) -> None:
        nonlocal located
        located += len(batch)
        rate = located / (bar.format_dict["elapsed"] or math.inf)
        bar.set_postfix_str(f"{before + located}/{surveyed.samples} samples, {rate:.3g} samples/s", refresh=False)
        bar.update(work(_size(batch)))

    # smoothing=0: the mean rate of this process
    options: dict[str, Any] = {"bar_format": BAR, "smoothing": 0, "disable": not config.progress}
    with tqdm(desc=desc, total=sum(chunks), initial=initial, **options) as bar:
        yield advance


def read(folder: str | Path) -> Attribution:
    """The Attribution of a finished run, as `locate_file` and `mipfast locate` write it.

    Args:
        folder: their out.

    Returns:
        Samples in the file's order. Of an aggregated run two stand-ins, mean + sd and mean - sd, whose mean and mean
        square of scores per label are those of all samples, which is all that NeuronPath.select's mean, contrast and
        snr look at; their path is every neuron that was on any sample's path, most often first, padded with -1, and
        their error the largest of any sample.

    Raises:
        ArtefactError: for an unfinished or damaged folder.
    """
    folder = Path(folder)
    run = read_run(folder)
    if run is None:
        raise ArtefactError(f"{folder / RUN} is missing; expected a folder written by mipfast locate")
    if run["aggregate"]:
        sums = _Sums.load(folder)
        _check_finished(folder, sums.facts["samples"], run["samples"])
        return sums.attribution()
    parts = [_load(path) for path in sorted(folder.glob(SHARDS))]
    _check_finished(folder, sum(len(tensors["path"]) for tensors, _ in parts), run["samples"])
    reports = [facts["report"] for _, facts in parts]
    report = reports[0] | {
        name: [value for one in reports for value in one[name]] for name in PER_SAMPLE if name in reports[0]
    }
    dead = (set(one["layers_without_gradient"]) for one in reports)
    report["layers_without_gradient"] = sorted(set.intersection(*dead))
    scores, paths = (torch.cat([tensors[name] for tensors, _ in parts]) for name in ("scores", "path"))
    untold = torch.full(scores.shape[:2], torch.nan)  # by a version that did not ask
    error = torch.cat([tensors["error"] for tensors, _ in parts]) if "error" in parts[0][0] else untold
    return Attribution(scores, paths, report | convergence(error, report["config"]), error)


class _Sums:
    """Running sums [L,F] of an aggregated run, over scores per label: total and squares in float64, so that adding
    goes on to the same bits; members: on how many samples' paths a neuron was. residuals [L] are summed over the
    measured samples. NaN in layers that were not scored."""

    def __init__(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]):
        self.tensors, self.facts = tensors, facts

    @classmethod
    def load(cls, folder: Path) -> _Sums:
        path = folder / AGGREGATE
        return cls(*_load(path)) if path.exists() else cls({}, {"samples": 0, "chunks": 0})

    def add(self, located: Attribution) -> None:
        scores = per_label(located).double()
        on_path = torch.zeros(scores.shape, dtype=torch.int64)
        on_path.scatter_add_(2, located.path.clamp_min(0), (located.path >= 0).long())
        # not every sample's need be measured, and not every layer's
        residuals = [[math.nan if r is None else r for r in one] for one in located.report["residuals"] if one]
        new = {
            "total": scores.sum(0),
            "squares": scores.square().sum(0),
            "members": on_path.sum(0),
            "measured": torch.tensor(len(residuals)),
            "residuals": torch.tensor(residuals or [[0.0] * scores.shape[1]], dtype=torch.float64).sum(0),
        }
        worst = located.error.amax(0)
        self.tensors = {name: self.tensors.get(name, 0) + value for name, value in new.items()} | {
            "error": self.tensors.get("error", worst).maximum(worst)
        }
        first = self.facts.get("report", located.report)
        dead = set(first["layers_without_gradient"]) & set(located.report["layers_without_gradient"])
        per_sample: dict[str, Any] = {name: [] for name in PER_SAMPLE if name in first}
        report = first | per_sample | {"layers_without_gradient": sorted(dead)}
        samples, chunks = self.facts["samples"] + len(scores), self.facts["chunks"] + 1
        self.facts = {"samples": samples, "chunks": chunks, "report": report}

    def save(self, folder: Path) -> None:
        _save(folder / AGGREGATE, self.tensors, self.facts)

    def attribution(self) -> Attribution:
        samples = self.facts["samples"]
        mean, squares = (self.tensors[name] / samples for name in ("total", "squares"))
        sd = (squares - mean.square()).clamp_min(0).sqrt()
        members = self.tensors["members"]
        order = members.sort(dim=1, descending=True, stable=True).indices
        path = order.where(members.gather(1, order) > 0, -1)[:, : int((members > 0).sum(1).max())]
        measured = int(self.tensors["measured"])
        residuals = [None if math.isnan(r) else r for r in (self.tensors["residuals"] / measured).tolist()]
        facts = {
            "residuals": [residuals if measured else None] * 2,
            "num_labels": [1, 1],  # the scores are per label already
            "aggregate": {"samples": samples, "rows": "mean + sd, mean - sd of the scores per label"},
        }
        scores = torch.stack([mean + sd, mean - sd]).float()
        untold = torch.full(scores.shape[1:2], torch.nan)  # by a version that did not ask
        error = self.tensors.get("error", untold).expand(2, -1).contiguous()
        report = self.facts["report"] | facts
        report |= convergence(error, report["config"])
        return Attribution(scores, path.expand(2, -1, -1).contiguous(), report, error)


def _size(batch: list[Encoded]) -> Size:
    before = min(len(s.prompt) for s in batch)
    return len(batch), before, max(s.tokens for s in batch) - before, max(s.patches for s in batch)


def _digest(data: Samples) -> str:
    if not isinstance(data, str | Path):
        return digest(data)
    with Path(data).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _where(data: Samples, kind: str = "") -> str:
    """What messages call a sample, before its id."""
    return f"{data}, {kind}line" if isinstance(data, str | Path) else f"{kind}record"


def _chunks(data: Samples, batch_size: int, limit: int | None) -> Iterator[list[Record]]:
    records = read_lines(data, limit) if isinstance(data, str | Path) else islice(data, limit)
    while chunk := list(islice(records, CHUNK * batch_size)):
        yield chunk


def _encoded(encoder: Encoder, chunk: list[Record], config: LocateConfig, data: Samples) -> list[Encoded]:
    encoded = []
    for record in chunk:
        try:
            if config.modality == "vision" and record.image is None:
                raise InputError('modality vision scores pictures; expected an "image" with every sample')
            encoded.append(encoder.encode(record, subject=config.positions == "subject"))
        except InputError as error:
            raise InputError(f"{_where(data)} {record.id}: {error}") from error
    return encoded


def _locate_chunk(
    model: Any,
    encoder: Encoder,
    chunk: list[Encoded],
    config: LocateConfig,
    batch_size: int,
    data: Samples,
    advance: Advance,
) -> Attribution:
    """Samples in the chunk's order."""
    batches = in_batches(chunk, batch_size)
    lines: list[str] = []

    def inputs() -> Iterator[dict[str, torch.Tensor]]:
        for order in batches:
            batch = [chunk[i] for i in order]
            lines[:] = [sample.id for sample in batch]
            yield {name: value.to(model.device) for name, value in encoder.batch(batch).items()}
            advance(batch)

    try:
        located = locate(model, inputs(), config)
    except MipfastError as error:
        where = f"{_where(data, 'a batch of ')}s {', '.join(lines)}" if lines else _where(data, "before the first ")
        raise type(error)(f"{where}: {error}") from error
    order = torch.tensor([i for batch in batches for i in batch]).argsort()
    report = located.report | {
        name: [located.report[name][i] for i in order] for name in PER_SAMPLE if name in located.report
    }
    off = located.error[order]
    report |= convergence(off, report["config"])
    return Attribution(located.scores[order], located.path[order], report, off)


def _identity(
    model: Any, encoder: Encoder, surveyed: Survey, config: LocateConfig, batch_size: int, aggregate: bool, limit: Any
) -> dict[str, Any]:
    """What a folder's results depend on."""
    return {
        "encoder": encoder.fingerprint(),
        "dtype": str(model.dtype),
        "model": find_sites(model).fingerprint(),
        "data": surveyed.digest,
        "samples": surveyed.samples,
        "limit": limit,
        "batch_size": batch_size,
        "chunk": CHUNK,
        "aggregate": aggregate,
        "config": {name: value for name, value in config.written().items() if name != "progress"},
        "inputs": surveyed.inputs,  # last: what differs above says more
    }


def _check_finished(folder: Path, found: int, wanted: int) -> None:
    if found != wanted:
        raise ArtefactError(
            f"{folder} holds {found} of {wanted} samples; run the same mipfast locate again, it goes on from there"
        )


def _save(path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Tensors and facts in one file: two could be torn apart."""
    from safetensors.torch import save_file

    whole, text = {name: t.contiguous() for name, t in tensors.items()}, json.dumps(facts)
    metadata = {"facts": text, "checksum": _checksum(whole, text)}
    write_atomic(path, lambda p: save_file(whole, p, metadata))


def _load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
        if metadata["checksum"] != _checksum(tensors, metadata["facts"]):
            raise ValueError("another checksum than when it was written")
        return tensors, json.loads(metadata["facts"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ArtefactError(f"{path} is damaged ({error}); remove it and run the same mipfast locate again") from error


def _checksum(tensors: dict[str, torch.Tensor], facts: str) -> str:
    checksum = zlib.crc32(facts.encode())
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, checksum)
    return str(checksum)


def _remove_damaged(folder: Path) -> None:
    """So that its samples are located again."""
    for path in (*folder.glob(SHARDS), *folder.glob(AGGREGATE)):
        try:
            _load(path)
        except ArtefactError as error:
            log.warning("%s: done here", error)
            path.unlink()
