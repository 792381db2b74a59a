"""Switch neurons off: zero the columns that read them, or their activations. Every prune can be undone, bit for bit."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

from mipfast.errors import ArtefactError, InputError, ModelError, check_value
from mipfast.model import families
from mipfast.model.patching import compiled, frozen_eval, unwrapped
from mipfast.model.sites import Sites, Stack, find_sites, neurons_valid
from mipfast.model.weights import check_projections

log = logging.getLogger("mipfast")

Neurons = Mapping[tuple[str, int], torch.Tensor]
Mode = Literal["weights", "activations"]
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
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
        torch.clear_autocast_cache()  # inside the caller's autocast, casts of the old values


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
        self._merged = [(m, [*getattr(m, families.MERGED)]) for m in model.modules() if hasattr(m, families.MERGED)]
        _active.setdefault(model, []).append(self)

    def undo(self) -> None:
        """Put the original bits back, and discard whatever training did to the pruned neurons.

        Raises:
            InputError: if undone or committed already, while a newer prune of the model is in force, or where adapters
                were merged or unmerged meanwhile: the original values would not give the model back.
        """
        in_force = self._newest()
        self._restore()
        in_force.pop()
        for hook in self._hooks:
            hook.remove()

    def commit(self) -> None:
        """Keep the prune for good and let go of the original values.

        Raises:
            InputError: as undo does.
        """
        self._newest().pop()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The model without this prune, until the with block ends. Raises InputError as undo does."""
        current = [s.read() for s in self._slices]
        self._restore()
        self.off = True
        try:
            yield
        finally:
            self.off = False
            for s, values in zip(self._slices, current, strict=True):
                s.write(values)

    def _restore(self) -> None:
        if any(getattr(module, families.MERGED) != before for module, before in self._merged):
            raise InputError(
                "adapters were merged or unmerged since this prune: its original values do not fit any more. Bring "
                "them back to what they were, or commit() the prune"
            )
        for s, original in zip(self._slices, self._originals, strict=True):
            s.write(original)

    def _newest(self) -> list[Pruned]:
        """The model's prunes in force, of which this one is the newest."""
        model = self._model()
        in_force = _active.get(model, []) if model is not None else []
        if self not in in_force:
            raise InputError("this prune was undone or committed already; prune again to get a new handle")
        if in_force[-1] is not self:
            raise InputError("a newer prune of this model is in force; undo the newest first")
        return in_force

    def __enter__(self) -> Pruned:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def active_prunes(model: nn.Module) -> list[Pruned]:
    """Prunes of this model that are in force, oldest first."""
    return list(_active.get(unwrapped(model), []))


def check_neurons(model: nn.Module, path: Neurons, written: bool) -> tuple[Sites, dict[tuple[str, int], torch.Tensor]]:
    """(the model's sites, the path with indices in int64).

    written: whether the edit writes to the path's weights. Raises ArtefactError where the neurons cannot be this
    model's, InputError for what is no path, ModelError for weights that an edit would not reach; warns where weights
    changed."""
    if not isinstance(path, Mapping):
        raise InputError(f"the path is a {type(path).__name__}; expected a NeuronPath (model, path, forget, retain)")
    neurons = {}
    for key, indices in path.items():
        tensor = isinstance(indices, torch.Tensor)
        placed = isinstance(key, tuple) and len(key) == 2
        if not (placed and tensor and indices.dtype in INTEGERS and indices.ndim == 1):
            found = type(indices).__name__ + (f" of {indices.dtype} {list(indices.shape)}" if tensor else "")
            raise InputError(
                f"the path has {key!r}: a {found}; expected (stack, layer): a tensor of indices [k], integers"
            )
        neurons[key] = indices.long()
    sites = find_sites(model)
    fingerprint = getattr(path, "fingerprint", None)
    # a prune in force changes the weights: what they were before it is not asked
    if fingerprint and fingerprint["stacks"] and not sites.check(fingerprint, weights=not active_prunes(model)):
        log.warning(
            "this path was located on other weights of the same architecture; its neurons may mean nothing here"
        )
    for (stack, layer), indices in neurons.items():
        place, unique = sites[stack], indices.unique()
        if layer not in range(place.num_layers) or not neurons_valid(unique, place) or len(unique) < len(indices):
            raise ArtefactError(
                f"the path names neurons of {stack} layer {layer} that do not exist, or twice: the stack has "
                f"{place.num_layers} layers of {place.num_neurons}; locate on this model again"
            )
    if written:
        places = [(sites[stack], layer) for stack, layer in neurons]
        check_projections(unwrapped(model), [p for stack, i in places for p in (*stack.inputs[i], stack.outputs[i])])
    return sites, neurons


