"""Switch neurons off: zero the columns that read them, or their activations. Every prune can be undone, bit for bit."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

from mipfast.errors import ArtefactError, InputError, check_value
from mipfast.model.sites import Sites, find_sites, neurons_valid

log = logging.getLogger("mipfast")

Neurons = Mapping[tuple[str, int], torch.Tensor]
Mode = Literal["weights", "activations"]
_active: WeakKeyDictionary[nn.Module, list[Pruned]] = WeakKeyDictionary()


class Slice:
    """Some rows (dim 0) or columns (dim 1) of a parameter: the part of it that belongs to chosen neurons."""

    def __init__(self, parameter: torch.Tensor, dim: int, index: torch.Tensor):
        self.parameter, self.dim, self.index = parameter, dim, index.to(parameter.device)

    def read(self, tensor: torch.Tensor | None = None) -> torch.Tensor:
        """A copy of the slice of the parameter, or of a tensor of its shape."""
        return (self.parameter.detach() if tensor is None else tensor).index_select(self.dim, self.index)

    def write(self, values: torch.Tensor) -> None:
        with torch.no_grad():
            self.parameter.index_copy_(self.dim, self.index, values.to(self.parameter.dtype))


def neuron_slices(sites: Sites, stack: str, layer: int, index: torch.Tensor) -> tuple[list[Slice], list[Slice]]:
    """(slices of the parameters that write some neurons of a block, slices of those that read them): for nn.Linear rows
    of the input projections and columns of the output projection."""
    place = sites[stack]
    rows, columns = ([Slice(p, dim, index) for p, dim in part] for part in (place.rows(layer), place.columns(layer)))
    return rows, columns


class Pruned:
    """A prune in force, as `prune` returns it; a context manager that undoes it on the way out.

    mode and neurons are what `prune` was given. Prunes of one model are undone newest first. suspended() is the
    unedited model for a while.
    """

    def __init__(self, model: nn.Module, mode: str, slices: list[Slice], hooks: list[Any], neurons: Neurons):
        self.mode, self.neurons, self.off = mode, neurons, False
        self._model = weakref.ref(model)  # the registry's key: held strongly it would never be freed
        self._slices, self._hooks = slices, hooks
        self._originals = [s.read() for s in slices]
        _active.setdefault(model, []).append(self)

    def undo(self) -> None:
        """Put the original bits back, and discard whatever training did to the pruned neurons.

        Raises:
            InputError: if undone or committed already, or while a newer prune of the model is in force.
        """
        self._retire()
        for s, original in zip(self._slices, self._originals, strict=True):
            s.write(original)
        for hook in self._hooks:
            hook.remove()

    def commit(self) -> None:
        """Keep the prune for good and let go of the original values.

        Raises:
            InputError: as undo does.
        """
        self._retire()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The model without this prune, until the with block ends."""
        self.off = True
        current = [s.read() for s in self._slices]
        for s, original in zip(self._slices, self._originals, strict=True):
            s.write(original)
        try:
            yield
        finally:
            self.off = False
            for s, values in zip(self._slices, current, strict=True):
                s.write(values)

    def _retire(self) -> None:
        model = self._model()
        in_force = _active.get(model, []) if model is not None else []
        if self not in in_force:
            raise InputError("this prune was undone or committed already; prune again to get a new handle")
        if in_force[-1] is not self:
            raise InputError("a newer prune of this model is in force; undo the newest first")
        in_force.pop()

    def __enter__(self) -> Pruned:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def active_prunes(model: nn.Module) -> list[Pruned]:
    """Prunes of this model that are in force, oldest first."""
    return list(_active.get(model, []))


def check_neurons(model: nn.Module, neurons: Neurons) -> Sites:
    """The model's sites. Raises ArtefactError where the neurons cannot be this model's; warns where its weights
    changed."""
    if not isinstance(neurons, Mapping):
        raise InputError(f"the path is a {type(neurons).__name__}; expected a NeuronPath (model, path, forget, retain)")
    for key, indices in neurons.items():
        if not (isinstance(key, tuple) and len(key) == 2 and isinstance(indices, torch.Tensor)):
            raise InputError(
                f"the path has {key!r}: a {type(indices).__name__}; expected (stack, layer): a tensor of indices"
            )
    sites = find_sites(model)
    fingerprint = getattr(neurons, "fingerprint", None)
    # a prune in force changes the weights: what they were before it is not asked
    if fingerprint and fingerprint["stacks"] and not sites.check(fingerprint, weights=not active_prunes(model)):
        log.warning(
            "this path was located on other weights of the same architecture; its neurons may mean nothing here"
        )
    for (stack, layer), indices in neurons.items():
        if not 0 <= layer < sites[stack].num_layers or not neurons_valid(indices, sites[stack]):
            raise ArtefactError(
                f"the path names neurons of {stack} layer {layer} that do not exist: the stack has "
                f"{sites[stack].num_layers} layers of {sites[stack].num_neurons}; locate on this model again"
            )
    return sites


def prune(
    model: nn.Module,
    path: Neurons,
    mode: Mode = "weights",
    positions: Literal["all"] | list[int] = "all",
) -> Pruned:
    """Silence the path's neurons, in place.

    Args:
        model: a transformers model.
        path: {(stack, layer): indices [k]}, such as a `NeuronPath`.
        mode: weights: zero their columns of the output projection (input rows stay, so both can be trained again).
            activations: a hook zeroes them; nothing behind such a hook gets a gradient.
        positions: of mode "activations": "all", or indices into the S of [n,S,F].

    Returns:
        A handle: undo() gives the model back, bit for bit; commit() keeps the prune for good. It is a context manager.

    Raises:
        ArtefactError: for another model's path.
        InputError: for an unknown mode or a position that cannot be used.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from mipfast import prune
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> down = model.model.layers[0].mlp.down_proj.weight
        >>> with prune(model, {("model.layers", 0): torch.tensor([3, 7])}):
        ...     print((down == 0).all(0).nonzero().flatten().tolist())
        [3, 7]
        >>> bool((down == 0).any())
        False
    """
    sites = check_neurons(model, path)
    check_value("mode", mode, Mode)
    if mode == "weights":
        if positions != "all":
            raise InputError("mode='weights' acts on all positions; use mode='activations' for some of them")
        parts = [neuron_slices(sites, stack, layer, indices) for (stack, layer), indices in path.items()]
        handle = Pruned(model, mode, [s for rows, columns in parts for s in (*rows, *columns)], [], path)
        for _, columns in parts:
            for s in columns:
                s.write(torch.zeros_like(s.read()))
        return handle
    handle = Pruned(model, mode, [], [], path)
    for (stack, layer), indices in path.items():
        hook = _zeroing(handle, indices, positions)
        handle._hooks.append(sites[stack].outputs[layer].register_forward_pre_hook(hook))
    return handle


def _zeroing(handle: Pruned, indices: torch.Tensor, positions: Literal["all"] | list[int]) -> Any:
    def zero(module: nn.Module, args: tuple) -> tuple:
        if handle.off:
            return args
        x = args[0].clone()
        if positions == "all":
            x[..., indices.to(x.device)] = 0
        elif x.ndim == 3:
            x[:, torch.as_tensor(positions, device=x.device)[:, None], indices.to(x.device)] = 0
        else:
            raise InputError(f"activations of shape {tuple(x.shape)} have no position dimension; use positions='all'")
        return (x, *args[1:])

    return zero
