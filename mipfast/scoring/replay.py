"""Run m scaled copies of a batch through the blocks from l on.

The model's own code runs: `entry` is called again with its clean arguments tiled m times, and blocks before l return
what they returned when the path was advanced over them. Copies are step-major (row k·n + i), so tiling needs no
knowledge of a family: repeating whatever is concatenated over samples is always right.

Two ways past a block. Natively, its FFN's inner activations are overwritten by a hook. Where the block adds its FFN's
output to what else it does, it is enough to run it once with the neurons at their baseline (zero, where the capture has
none) and to add the rest of their contribution to its output: then the block is never differentiated, and the path
advances for free. `plan` tries which of them is exact.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mipfast.model import families
from mipfast.model.batch import without_labels
from mipfast.model.head import base_model, label_states, with_states
from mipfast.model.patching import replaced_forward
from mipfast.scoring.capture import Capture, by_sample, serves_all
from mipfast.scoring.prefix_attention import attending, window

_forward_mode_lock = threading.Lock()


class Replay:
    """m copies of the captured batch, with the states of the blocks the path has advanced over.

    baseline_outputs[l] is block l's output with its neurons at their baseline, where `plan` went over it; tangents[l]
    is d state[l] / d alpha along the path, for the completeness residual; None where not carried. sizes[l]: of the
    tensors that block l was called with."""

    def __init__(self, capture: Capture, copies: int):
        self.capture, self.copies = capture, copies
        offsets = torch.arange(copies, device=capture.rows.index.device) * capture.tokens
        self._index = (offsets[:, None] + capture.rows.index).flatten()

        def tiled(name: str, value: torch.Tensor, dim: int) -> torch.Tensor:
            times = [1] * value.ndim
            times[dim] = copies
            return value if serves_all(name, value, dim, capture.num_samples) else value.repeat(times)

        self._kwargs = by_sample("", capture.kwargs, tiled)
        self.states: Any = []  # of tensors
        self.baseline_outputs: list[torch.Tensor] = []
        self.tangents: list[torch.Tensor | None] = []
        self.sizes: dict[int, Any] = {}
        self._nothing: torch.Tensor | None = None
        self._call: tuple[int, tuple, dict, torch.Tensor | None] = (-1, (), {}, None)

    def run(self, values: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [m·n,q,V] at the label positions, the blocks in states skipped, and the next block's neurons
        overwritten by values [m,R,F] (here and below measured from the capture's baseline) where given."""
        layer, stack = len(self.states), self.capture.stack
        with ExitStack() as patches:
            if values is not None:
                patches.enter_context(self._overwritten(layer, values))
            return self._run(at_labels=values is None or stack.blocks[layer] is not self.capture.last_block)

    def measure_calls(self) -> None:
        """Fill `sizes` by a run of the model whose blocks do nothing; this copy stays where it stands."""
        probe = Replay(self.capture, self.copies)

        def past(layer: int) -> bool:
            probe.push(probe._call[1][0], None)
            return True

        probe.walk(self.capture.stack.num_layers, past)
        self.sizes = probe.sizes

    def clean_gradients(
        self, objective: Callable[[torch.Tensor], torch.Tensor], layers: range
    ) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
        """d objective(logits) / d output of these blocks, in one unscaled pass over one copy; and of each but the
        stack's last the part that does not run through the next block: what else taps it (deepstack,
        vision_feature_layer)."""
        outputs: list[torch.Tensor] = []
        entered: list[torch.Tensor] = []

        def keep(module: nn.Module, args: tuple, output: Any) -> Any:
            state = output[0] if isinstance(output, tuple) else output
            outputs.append(state if state.requires_grad else state.detach().requires_grad_())
            return (outputs[-1], *output[1:]) if isinstance(output, tuple) else outputs[-1]

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            (hidden, *rest), kwargs = _state_first(args, kwargs)
            # view_as makes a separate autograd node: its gradient is the part that flows through the next block
            entered.append(hidden.view_as(hidden))
            return (entered[-1], *rest), kwargs

        first, *later = self.capture.stack.blocks[layers.start :]
        with ExitStack() as hooks, torch.enable_grad():
            hooks.enter_context(self._last_block_at_labels())
            hooks.enter_context(first.register_forward_hook(keep))
            for block in later:
                hooks.enter_context(block.register_forward_pre_hook(enter, with_kwargs=True))
                hooks.enter_context(block.register_forward_hook(keep))
            value = objective(self._entered())
            del outputs[len(layers) :], entered[len(layers) :]
            if not value.requires_grad:
                return [None] * len(outputs), [None] * len(entered)
            gradients = torch.autograd.grad(value.sum(), [*outputs, *entered], allow_unused=True)
        total: list[torch.Tensor | None] = list(gradients[: len(outputs)])
        pairs = zip(total, gradients[len(outputs) :], strict=False)
        return total, [t if u is None or t is None else None if t.equal(u) else t - u for t, u in pairs]

    def part(self, start: int, stop: int) -> Replay:
        """Copies start..stop of this one, where it stands."""
        part = Replay(self.capture, stop - start)
        for state, tangent in zip(self.states, self.tangents, strict=True):
            rows = slice(len(state) // self.copies * start, len(state) // self.copies * stop)
            part.push(state.detach()[rows], None if tangent is None else tangent[rows])
        return part

    def baseline_output(self, carry: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output of the next block with its neurons at the chosen positions at their baseline, and with carry its
        derivative by alpha."""
        nothing = self._baseline(len(self.states))
        return self._block(nothing, torch.zeros_like(nothing) if carry else None)

    def _baseline(self, layer: int) -> torch.Tensor:
        if self._nothing is None:
            act = self.capture.activations[layer]
            self._nothing = act.new_zeros(self.copies, *act.shape)
        return self._nothing

    def advance(self, values: torch.Tensor, tangent: torch.Tensor | None) -> None:
        """Take the next block into the states, its neurons overwritten by values [m,R,F] whose derivative by alpha is
        tangent [m,R,F]; with tangent None no derivative is carried."""
        self.push(*self._block(values, tangent))

    def push(self, state: torch.Tensor, tangent: torch.Tensor | None) -> None:
        """Take a block's output into the states."""
        self.states.append(_by_copy(state, self.copies))
        self.tangents.append(None if tangent is None else _by_copy(tangent, self.copies))

    def drop(self) -> None:
        """Take the last block's output back out of the states."""
        self.states.pop()
        self.tangents.pop()

    def at_rows(self, state: torch.Tensor) -> torch.Tensor:
        """The chosen rows [m,R,H] of a state."""
        flat = state.reshape(-1, state.shape[-1])
        return (flat if self.capture.every_row else flat[self._index]).view(self.copies, -1, state.shape[-1])

    def add_rows(self, state: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The state, of every copy or of one for all, with values [m,R,H] added at the chosen rows."""
        if self.capture.every_row:
            return (state.reshape(-1, *values.shape[1:]) + values.to(state)).reshape(-1, *state.shape[1:])
        if state.numel() < self.copies * self.capture.tokens * state.shape[-1]:
            state = repeated(state, self.copies)
        flat = state.reshape(-1, state.shape[-1])
        return flat.index_add(0, self._index, values.reshape(-1, state.shape[-1]).to(flat)).view_as(state)

    def per_sample(self, values: torch.Tensor) -> torch.Tensor:
        """Sum values [m·tokens, ...] of one state over a sample's tokens and channels: [m,n]."""
        rows = values.reshape(self.copies, self.capture.tokens, -1).sum(-1)
        out = rows.new_zeros(self.copies, self.capture.num_samples)
        return out.index_add_(1, self.capture.token_sample, rows)

    def _run(self, at_labels: bool) -> torch.Tensor:
        with self._last_block_at_labels() if at_labels else nullcontext():
            return self._entered()

    def _entered(self) -> torch.Tensor:
        """The model from its entry on: blocks in states return them, the next block's arguments are kept."""
        capture, layer = self.capture, len(self.states)
        base, entry = base_model(capture.model), capture.entry
        native = entry.forward if entry is base else None

        def from_entry(*_: Any, **__: Any) -> Any:
            if native:
                return native(**self._kwargs)
            return with_states(capture.base_output, entry(**self._kwargs)[0])

        with ExitStack() as patches:
            if capture.prefix:
                patches.enter_context(attending(capture.decoder, capture.prefix))
                if entry is not capture.decoder:
                    hook = capture.decoder.register_forward_pre_hook(self._cut_call, with_kwargs=True)
                    patches.enter_context(hook)
            patches.enter_context(replaced_forward(base, from_entry))
            for block, state in zip(capture.stack.blocks, self.states, strict=False):

                def known(*args: Any, _state: torch.Tensor = state, **kwargs: Any) -> Any:
                    return self._output(_state, _state_first(args, kwargs)[0][0])

                patches.enter_context(replaced_forward(block, known))
            if layer < capture.stack.num_layers:
                keep = capture.stack.blocks[layer].register_forward_pre_hook(self._keep_call, with_kwargs=True)
                patches.enter_context(keep)
            patches.enter_context(label_states(capture.model, capture.labels))
            return capture.model(**without_labels(capture.batch), use_cache=False).logits

    def walk(self, layers: int, past: Callable[[int], bool]) -> bool:
        """past(layer), which takes the block into the states, for the first blocks in one run of the model, up to one
        that returns False; whether none did. From elsewhere every block is a run of the model up to there."""
        going = True
        with torch.no_grad(), ExitStack() as patches:
            for layer, block in enumerate(self.capture.stack.blocks[:layers]):

                def stop_at(*args: Any, _layer: int = layer, _native: Any = block.forward, **kwargs: Any) -> Any:
                    nonlocal going
                    block = self.capture.stack.blocks[_layer]
                    self._keep_call(block, args, kwargs)
                    with replaced_forward(block, _native):
                        going = past(_layer)
                    if not going or _layer + 1 == layers:
                        raise _Reached
                    return self._output(self.states[-1], _state_first(args, kwargs)[0][0])

                patches.enter_context(replaced_forward(block, stop_at))
            with suppress(_Reached):
                self._entered()
        return going

    def block_output(self, values: torch.Tensor) -> torch.Tensor:
        """Output of the next block, its neurons overwritten by values [m,R,F]."""
        return _by_copy(self._called(self._arguments(), values), self.copies)

    def _block(self, values: torch.Tensor, tangent: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(output, its derivative by alpha) of the next block, without gradient."""
        (hidden, *args), kwargs = self._arguments()
        with torch.no_grad(), ExitStack() as patches:
            if tangent is None:
                return self._called(((hidden, *args), kwargs), values).detach().clone(), None
            patches.enter_context(_forward_mode())
            values = forward_ad.make_dual(values, tangent)
            if self.tangents and self.tangents[-1] is not None:
                hidden = forward_ad.make_dual(hidden, self.tangents[-1].view_as(hidden))
            state, moved = forward_ad.unpack_dual(self._called(((hidden, *args), kwargs), values))
            return state.detach().clone(), torch.zeros_like(state) if moved is None else moved.detach().clone()

    def _arguments(self) -> tuple[tuple, dict]:
        """The next block's, the state in front."""
        if self._call[0] != len(self.states):
            self._reach(self.capture.stack.blocks[len(self.states)])
        _, (hidden, *args), kwargs, came_from = self._call
        if came_from is not None and came_from is not self.states[-1]:
            # This call was recorded with the block before at another alpha. Code between two blocks only adds to the
            # state, so add the difference.
            hidden = self.states[-1] if hidden is came_from else hidden + (self.states[-1] - came_from).view_as(hidden)
        return (hidden.detach(), *args), kwargs

    def _called(self, call: tuple[tuple, dict], values: torch.Tensor) -> torch.Tensor:
        """The next block's state from its arguments, its neurons overwritten."""
        layer, (args, kwargs) = len(self.states), call
        with ExitStack() as patches:
            if self.capture.prefix:
                patches.enter_context(attending(self.capture.decoder, self.capture.prefix))
            patches.enter_context(self._overwritten(layer, values))
            output = self.capture.stack.blocks[layer].forward(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def _cut_call(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args or self.capture.prefix is None:
            raise ValueError("a decoder called with unnamed arguments cannot be cut")
        return (), _cut(kwargs, self.capture.starts, self.capture.width, pictures_follow=True)

    def _reach(self, block: nn.Module) -> None:
        """Run up to a block that no replay has reached yet, for its arguments."""

        def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._keep_call(module, args, kwargs)
            raise _Reached

        with torch.no_grad(), block.register_forward_pre_hook(stop, with_kwargs=True), suppress(_Reached):
            self._entered()

    def _keep_call(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        call = _state_first(args, kwargs)
        self._call = (len(self.states), *call, self.states[-1] if self.states else None)
        self.sizes[len(self.states)] = _sizes(call)

    @contextmanager
    def _last_block_at_labels(self) -> Iterator[None]:
        """What the decoder's last FFN and the projections of its attention's queries and output do elsewhere, no label
        sees: zero is returned there."""
        block, (index, ends, span) = self.capture.last_block, self._label_rows

        def at_labels(hidden: torch.Tensor, *others: Any, native: Any) -> torch.Tensor:
            rows = hidden.reshape(-1, hidden.shape[-1])
            running, rest = divmod(len(rows), span)  # fewer than all where some have yet to leave
            if rest or running >= len(ends) or others:  # Bloom's FFN is also given what it is added to
                return native(hidden, *others)
            at = index[: ends[running]]
            output = native(rows[None, at])[0]
            return output.new_zeros(len(rows), output.shape[-1]).index_copy(0, at, output).view(*hidden.shape[:-1], -1)

        with ExitStack() as patches:
            if len(index) < span * (len(ends) - 1):
                projections = (m for name, m in block.named_modules() if name.rpartition(".")[2] in families.ROW_BY_ROW)
                for module in (self.capture.last_ffn, *projections):
                    patches.enter_context(replaced_forward(module, partial(at_labels, native=module.forward)))
            yield

    @cached_property
    def _label_rows(self) -> tuple[torch.Tensor, list[int], int]:
        """(the labels among the decoder's rows of all copies; how many of them the first 0, 1, ... sequences have; rows
        of a sequence). Kept: nonzero waits for the GPU."""
        capture, labels = self.capture, self.capture.labels
        span = capture.width if capture.prefix else capture.batch["labels"].shape[1]
        sample, i = labels.mask.nonzero(as_tuple=True)
        offsets = torch.arange(self.copies, device=sample.device) * labels.num_samples * span
        index = (offsets[:, None] + sample * span + labels.index[sample, i]).flatten()
        ends = [0, *accumulate(labels.mask.sum(1).tolist() * self.copies)]
        return index, ends, span

    def _output(self, state: torch.Tensor, like: torch.Tensor) -> Any:
        if state.numel() < like.numel():
            state = repeated(state, self.copies)
        state = state if state.shape == like.shape else state.view_as(like)
        if any(name in self._kwargs for name in families.DEEPSTACK):
            state = state.clone()  # transformers 4's deepstack adds to it in place, and would corrupt the kept state
        return state if self.capture.extra_outputs is None else (state, *self.capture.extra_outputs)

    @contextmanager
    def _overwritten(self, layer: int, values: torch.Tensor) -> Iterator[None]:
        if self.capture.baseline is not None:
            values = values + self.capture.baseline[layer]
        flat = values.reshape(-1, values.shape[-1])

        def overwrite(module: nn.Module, args: tuple) -> tuple:
            x = args[0].reshape(-1, args[0].shape[-1])  # out of place: the input is also somebody else's saved tensor
            if self.capture.every_row:
                x = torch.cat([flat, x[len(flat) :]]) if len(x) > len(flat) else flat
            else:
                x = x.index_put((self._index,), flat)
            return (x.view_as(args[0]), *args[1:])

        with self.capture.stack.outputs[layer].register_forward_pre_hook(overwrite):
            yield


def _state_first(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A block's arguments with the state, which some families name, in front."""
    if args:
        return args, kwargs
    name = next(name for name in families.STATE_NAMES if name in kwargs)
    return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}


@contextmanager
def _forward_mode() -> Iterator[None]:
    """torch has one level of it, and one choice of attention kernels, in a process: a thread at a time."""
    with _forward_mode_lock, forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):  # the only one with a derivative
        yield


class _Reached(Exception):
    """Ends a forward pass at a block whose arguments were wanted."""


def repeated(state: torch.Tensor, copies: int) -> torch.Tensor:
    """The states of one copy, repeated."""
    return state.repeat(copies, *[1] * (state.ndim - 1))


def _by_copy(state: torch.Tensor, copies: int) -> torch.Tensor:
    """Copies along dimension 0: Pixtral's towers put all pictures, and so all copies, into one sequence."""
    return state if len(state) % copies == 0 else state.reshape(copies, -1, state.shape[-1])


def _sizes(value: Any) -> Any:
    """The sizes of every tensor in a block's arguments."""
    if isinstance(value, dict):
        return {key: _sizes(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_sizes(item) for item in value]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _cut(kwargs: dict[str, Any], starts: Sequence[int], width: int, pictures_follow: bool = False) -> dict[str, Any]:
    """A decoder's arguments for so many tokens of every sample from its start on; with pictures_follow no picture lies
    before. Raises ValueError for an argument that families.TOKEN_DIM does not know."""
    cut: dict[str, Any] = {}
    some = next(v for k, v in kwargs.items() if k in families.TOKEN_DIM and isinstance(v, torch.Tensor))
    index = window(starts, width, some.device)
    for name, value in kwargs.items():
        if name == "attention_mask":
            cut[name] = None  # the recorded masks stand in
        elif isinstance(value, torch.Tensor) and name in families.TOKEN_DIM:
            cut[name] = _cut_tokens(name, value, starts, index)
        elif isinstance(value, torch.Tensor | list | dict) and not (pictures_follow and name in families.DEEPSTACK):
            raise ValueError(f"how to cut the decoder's {name} is not known")
        else:
            cut[name] = value
    if cut.get("position_ids") is None:
        cut["position_ids"] = index
    return cut


def _cut_tokens(name: str, value: torch.Tensor, starts: Sequence[int], index: torch.Tensor) -> torch.Tensor:
    """A decoder's argument at its tokens index [n or 1,width]."""
    dim, width = families.TOKEN_DIM[name], index.shape[1]
    if len(index) == 1 or name in families.NO_BATCH_DIM:
        return value.narrow(dim, max(starts), width)  # one place for all: a mask that is not used asks for it
    tokens = value.movedim((families.BATCH_DIM.get(name, 0), dim), (0, 1))
    tokens = tokens.expand(len(index), *tokens.shape[1:])
    taken = tokens[torch.arange(len(index), device=index.device)[:, None], index]
    return taken.movedim((0, 1), (families.BATCH_DIM.get(name, 0), dim))
