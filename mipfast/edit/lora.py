"""RMisU through PEFT's LoRA, restricted to a path: only B's rows on gate and up and A's columns on down that belong to
the path's neurons are ever other than zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mipfast.edit.prune import Neurons, Slice, active_prunes, neuron_slices
from mipfast.errors import InputError
from mipfast.model.patching import unwrapped
from mipfast.model.sites import Sites, find_sites

NAME = "default"
TRAINABLE = "_mipfast_trainable"  # attribute of the model: the parameters that PEFT froze


def add_adapter(model: Any, path: Neurons, rank: int, alpha: int, seed: int) -> None:
    """Wrap the path's projections in place by LoRA layers that change nothing yet. `model.save_pretrained` then writes
    the adapter. Raises InputError for a model that has one already."""
    sites = find_sites(model)
    projections = [p for place in path for p in (*sites[place[0]].inputs[place[1]], sites[place[0]].outputs[place[1]])]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _inject(model, _names(model, projections), rank, alpha)
    sites = find_sites(model)
    for (stack, layer), index in path.items():
        weight = sites[stack].outputs[layer].lora_A[NAME].weight
        mask = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
        mask[index.to(weight.device)] = True
        weight.data.mul_(mask)


def remove_adapter(model: Any) -> None:
    """Put the projections back, and what may train, as they were before `add_adapter`."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if hasattr(child, "lora_A"):
                setattr(module, name, child.base_layer)
    vars(model).pop("peft_config", None)
    model._hf_peft_config_loaded = False
    for parameter in vars(model).pop(TRAINABLE):
        parameter.requires_grad_()


def merge_adapter(model: Any) -> None:
    """Work the adapter into the weights for good and remove it: a plain model that computes what it did."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.merge()
    remove_adapter(model)


def adapter_slices(sites: Sites, stack: str, layer: int, index: torch.Tensor) -> list[Slice | torch.Tensor]:
    """What of a block's LoRA layers trains."""
    inputs, output = sites[stack].inputs[layer], sites[stack].outputs[layer]
    return [
        *(projection.lora_A[NAME].weight for projection in inputs),
        *(Slice(projection.lora_B[NAME].weight, 0, index) for projection in inputs),
        Slice(output.lora_A[NAME].weight, 1, index),
        output.lora_B[NAME].weight,
    ]


def fold_prune(model: Any) -> None:
    """Undo the newest prune in force and let the adapter do its work: k extra ranks on every output projection that
    lost k columns.

    The model computes what it did, and what `model.save_pretrained` now writes loads in plain PEFT on the original
    base. Without it, load the saved adapter on prune(base, path).

    Args:
        model: a transformers model after prune and misdirect(trainable="lora").

    Raises:
        InputError: without such an adapter, or without a prune by weights in force.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from mipfast import misdirect, prune
        >>> from mipfast.edit.lora import fold_prune
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> forget, retain = ({"input_ids": t, "labels": t} for t in torch.arange(12).view(2, 1, 6))
        >>> path = {("model.layers", 0): torch.tensor([3, 7])}
        >>> handle = prune(model, path)
        >>> report = misdirect(model, path, [forget], [retain], trainable="lora", steps=2)
        >>> fold_prune(model)
        >>> model.model.layers[0].mlp.down_proj.lora_A["default"].weight.shape  # rank 8, and 2 columns
        torch.Size([10, 24])
    """
    model = unwrapped(model)
    prunes, config = active_prunes(model), getattr(model, "peft_config", {}).get(NAME)
    if config is None or not prunes or prunes[-1].mode != "weights":
        raise InputError(
            f"{len(prunes)} prunes in force and {'an' if config else 'no'} adapter; expected both, the newest prune by "
            "weights: prune, then misdirect with trainable='lora', then fold"
        )
    handle, sites = prunes[-1], find_sites(model)
    names = {id(module): name for name, module in model.named_modules()}
    learned = {
        name: [module.lora_A[NAME].weight.data, module.lora_B[NAME].weight.data]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    scaling = config.lora_alpha / config.r
    columns = {}
    for (stack, layer), index in handle.neurons.items():
        part = neuron_slices(sites, stack, layer, index)[1][0]
        columns[names[id(sites[stack].outputs[layer])]] = (part, part.read(), sites[stack].transposed)
    handle.undo()
    for name, (part, pruned, transposed) in columns.items():
        change = (pruned - part.read()).to(torch.promote_types(pruned.dtype, torch.float32)) / scaling
        change = change.T if transposed else change  # [out,k]
        selected = nn.functional.one_hot(part.index, part.parameter.shape[part.dim])  # [k,in]
        a, b = learned.get(name, [selected[:0], change[:, :0]])
        learned[name] = [torch.cat([a, selected.to(change)]), torch.cat([b, change.to(b.dtype)], 1)]
    remove_adapter(model)
    ranks = {name: len(a) for name, (a, _) in learned.items() if len(a) != config.r}
    alphas = {name: scaling * rank for name, rank in ranks.items()}
    _inject(model, list(learned), config.r, config.lora_alpha, rank_pattern=ranks, alpha_pattern=alphas)
    for name, (a, b) in learned.items():
        module = model.get_submodule(name)
        module.lora_A[NAME].weight.data.copy_(a)
        module.lora_B[NAME].weight.data.copy_(b)


def _inject(model: Any, names: list[str], rank: int, alpha: int, **patterns: Any) -> None:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError("trainable='lora' needs peft: pip install mipfast[train]") from error
    if not hasattr(model, "add_adapter") or getattr(model, "peft_config", None):
        raise InputError(
            f"no LoRA adapter can be added to this {type(model).__name__}: expected a transformers model without one; "
            "merge_and_unload what it has first"
        )
    transposed = find_sites(model).text.transposed
    setattr(model, TRAINABLE, [p for p in model.parameters() if p.requires_grad])
    adapter = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, fan_in_fan_out=transposed, **patterns)
    try:
        model.add_adapter(adapter, NAME)
    except BaseException:
        remove_adapter(model)
        raise


def _names(model: nn.Module, modules: list[nn.Module]) -> list[str]:
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(module)] for module in modules]
