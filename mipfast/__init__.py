"""mipfast: find the neurons that carry a piece of knowledge in a multimodal model, and make it forget it."""

from importlib import import_module
from typing import Any

from mipfast._version import __version__
from mipfast.errors import (
    ArtefactError,
    BackendError,
    DivergedError,
    InputError,
    MipfastError,
    ModelError,
)

# Loaded when first asked for, so that `import mipfast` costs nothing but torch-free modules.
_HOMES = {
    "find_sites": "sites",
    "Attribution": "attribution",
    "LocateConfig": "attribution",
    "locate": "attribution",
    "NeuronPath": "path",
    "prune": "pruning",
    "RMisUConfig": "misdirection",
    "misdirect": "misdirection",
    "rmisu_loss": "misdirection",
    "hidden_states": "misdirection",
    "steering_target": "misdirection",
    "learned_direction": "direction",
    "RMisUTrainer": "trainer",
    "MIPConfig": "unlearning",
    "unlearn": "unlearning",
    "evaluate": "evaluation",
    "estimate": "cost",
}
__all__ = [
    "ArtefactError",
    "BackendError",
    "DivergedError",
    "InputError",
    "MipfastError",
    "ModelError",
    "__version__",
    "attacks",
    "baselines",
    "ops",
    *_HOMES,
]


def __getattr__(name: str) -> Any:
    if name in ("attacks", "baselines", "ops"):
        return import_module(f"mipfast.{name}")
    if name in _HOMES:
        return getattr(import_module(f"mipfast.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mipfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
