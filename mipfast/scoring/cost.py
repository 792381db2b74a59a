"""What locating costs before anything is run: FLOPs, bytes read, seconds at the least, and memory, from shapes alone.

A search scores L layers, and to score one it runs every later block forward and backward: work grows with the square of
the depth, and linearly with weights, tokens, samples and steps. The greedy search reads a block's weights anew for
every layer below; a pointwise one, whose layers walk up together, reads them twice.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mipfast.errors import InputError
from mipfast.model.batch import merge_size
from mipfast.model.families import auto_class
from mipfast.model.sites import Stack, find_sites
from mipfast.scoring.config import LocateConfig
from mipfast.scoring.wave import ENOUGH


@dataclass(frozen=True)
class Tower:
    """The blocks of a language model or a vision tower, all of one size."""

    layers: int
    """Blocks."""
    block: int
    """Weights of one block, matrices only."""
    hidden: int
    """Width of the residual stream."""
    neurons: int
    """FFN neurons of one block."""


@dataclass(frozen=True)
class Shape:
    """All of a model that the cost depends on.

    Example:
        >>> from transformers import LlamaConfig
        >>> from mipfast.cost import Shape
        >>> Shape.of(LlamaConfig(num_hidden_layers=2)).text
        Tower(layers=2, block=202375168, hidden=4096, neurons=11008)
    """

    text: Tower
    """The language model's blocks."""
    vision: Tower | None
    """The vision tower's; None without one."""
    vocab: int
    """Words."""
    merge: int
    """Patches per image token."""
    weights: int
    """All of the model's."""
    element_size: int
    """Bytes of one weight."""

    @property
    def head(self) -> int:
        """Weights of the language-model head."""
        return self.vocab * self.text.hidden

    @classmethod
    def of(cls, model: Any, stack: str | None = None) -> Shape:
        """Read off a model, or off a transformers config alone: no weights are made.

        Args:
            model: a transformers model or config.
            stack: name of the vision tower, where there are several.

        Returns:
            The model's shape.

        Raises:
            ModelError: as `find_sites` does.
        """
        if not isinstance(model, nn.Module):
            model, config = _weightless(model), model
            element_size = (getattr(config, "dtype", None) or torch.bfloat16).itemsize
        else:
            config = model.config
            element_size = next(model.parameters()).element_size()
        sites = find_sites(model)
        vision = sites[stack] if stack in [s.name for s in sites.vision] else next(iter(sites.vision), None)
        return cls(
            _tower(sites.text),
            _tower(vision) if vision else None,
            config.get_text_config().vocab_size,
            (merge_size(config) or 1) ** 2,
            sum(p.numel() for p in model.parameters()),
            element_size,
        )


