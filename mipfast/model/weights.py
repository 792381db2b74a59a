"""Whether what is written to a weight is what the model then computes with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from mipfast.errors import ModelError


def check_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """The check before every edit: raises ModelError for the first of these weights, by their names in the model, that
    cannot be written to, or where writing would change nothing."""
    for name, weight in weights:
        if not isinstance(weight, nn.Parameter):
            found = (
                "is made from other parameters in every forward pass (as by torch's parametrize, weight_norm or prune)"
            )
            do = "make it permanent with torch.nn.utils.parametrize.remove_parametrizations, or prune.remove, first"
        elif weight.is_meta:
            found, do = "is offloaded: it is fetched for every forward pass", "load the model without offloading"
        elif type(weight) is not nn.Parameter:
            found = f"is a {type(weight).__name__}, as sharded and quantised weights are"
            do = "load the model whole on one device, in a floating-point dtype"
        elif not weight.is_floating_point():
            found, do = f"is {weight.dtype}: quantised", "load the model in a floating-point dtype"
        elif weight.is_inference():
            found, do = "was made inside torch.inference_mode, which forbids writing", "load the model outside it"
        else:
            continue
        raise ModelError(f"{name} {found}. An edit would not reach what the model computes with; {do}")


def check_projections(model: nn.Module, projections: Iterable[nn.Module]) -> None:
    """check_weights of some of the model's projections and of the adapters on them. ModelError also for an adapter that
    is not the sum of its neurons' columns."""
    parts = {id(part) for projection in projections for part in projection.modules()}
    for name, module in model.named_modules():
        if id(module) not in parts:
            continue
        if getattr(module, "lora_magnitude_vector", None) or getattr(module, "lora_variant", None):
            raise ModelError(
                f"{name} has a LoRA adapter that normalises or selects (DoRA or another variant): zeroing some columns "
                "would change what the others do. Call merge_and_unload first, or prune with mode='activations'"
            )
        if hasattr(module, "weight"):
            check_weights([(f"{name}.weight", module.weight)])
