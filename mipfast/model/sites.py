"""Where a model's FFN neurons live. Neuron (l, j) is channel j of the input of block l's FFN output projection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mipfast.errors import ArtefactError, InputError, ModelError
from mipfast.model import families
from mipfast.model.fingerprint import fingerprint
from mipfast.model.patching import unwrapped


@dataclass(frozen=True, eq=False)
class Stack:
    """One tower of blocks with an FFN each. A projection may be PEFT's wrapper of one. See `find_sites`."""

    name: str
    """Dotted name of the blocks' ModuleList in the model without wrappers."""
    blocks: tuple[nn.Module, ...]
    """The blocks, first to last."""
    ffns: tuple[nn.Module, ...]
    """Of every block the module around its FFN's projections; the output projection where no module is."""
    inputs: tuple[tuple[Any, ...], ...]
    """Of every block the projections that write its neurons: gate and up, or fc1."""
    outputs: tuple[Any, ...]
    """Of every block the projection that reads its neurons."""
    num_neurons: int
    """Neurons of one block, the width of what its output projection reads."""
    transposed: bool
    """Whether weights are [in, out], as in GPT-2's Conv1D, and not [out, in]."""

    @property
    def num_layers(self) -> int:
        """How many blocks there are."""
        return len(self.blocks)

    def rows(self, layer: int) -> list[tuple[torch.Tensor, int]]:
        """The parameters that write block l's neurons, biases and LoRA's B among them, each with the dimension along
        which the neurons lie."""
        parameters: list[tuple[torch.Tensor, int]] = []
        for projection in self.inputs[layer]:
            base = _base(projection)
            parameters.append((base.weight, int(self.transposed)))
            if base.bias is not None:
                parameters.append((base.bias, 0))
            adapters = getattr(projection, families.ADAPTER_WRITES, {}).values()
            parameters += [(p, 0) for adapter in adapters for p in adapter.parameters()]
        return parameters

    def columns(self, layer: int) -> list[tuple[torch.Tensor, int]]:
        """The same of the parameters that read them; the output projection's own weight comes first."""
        projection = self.outputs[layer]
        adapters = getattr(projection, families.ADAPTER_READS, {}).values()
        return [(_base(projection).weight, 1 - self.transposed), *((adapter.weight, 1) for adapter in adapters)]


@dataclass(frozen=True, eq=False)
class Sites:
    """A model's stacks; `sites[name]` is the one of that name. See `find_sites`."""

    text: Stack
    """The language model's."""
    vision: list[Stack]
    """Every other stack with FFNs, in the model's order."""
    model: nn.Module = field(repr=False)
    """The model without its wrapper."""

    @property
    def stacks(self) -> list[Stack]:
        """All of them, text first."""
        return [self.text, *self.vision]

    def __getitem__(self, name: str) -> Stack:
        for stack in self.stacks:
            if stack.name == name:
                return stack
        raise ModelError(f"no stack {name!r} in this model; it has {', '.join(s.name for s in self.stacks)}")

    def fingerprint(self) -> dict:
        """Names and sizes of the stacks, and the model's hash, for which all weights are read."""
        return {"stacks": self._sizes(), "weights": fingerprint(self.model)}

    def check(self, known: dict, weights: bool = True) -> bool:
        """Whether the model is a fingerprint's, its weights too where they are asked for. Raises ArtefactError where
        names or sizes differ."""
        mine = self._sizes()
        if any(mine.get(name) != size for name, size in known["stacks"].items()):
            raise ArtefactError(
                f"made for another model: it names stacks (layers, neurons) {known['stacks']}, this model has {mine}; "
                "locate on this model again"
            )
        return not weights or fingerprint(self.model) == known["weights"]

    def _sizes(self) -> dict[str, list[int]]:
        return {s.name: [s.num_layers, s.num_neurons] for s in self.stacks}


