"""Whether what is written to a weight is what the model then computes with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from mipfast.errors import ModelError
from mipfast.model import families


def check_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """The check before every edit: raises ModelError for the first of these weights, by their names in the model, that
    cannot be written to, or where writing would change nothing."""
    for name, weight in weights:
        faults = {
            "is made from other parameters in every forward pass: first call parametrize's remove_parametrizations, or "
            "prune.remove, of torch.nn.utils": not isinstance(weight, nn.Parameter),
            "is offloaded: load the model without offloading": weight.is_meta,
            f"is a {type(weight).__name__}, sharded or quantised: load the model whole and in a floating-point dtype": (
                type(weight) is not nn.Parameter
            ),
            f"is {weight.dtype}: load the model in a floating-point dtype": not weight.is_floating_point(),
            "was made in torch.inference_mode, which forbids writing: load the model outside": weight.is_inference(),
        }
        for fault in (text for text, found in faults.items() if found):
            raise ModelError(f"an edit would not reach what the model computes with: {name} {fault}")


def check_projections(model: nn.Module, projections: Iterable[nn.Module]) -> None:
    """check_weights of some of the model's projections and of the adapters on them. Raises ModelError for DoRA too."""
    parts = {id(part) for projection in projections for part in projection.modules()}
    for name, module in model.named_modules():
        if id(module) in parts and getattr(module, families.DORA, None):
            raise ModelError(f"{name} has DoRA: no neuron can be edited without all others; merge_and_unload it first")
        if id(module) in parts and hasattr(module, "weight"):
            check_weights([(f"{name}.weight", module.weight)])