def check_prunable(model: nn.Module, stacks: Iterable[Stack]) -> None:
    """Raises ModelError where a prune by weights would be refused: prunes a neuron of every layer and gives it back."""
    first = torch.tensor([0])
    prune(model, {(stack.name, layer): first for stack in stacks for layer in range(stack.num_layers)}).undo()


def prune(
    model: nn.Module,
    path: Neurons,
    mode: Mode = "weights",
    positions: Literal["all"] | list[int] = "all",
) -> Pruned:
    """Silence the path's neurons, in place: all of them, or after an error none.

    By weights, every projection is then asked what it makes of fixed activations: what it made of them before with the
    path's set to zero, or the prune is taken back.

    Args:
        model: a transformers model; inside PEFT's, torch.compile's or DistributedDataParallel's wrapper it is found.
        path: {(stack, layer): indices [k]}, such as a `NeuronPath`.
        mode: weights: zero their columns of the output projection (input rows stay, so both can be trained again).
            activations: a hook zeroes them; nothing behind such a hook gets a gradient. `save_pretrained` saves no
            hooks: what it writes is the model without this prune, and a warning says so.
        positions: of mode "activations": "all", or indices into the S of [n,S,F].

    Returns:
        A handle: undo() gives the model back, bit for bit; commit() keeps the prune for good. It is a context manager.

    Raises:
        ArtefactError: for another model's path.
        InputError: for an unknown mode, a position that cannot be used, indices that are no integers or repeat.
        ModelError: by weights, where zeros would not reach what the model computes with, or would change more than the
            path: weights that are offloaded, sharded, quantised or made anew in every forward pass, and DoRA. By
            activations, for a model that torch.compile took, which would not see the hooks.

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
    if isinstance(path, Mapping) and not path:
        raise InputError("the path names no neuron; expected at least one")
    check_value("mode", mode, Mode)
    if mode == "weights" and positions != "all":
        raise InputError("mode='weights' acts on all positions; use mode='activations' for some of them")
    if mode == "activations" and compiled(model):
        raise ModelError("torch.compile'd models do not see new hooks; prune with mode='weights', or before compiling")
    sites, neurons = check_neurons(model, path, written=mode == "weights")
    model = unwrapped(model)
    parts = {key: neuron_slices(sites, *key, indices) for key, indices in neurons.items()} if mode == "weights" else {}
    handle = Pruned(model, mode, [s for rows, columns in parts.values() for s in (*rows, *columns)], [], neurons)
    try:
        for (stack, layer), indices in neurons.items():
            if mode == "weights":
                _zero(sites[stack], layer, parts[stack, layer][1])
            else:
                hook = _zeroing(handle, indices, positions)
                handle._hooks.append(sites[stack].outputs[layer].register_forward_pre_hook(hook))
        if mode == "activations":
            handle._hooks.append(model.register_state_dict_pre_hook(partial(_warn_unsaved, handle)))
    except BaseException:
        handle.undo()
        raise
    return handle


def _zero(stack: Stack, layer: int, columns: list[Slice]) -> None:
    """Zero the columns. Raises ModelError where the projection then does not compute what it did without neurons."""
    projection, weight = stack.outputs[layer], columns[0].parameter
    probe = torch.linspace(1, 2, stack.num_neurons, dtype=weight.dtype, device=weight.device)[None]
    without = probe.index_fill(1, columns[0].index, 0)
    with frozen_eval(projection), torch.no_grad():
        wanted = projection.forward(without)
        for s in columns:
            s.write(torch.zeros_like(s.read()))
        found = projection.forward(probe)
    finite = wanted.isfinite()
    if not torch.equal(found[finite], wanted[finite]):  # the same products in the same order: equal to the bit
        raise ModelError(
            f"{stack.name} layer {layer}: with its neurons' columns zeroed the {type(projection).__name__} does not "
            "compute what it did without them. Nothing was pruned; merge what is on it, or use mode='activations'"
        )


def _warn_unsaved(handle: Pruned, *_: Any) -> None:
    if not handle.off:
        log.warning(
            "hooks are not saved: the state dict of this model, which save_pretrained writes, is without its prune by "
            "mode='activations'. Prune again after loading, or with mode='weights'"
        )


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