def find_sites(model: nn.Module) -> Sites:
    """Find a model's FFN neurons: every ModuleList whose blocks each hold one FFN output projection is a stack.

    Neuron (l, j) is channel j of the input of block l's output projection. What projections are called is in
    model/families.py; docs/families.md says what to do for a family that is not found.

    Args:
        model: a transformers causal language model, perhaps with vision towers, perhaps inside PEFT's wrapper. It may
            be on the meta device.

    Returns:
        The text stack and the vision stacks, named as in the model without its wrapper.

    Raises:
        ModelError: where the language model has no such stack or several, for blocks of different widths, and for a
            mixture of experts.

    Example:
        >>> from mipfast import find_sites
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes))
        >>> text = find_sites(model).text
        >>> text.name, text.num_layers, text.num_neurons
        ('model.layers', 2, 24)
    """
    model = unwrapped(model)
    decoder = find_decoder(model)
    names = {id(module): name for name, module in model.named_modules()}
    prefix = names.get(id(decoder), "")
    text: list[Stack] = []
    vision: list[Stack] = []
    for name, module in model.named_modules():
        in_decoder = (name + ".").startswith(prefix + "." if prefix else "")
        if isinstance(module, nn.ModuleList) and len(module) and (stack := _stack(name, module, in_decoder)):
            (text if in_decoder else vision).append(stack)
    if len(text) != 1:
        found = ", ".join(s.name for s in text) or "none"
        raise ModelError(
            f"expected one stack of blocks with an FFN output projection ({', '.join(families.OUTPUT_NAMES)}) under "
            f"{type(model).__name__}.get_decoder(), found {found}; mipfast needs a transformers model with dense FFNs"
        )
    return Sites(text[0], vision, model)


def find_decoder(model: Any) -> Any:
    """The language model's base: embeddings, blocks and last norm. Raises ModelError where there is none."""
    model = unwrapped(model)
    if not hasattr(model, "get_decoder"):
        raise ModelError(f"{type(model).__name__} has no get_decoder(); expected a transformers causal language model")
    decoder = model.get_decoder()
    if decoder is model:  # GPT-2 in transformers 4
        decoder = model.base_model
    return getattr(decoder, families.INNER_DECODER, decoder)


def _stack(name: str, blocks: nn.ModuleList, in_decoder: bool) -> Stack | None:
    parts = [_ffn(block, in_decoder) for block in blocks]
    for i, block in enumerate(blocks):
        experts = [n for n, _ in block.named_parameters() if families.EXPERTS in n.split(".")]
        if experts:
            raise ModelError(
                f"{name}.{i} is a mixture of experts ({experts[0]}), whose neurons only some tokens reach; fused ones "
                "have no projection to score them at. Not supported; use a dense model"
            )
    if any(ffn is None for ffn in parts):
        return None
    ffns, inputs, outputs = zip(*parts, strict=True)
    widths = sorted({_sizes(output)[0] for output in outputs})
    if len(widths) > 1:
        raise ModelError(f"the FFNs of {name} have different widths {widths}; expected one width per stack")
    return Stack(name, tuple(blocks), ffns, inputs, outputs, widths[0], _is_transposed(outputs[0]))


def _ffn(block: nn.Module, in_decoder: bool) -> tuple[nn.Module, tuple[nn.Module, ...], nn.Module] | None:
    """(the FFN, its input projections, its output projection) of a block that has exactly one."""
    outputs = []
    for name, module in _projections(block):
        *parents, own = name.split(".")
        bare = in_decoder and not parents and own in families.BARE_OUTPUTS
        if bare or own in families.OUTPUT_NAMES and any(p in families.FFN_NAMES for p in parents):
            outputs.append((".".join(parents), module))
    if len(outputs) != 1:
        return None
    parent, output = outputs[0]
    around = block.get_submodule(parent)
    siblings = [m for name, m in _projections(around) if m is not output and (parent or "." not in name)]
    ffn = around if parent else output
    return ffn, tuple(m for m in siblings if _sizes(m)[1] == _sizes(output)[0]), output


def _projections(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The projections below a module, by name; not the parts of a wrapped one."""
    for name, child in module.named_children():
        if isinstance(_base(child), nn.Linear) or _is_transposed(child):
            yield prefix + name, child
        else:
            yield from _projections(child, f"{prefix}{name}.")


def _base(projection: Any) -> Any:
    """The projection itself inside PEFT's wrapper."""
    return getattr(projection, families.ADAPTED, projection)


def _is_transposed(projection: nn.Module) -> bool:
    return type(_base(projection)).__name__ in families.TRANSPOSED


def _sizes(projection: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a projection."""
    base = _base(projection)
    return (base.nx, base.nf) if _is_transposed(base) else (base.in_features, base.out_features)


def neurons_valid(indices: torch.Tensor, stack: Stack) -> bool:
    """Whether every index names a neuron of the stack."""
    return bool(((indices >= 0) & (indices < stack.num_neurons)).all())


def check_layer(layer: int, text: Stack) -> None:
    """Raises InputError for a layer that the text stack does not have."""
    if layer not in range(text.num_layers):
        raise InputError(f"layer={layer!r}; the text stack has layers 0..{text.num_layers - 1}")