@dataclass(frozen=True)
class Device:
    """How fast a machine computes and reads.

    Example:
        >>> from mipfast.cost import Device
        >>> Device("my card", flops=300e12, bandwidth=1.5e12).memory
        0.0
    """

    name: str
    """What to call it."""
    flops: float
    """Floating-point operations per second of large matrix products."""
    bandwidth: float
    """Bytes per second."""
    memory: float = 0.0
    """Bytes; 0 where unknown."""

    @classmethod
    def measured(cls, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Device:
        """Measure this machine by one matrix product and one copy, best of five; takes about a second.

        Args:
            device: as torch names it.
            dtype: of the matrix product.

        Returns:
            The device, with its memory where it is a GPU's.
        """
        device = torch.device(device)
        rows, width = (8192, 8192) if device.type == "cuda" else (512, 2048)
        # drawn, as a GPU multiplies constants with less power, and so faster than anybody's data
        random = torch.Generator(device).manual_seed(0)
        left, right = (torch.randn(n, width, generator=random, device=device).to(dtype) for n in (rows, width))
        product = _fastest(lambda: left @ right, device)
        source = torch.zeros(64 * 2**20, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy = _fastest(lambda: target.copy_(source), device)
        memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
        return cls("this machine", 2 * rows * width**2 / product, 2 * len(source) / copy, memory)


# Nodes of the mean layer with tol=0.01, weighted by what lies above it: 16, 19 and 32 in three language models for a
# greedy search (docs/search.md); of vision only a small tower was seen.
NODES = {"text": {"greedy": 20, "pointwise": 8}, "vision": {"greedy": 5, "pointwise": 5}}
# Rates that large bfloat16 products and copies reach; an H100 (SXM) differs from an H200 in its memory only.
DEVICES = {
    "H100": Device("H100", 790e12, 3.0e12, 80e9),
    "H200": Device("H200", 790e12, 4.3e12, 141e9),
}


@dataclass(frozen=True)
class Estimate:
    """What `estimate` found, of all samples. Its phases: capture (clean run and check), search (what the scores need)
    and completeness (the residual's row at alpha = 0 and its derivative, of the batches for which config.residuals
    wants it)."""

    tokens: int
    """Of all samples."""
    flops: dict[str, float]
    """Floating-point operations by phase."""
    bytes: dict[str, float]
    """Bytes of weights read, by phase."""
    seconds: dict[str, float]
    """Seconds by phase, at the least: every product at the device's rate or its weights at its bandwidth, no
    launches."""
    memory: float
    """Bytes at the peak, with all steps in one replay."""


def estimate(
    model: Any,
    *,
    prompt: int,
    answer: int,
    patches: int = 0,
    samples: int = 1,
    batch_size: int = 1,
    config: LocateConfig | None = None,
    device: str | Device = "H200",
) -> Estimate:
    """Estimate what `locate` costs on samples of one size, before anything is run.

    Assumes blocks that add their FFN's output and attention that can be cut to a suffix, as `locate` itself checks;
    attention in a vision tower is counted as global. With tol the nodes are not known beforehand: as many are counted
    as three language models, or a small vision tower, asked for at 0.01 in the mean; a sample may take half or twice.
    Nor is where a subject stands: positions="subject" is counted as if it began the sample, which is the most.
    A call's comparison of two samples with plain autograd is left out (docs/reliability.md).

    Args:
        model: a Shape, a model, or a transformers config without weights.
        prompt: text tokens of one sample's prompt, image placeholders not among them.
        answer: tokens of its answer.
        patches: of its image in the vision tower; 0 is none.
        samples: how many there are.
        batch_size: samples of one batch.
        config: as `locate` takes it; None is LocateConfig().
        device: a name in mipfast.cost.DEVICES, or a Device.

    Returns:
        FLOPs, bytes read and seconds by phase, and bytes of memory at the peak.

    Raises:
        InputError: for an impossible size, an unknown device or a layer that the tower lacks.
        ModelError: as `find_sites` does.

    Example:
        >>> from transformers import LlamaConfig
        >>> from mipfast import estimate
        >>> cost = estimate(LlamaConfig(num_hidden_layers=4), prompt=100, answer=20, samples=64, device="H100")
        >>> cost.tokens, f"{sum(cost.seconds.values()):.2f} s"
        (7680, '0.42 s')
    """
    config = (config or LocateConfig()).resolved()
    shape = model if isinstance(model, Shape) else Shape.of(model, config.stack)
    if isinstance(device, str):
        if device not in DEVICES:
            raise InputError(f"unknown device {device!r}; expected one of {', '.join(DEVICES)}, or a Device")
        device = DEVICES[device]
    sizes = {"prompt": prompt, "answer": answer, "samples": samples, "batch_size": batch_size}
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name}={size}; expected at least 1")
    vision = config.modality == "vision"
    if vision and not (shape.vision and patches):
        raise InputError("modality='vision' needs a model with a vision tower and samples with patches > 0")
    batch_size = min(batch_size, samples)
    work = _Work(shape, batch_size, prompt + answer + patches // shape.merge, answer, patches)
    copies = _vision(work, config) if vision else _text(work, config)
    every = samples / batch_size
    measured = {"all": every, "first": 1.0, "none": 0.0}[config.residuals]
    flops, read, seconds = {}, {}, {}
    for phase, products in work.phases.items():
        batches = measured if phase == "completeness" else every
        flops[phase] = batches * sum(f for f, _ in products)
        read[phase] = batches * sum(b for _, b in products)
        seconds[phase] = batches * sum(max(f / device.flops, b / device.bandwidth) for f, b in products)
    return Estimate(samples * work.tokens, flops, read, seconds, work.memory(copies, vision))


class _Work:
    """The matrix products of one batch, by phase: (FLOPs, bytes of weights read)."""

    def __init__(self, shape: Shape, batch_size: int, tokens: int, answer: int, patches: int):
        self.shape, self.batch_size = shape, batch_size
        self.tokens, self.answer, self.patches = tokens, answer, patches
        self.span = tokens  # of one sample, what a replay runs
        self.phases: dict[str, list[tuple[float, float]]] = {"capture": [], "search": [], "completeness": []}

    def blocks(self, phase: str, tower: Tower, count: float, rows: int, keys: int, read: float | None = None) -> None:
        """Count block passes over rows of every sample, each attending to keys; read: blocks read for them, None one
        each."""
        if count and rows:
            matmul = tower.block + 2 * keys * tower.hidden  # attention's two products
            weights = (count if read is None else read) * tower.block
            self.phases[phase].append((2 * count * self.batch_size * rows * matmul, weights * self.shape.element_size))

    def head(self, phase: str, count: float, copies: int, read: float | None = None) -> None:
        """Count passes of the head over the label positions."""
        rows = copies * self.batch_size * self.answer
        weights = (count if read is None else read) * self.shape.head
        self.phases[phase].append((2 * count * rows * self.shape.head, weights * self.shape.element_size))

    def later(
        self, phase: str, tower: Tower, layers: list[int], passes: int, rows: int, keys: int, together: int
    ) -> None:
        """For each of these layers, `passes` (forward, or forward and backward) over the blocks after it, so many
        layers together."""
        after = [tower.layers - 1 - layer for layer in layers]
        self.blocks(phase, tower, passes * sum(after), rows, keys, passes * sum(after[::together]))

    def together(self, config: LocateConfig, layers: list[int], rows: int) -> int:
        """Layers of one wave, of so many rows of a sample each (`wave.CleanRun.waves`, memory permitting)."""
        if config.search != "pointwise" or config.combine != "sum":
            return 1
        return min(len(layers), max(1, ENOUGH // max(1, rows * self.batch_size)))

    def memory(self, copies: int, vision: bool) -> float:
        """The weights, and of every copy what autograd keeps (about 8 hidden-wide and 3 FFN-wide tensors per token and
        block), states and tangents, and the logits with their float32 softmax and gradient."""

        def kept(tower: Tower, tokens: int) -> int:
            return tower.layers * tokens * (10 * tower.hidden + 3 * tower.neurons)

        text, size = self.shape.text, self.shape.element_size
        per_copy = kept(text, self.span) * size
        if vision and self.shape.vision:
            per_copy += kept(self.shape.vision, self.patches) * size
        per_copy += self.answer * self.shape.vocab * (size + 8)
        prefix = 0 if vision else text.layers * self.tokens * 2 * text.hidden * size
        return self.shape.weights * size + self.batch_size * (copies * per_copy + prefix)


def _text(work: _Work, config: LocateConfig) -> int:
    """The suffix from the first chosen position on, against a clean prefix. Copies in one replay."""
    shape, text, keys = work.shape, work.shape.text, work.tokens
    if config.positions in ("last_prompt", "answer"):
        work.span = work.answer
    elif isinstance(config.positions, str):
        work.span = work.tokens - 1
    else:
        work.span = work.tokens - 1 - int(torch.as_tensor(config.positions).min())
    scaled, clean = _rows(config)
    layers, span = config.scored(text.layers), work.span
    depth = len(layers)
    work.blocks("capture", text, text.layers, work.tokens, keys)
    work.head("capture", 1, 1)
    if shape.vision:
        work.blocks("capture", shape.vision, shape.vision.layers, work.patches, work.patches)
    if config.combine == "sum":
        work.blocks("capture", text, text.layers, span, keys)  # the check that blocks only add their FFN's output
    work.blocks("search", text, depth, scaled * span, keys)
    together = work.together(config, layers, scaled * span)
    work.later("search", text, layers, 2, scaled * span, keys, together)
    work.head("search", 2 * depth, scaled, 2 * math.ceil(depth / together))
    if clean:
        work.blocks("search", text, 2 * text.layers - layers[0], span, keys)
        work.head("search", 2, 1)
    if config.combine == "sum":
        if config.tol is None:  # else alpha = 0 is one of the nodes
            work.blocks("completeness", text, depth, span, keys)
            work.later("completeness", text, layers, 1, span, keys, depth)
            work.head("completeness", depth, 1, 1)
        if config.search == "greedy":
            work.blocks("completeness", text, depth - 1, (scaled + 2 * clean) * span, keys)
    # a copy keeps the blocks above its layer
    return math.ceil(scaled * sum(text.layers - layer for layer in layers[:together]) / text.layers)


def _vision(work: _Work, config: LocateConfig) -> int:
    """Blocks of the vision tower, and the whole language model for every layer and step. Copies in one replay."""
    text, tower, patches, tokens = work.shape.text, work.shape.vision, work.patches, work.tokens
    assert tower is not None  # estimate() saw to it
    work.blocks("capture", tower, tower.layers, patches, patches)
    work.blocks("capture", text, text.layers, tokens, tokens)
    work.head("capture", 1, 1)
    if config.combine == "released":
        return 0  # its closed form needs the clean run only
    scaled, clean = _rows(config)
    layers = config.scored(tower.layers)
    depth = len(layers)
    work.blocks("capture", tower, tower.layers, patches, patches)  # the check that blocks only add their FFN's output
    most = work.together(config, layers, scaled * patches)
    at_zero = [(1, 1, "completeness", depth)] if config.tol is None else []  # else it is one of the nodes
    for passes, rows, phase, together in [(2, scaled, "search", most), *at_zero]:
        work.blocks(phase, tower, depth, rows * patches, patches)
        work.later(phase, tower, layers, passes, rows * patches, patches, together)
        runs = passes * math.ceil(depth / together)
        work.blocks(phase, text, passes * depth * text.layers, rows * tokens, tokens, runs * text.layers)
        work.head(phase, passes * depth, rows, runs)
    if clean:
        work.blocks("search", tower, 2 * tower.layers - layers[0], patches, patches)
        work.blocks("search", text, 2 * text.layers, tokens, tokens)
        work.head("search", 2, 1)
    if config.search == "greedy":
        work.blocks("completeness", tower, depth - 1, (scaled + 2 * clean) * patches, patches)
    return scaled * most


def _rows(config: LocateConfig) -> tuple[int, int]:
    """(nodes that cost a copy per layer, nodes at alpha = 1, which one clean pass serves for all layers)."""
    if config.tol is not None:
        return NODES[config.modality][config.search] - 1, 1
    nodes, _ = config.rule()
    clean = int((nodes == 1).sum()) if config.combine == "sum" else 0
    return len(nodes) - clean, clean


def _tower(stack: Stack) -> Tower:
    matrices = sum(p.numel() for block in stack.blocks for p in block.parameters() if p.ndim == 2)
    hidden = stack.columns(0)[0][0].numel() // stack.num_neurons
    return Tower(stack.num_layers, matrices // stack.num_layers, hidden, stack.num_neurons)


def _weightless(config: Any) -> nn.Module:
    with torch.device("meta"):
        return auto_class(config).from_config(config, trust_remote_code=False)


def _fastest(work: Any, device: torch.device) -> float:
    """Seconds of the quickest of five runs."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
