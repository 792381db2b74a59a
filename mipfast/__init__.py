"""mipfast: find the neurons that carry a piece of knowledge in a multimodal model, and make it forget it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mipfast._version import __version__
from mipfast.errors import ArtefactError, BackendError, DivergedError, InputError, MipfastError, ModelError

if TYPE_CHECKING:
    from mipfast import attacks, baselines, ops
    from mipfast.edit.config import MIPConfig, RMisUConfig
    from mipfast.edit.fit_path import fit_path
    from mipfast.edit.hidden import hidden_states
    from mipfast.edit.misdirect import misdirect, rmisu_loss
    from mipfast.edit.neuron_path import NeuronPath
    from mipfast.edit.prune import prune
    from mipfast.edit.steering import learned_direction, steering_target
    from mipfast.edit.unlearn import unlearn
    from mipfast.integrations.trainer import RMisUTrainer
    from mipfast.judge.accuracy import evaluate
    from mipfast.model.sites import find_sites
    from mipfast.scoring.attribution import Attribution
    from mipfast.scoring.config import LocateConfig
    from mipfast.scoring.cost import estimate
    from mipfast.scoring.search import locate

# Loaded when first asked for, so that `import mipfast` costs nothing but torch-free modules.
_ROOMS = {
    "edit.config": ("MIPConfig", "RMisUConfig"),
    "edit.fit_path": ("fit_path",),
    "edit.hidden": ("hidden_states",),
    "edit.misdirect": ("misdirect", "rmisu_loss"),
    "edit.neuron_path": ("NeuronPath",),
    "edit.prune": ("prune",),
    "edit.steering": ("learned_direction", "steering_target"),
    "edit.unlearn": ("unlearn",),
    "integrations.trainer": ("RMisUTrainer",),
    "judge.accuracy": ("evaluate",),
    "model.sites": ("find_sites",),
    "scoring.attribution": ("Attribution",),
    "scoring.config": ("LocateConfig",),
    "scoring.cost": ("estimate",),
    "scoring.search": ("locate",),
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names}
_MODULES = ("attacks", "baselines", "cost", "data", "evaluation", "metrics", "ops", "samples", "streaming")
__all__ = [
    "ArtefactError", "Attribution", "BackendError", "DivergedError", "InputError", "LocateConfig", "MIPConfig",
    "MipfastError", "ModelError", "NeuronPath", "RMisUConfig", "RMisUTrainer", "__version__", "attacks", "baselines",
    "estimate", "evaluate", "find_sites", "fit_path", "hidden_states", "learned_direction", "locate", "misdirect",
    "ops", "prune", "rmisu_loss", "steering_target", "unlearn",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"mipfast.{_HOMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"mipfast.{name}")
    raise AttributeError(f"module 'mipfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
