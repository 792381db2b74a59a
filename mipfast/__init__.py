"""mipfast: find the neurons that carry a piece of knowledge in a multimodal model, and make it forget."""

from importlib import import_module

from mipfast._version import __version__

__all__ = ["__version__", "ops"]


def __getattr__(name: str):
    if name == "ops":
        return import_module("mipfast.ops")
    raise AttributeError(f"module 'mipfast' has no attribute {name!r}")
