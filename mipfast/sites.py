"""Where a model's FFN neurons live. Neuron (l, j) is channel j of the input of block l's FFN output projection."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mipfast.errors import ArtefactError, ModelError

# What the output projection of an FFN and the module around it are called in transformers.
OUTPUT_NAMES = ("down_proj", "fc2", "c_proj", "w2", "linear_fc2", "dense_4h_to_h", "lin2")
FFN_NAMES = ("mlp", "feed_forward", "ffn", "ff")


@dataclass(frozen=True, eq=False)
class Stack:
    """One tower of blocks. name: dotted name of its ModuleList; inputs[l]: the projections that write block l's neurons
    (gate and up, or fc1); outputs[l]: the one that reads them, weight [hidden, num_neurons]."""

    name: str
    blocks: tuple[nn.Module, ...]
    inputs: tuple[tuple[nn.Linear, ...], ...]
    outputs: tuple[nn.Linear, ...]

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def num_neurons(self) -> int:
        return self.outputs[0].in_features


@dataclass(frozen=True, eq=False)
class Sites:
    """text: the language model's stack; vision: every other stack with FFNs."""

    text: Stack
    vision: list[Stack]

    @property
    def stacks(self) -> list[Stack]:
        return [self.text, *self.vision]

    def __getitem__(self, name: str) -> Stack:
        for stack in self.stacks:
            if stack.name == name:
                return stack
        raise ModelError(f"no stack {name!r} in this model; it has {', '.join(s.name for s in self.stacks)}")

    def fingerprint(self) -> dict:
        """Names and sizes of the stacks, and a hash over 1024 evenly spaced values of every output projection."""
        digest = hashlib.blake2b(digest_size=16)
        for stack in self.stacks:
            for output in stack.outputs:
                flat = output.weight.detach().reshape(-1)
                sample = flat[:: max(1, flat.numel() // 1024)].float().cpu()
                digest.update(sample.numpy().tobytes())
        sizes = {s.name: [s.num_layers, s.num_neurons] for s in self.stacks}
        return {"stacks": sizes, "weights": digest.hexdigest()}

    def check(self, fingerprint: dict) -> bool:
        """Whether the weights are the fingerprint's. Raises ArtefactError where names or sizes differ."""
        mine = self.fingerprint()
        if any(mine["stacks"].get(name) != size for name, size in fingerprint["stacks"].items()):
            raise ArtefactError(
                f"made for another model: it names stacks (layers, neurons) {fingerprint['stacks']}, "
                f"this model has {mine['stacks']}; locate on this model again"
            )
        return mine["weights"] == fingerprint["weights"]


def find_sites(model: nn.Module) -> Sites:
    """The FFN stacks of a transformers model: every ModuleList whose blocks each hold one FFN output projection.

    Raises ModelError where there is none, or where experts are fused into one parameter."""
    decoder = _decoder(model)
    names = {id(module): name for name, module in model.named_modules()}
    prefix = names.get(id(decoder), "")
    text: list[Stack] = []
    vision: list[Stack] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and (stack := _stack(name, module)):
            (text if (name + ".").startswith(prefix + "." if prefix else "") else vision).append(stack)
    if len(text) != 1:
        found = ", ".join(s.name for s in text) or "none"
        raise ModelError(
            f"expected one stack of blocks with an FFN output projection ({', '.join(OUTPUT_NAMES)}) under "
            f"{type(model).__name__}.get_decoder(), found {found}; mipfast needs a transformers model with dense FFNs"
        )
    return Sites(text[0], vision)


def _decoder(model: Any) -> nn.Module:
    if not hasattr(model, "get_decoder"):
        raise ModelError(f"{type(model).__name__} has no get_decoder(); expected a transformers causal language model")
    return model.get_decoder()


def _stack(name: str, blocks: nn.ModuleList) -> Stack | None:
    found = [_ffn(block) for block in blocks]
    for i, block in enumerate(blocks):
        fused = [n for n, p in block.named_parameters() if p.ndim == 3 and "experts" in n]
        if fused:
            raise ModelError(
                f"{name}.{i} keeps its experts in one fused parameter ({fused[0]}): there is no projection whose input "
                "could be scored. Mixture-of-experts models are not supported; use a dense model"
            )
    if any(ffn is None for ffn in found):
        return None
    inputs, outputs = zip(*found, strict=True)
    if len({output.in_features for output in outputs}) > 1:
        sizes = sorted({output.in_features for output in outputs})
        raise ModelError(f"the FFNs of {name} have different widths {sizes}; expected one width per stack")
    return Stack(name, tuple(blocks), inputs, outputs)


def _ffn(block: nn.Module) -> tuple[tuple[nn.Linear, ...], nn.Linear] | None:
    """(input projections, output projection) of a block that has exactly one FFN."""
    outputs = []
    for name, module in block.named_modules():
        *parents, own = name.split(".")
        if isinstance(module, nn.Linear) and own in OUTPUT_NAMES and any(p in FFN_NAMES for p in parents):
            outputs.append((".".join(parents), module))
    if len(outputs) != 1:
        return None
    parent, output = outputs[0]
    siblings = block.get_submodule(parent).modules()
    inputs = tuple(
        m for m in siblings if isinstance(m, nn.Linear) and m.out_features == output.in_features and m is not output
    )
    return inputs, output


def neurons_valid(indices: torch.Tensor, stack: Stack) -> bool:
    """Whether every index names a neuron of the stack."""
    return bool(((indices >= 0) & (indices < stack.num_neurons)).all())
