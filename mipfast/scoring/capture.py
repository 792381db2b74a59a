"""One clean forward pass: the activations at the chosen positions, and all that is needed to replay the model
natively."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from mipfast.errors import DivergedError, InputError
from mipfast.model import families
from mipfast.model.batch import Batch, Labels, image_token, read_batch, without_labels
from mipfast.model.head import base_model, label_states
from mipfast.model.positions import Positions, Rows, text_rows, vision_rows
from mipfast.model.sites import Sites, Stack, find_decoder
from mipfast.scoring.prefix_attention import Prefix, Recording, UnsupportedAttention, recording

log = logging.getLogger("mipfast")
NATIVE = "native"  # in `checked`: faster ways than whole sequences were found wrong on this model


@dataclass(frozen=True, eq=False)
class Capture:
    """entry: the module a replay calls again, with kwargs it got in the clean run: the decoder for a text stack, the
    base model for a vision stack. last_block, last_ffn: the decoder's, where only label positions matter. starts,
    width: all that an intervention can change and a label can see of sample i are the decoder's tokens starts[i] to
    starts[i] + width. tokens: rows of the stack's flattened token dimension; token_sample [tokens] their sample.
    activations[l]: clean down-projection inputs [R,F] at rows, measured from baseline[l] [R,F] where there is one: what
    alpha scales. outputs[l]: clean block outputs [R,H] there. base_output: what the head's wrapper got from the base
    model. extra_outputs: what blocks return besides their state in transformers 4, None where they return no tuple.
    logits [n,q,V]: the clean run's, at the label positions. checked: what `plan` has found out about the model.
    recording: of the decoder's attention, where it can be; prefix: set in a capture that `suffix` has cut down to these
    tokens."""

    model: nn.Module
    stack: Stack
    batch: Batch
    entry: nn.Module
    decoder: nn.Module
    last_block: nn.Module
    last_ffn: nn.Module
    starts: tuple[int, ...]
    width: int
    kwargs: dict[str, Any]
    labels: Labels
    rows: Rows
    token_sample: torch.Tensor
    activations: Sequence[torch.Tensor]
    outputs: list[torch.Tensor]
    logits: torch.Tensor
    recording: Recording | None
    base_output: Any
    extra_outputs: tuple | None
    checked: set[str]
    prefix: Prefix | None = None
    baseline: Sequence[torch.Tensor] | None = None

    @property
    def tokens(self) -> int:
        return len(self.token_sample)

    @property
    def num_samples(self) -> int:
        return self.labels.num_samples

    @cached_property
    def every_row(self) -> bool:
        """Whether the chosen rows are all tokens, in their order."""
        index = self.rows.index
        return len(index) == self.tokens and bool((index.diff() == 1).all())

    @cached_property
    def divisible(self) -> bool:
        """Whether every sample has its own place in all arguments and as many tokens, so that `of` can take it."""
        n, places = self.num_samples, list[bool]()

        def look(name: str, value: torch.Tensor, dim: int) -> torch.Tensor:
            places.append(value.shape[dim] == n or serves_all(name, value, dim, n))
            return value

        by_sample("", self.kwargs, look)
        own = torch.arange(n, device=self.token_sample.device).repeat_interleave(self.tokens // n)
        return self.token_sample.equal(own) and all(places)

    def of(self, samples: torch.Tensor) -> Capture:
        """The capture of a batch of these samples [s], which may repeat; of logits and outputs it keeps this one's."""
        tokens, starts = self.tokens // self.num_samples, torch.arange(len(samples), device=samples.device)
        rows = self.rows_of(samples)
        slot = starts.repeat_interleave(self._row_counts[samples])
        index = self.rows.index[rows] + (slot - self.rows.sample[rows]) * tokens
        labels = (part[samples.to(part.device)] for part in (self.labels.index, self.labels.target, self.labels.mask))

        def taken(name: str, value: torch.Tensor, dim: int) -> torch.Tensor:
            same = serves_all(name, value, dim, self.num_samples)
            return value if same else value.index_select(dim, samples.to(value.device))

        return replace(
            self,
            kwargs=by_sample("", self.kwargs, taken),
            labels=Labels(*labels),
            rows=Rows(slot, index),
            token_sample=starts.repeat_interleave(tokens),
            activations=OfRows(self.activations, rows),
            prefix=self.prefix and replace(self.prefix, samples=samples if self.num_samples > 1 else None),
            baseline=None if self.baseline is None else OfRows(self.baseline, rows),
        )

    def rows_of(self, samples: torch.Tensor) -> torch.Tensor:
        """The chosen rows of these samples [s], one sample after the other."""
        counts = self._row_counts
        ends, mine = counts.cumsum(0), counts[samples]
        first = (ends - counts)[samples] - (mine.cumsum(0) - mine)
        return first.repeat_interleave(mine) + torch.arange(int(mine.sum()), device=samples.device)

    @cached_property
    def _row_counts(self) -> torch.Tensor:
        return torch.bincount(self.rows.sample, minlength=self.num_samples)


class OfRows(Sequence[torch.Tensor]):
    """Some rows of every layer's tensor, taken when they are asked for: many samples' at once would be large."""

    def __init__(self, layers: Sequence[torch.Tensor], rows: torch.Tensor):
        self._layers, self._rows = layers, rows

    def __getitem__(self, layer: Any) -> Any:
        return self._layers[layer][self._rows]

    def __len__(self) -> int:
        return len(self._layers)


def by_sample(name: str, value: Any, change: Callable[[str, torch.Tensor, int], torch.Tensor]) -> Any:
    """A decoder's argument with change(name, tensor, its batch dimension) in the place of every tensor that has one."""
    if isinstance(value, dict):
        return {key: by_sample(key, item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(by_sample(name, item, change) for item in value)
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or name in families.NO_BATCH_DIM:
        return value
    return change(name, value, families.BATCH_DIM.get(name, 0))


def serves_all(name: str, value: torch.Tensor, dim: int, n: int) -> bool:
    """Whether a decoder's argument is the same for all of n samples, and has one place for them."""
    return name in families.ONE_FOR_ALL and value.shape[dim] == 1 and n > 1


def capture(
    model: Any, sites: Sites, stack: Stack, batch: Batch, positions: Positions, checked: set[str] | None = None
) -> Capture:
    """Run the model once without gradient, recording the decoder's attention where that is possible. checked: what
    `plan` knows from other batches of the call. Raises InputError for an unusable batch, DivergedError for non-finite
    activations."""
    checked = set() if checked is None else checked
    try:
        return _capture(model, sites, stack, batch, positions, checked, record=NATIVE not in checked)
    except UnsupportedAttention as error:
        log.info("%s: attention cannot be recorded (%s); replaying whole sequences", type(model).__name__, error)
        return _capture(model, sites, stack, batch, positions, checked, record=False)


def with_baseline(captured: Capture, sites: Sites, batches: Iterable[Batch], positions: Positions) -> Capture:
    """The capture with its activations measured from the mean over batches of theirs, the p-th chosen row of a sample
    from the p-th; one clean run each. Raises InputError for a batch of another shape or with other rows per sample."""
    means: list[torch.Tensor] = []
    shape, rows = captured.batch["labels"].shape, captured.rows.sample
    for i, batch in enumerate(batches):
        try:
            other = capture(captured.model, sites, captured.stack, batch, positions)
        except InputError as error:
            raise InputError(f"counterfactual batch {i}: {error}") from error
        if batch["labels"].shape != shape or not torch.equal(other.rows.sample, rows):
            found, wanted = (torch.bincount(sample).tolist() for sample in (other.rows.sample, rows))
            raise InputError(
                f"counterfactual batch {i} has labels {list(batch['labels'].shape)} and {found} chosen positions per "
                f"sample, the batch {list(shape)} and {wanted}; give prompts of as many tokens and pictures of the "
                "same size, or leave counterfactuals out for the zero baseline"
            )
        wide = [a.to(torch.promote_types(a.dtype, torch.float32)) for a in other.activations]
        means = [m + (a - m) / (i + 1) for m, a in zip(means, wide, strict=True)] if means else wide
    baseline = [m.to(a) for m, a in zip(means, captured.activations, strict=True)]
    away = [a - b for a, b in zip(captured.activations, baseline, strict=True)]
    return replace(captured, activations=away, baseline=baseline)


def _capture(
    model: Any, sites: Sites, stack: Stack, batch: Batch, positions: Positions, checked: set[str], record: bool
) -> Capture:
    batch, labels = read_batch(model, batch)
    vision, decoder = stack is not sites.text, find_decoder(model)
    entry = base_model(model) if vision else decoder
    seen: dict[str, Any] = {}
    activations: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def keep_kwargs(module: nn.Module, args: tuple, kwargs: dict) -> None:
        signature = inspect.signature(type(module).forward)
        bound = dict(signature.bind_partial(module, *args, **kwargs).arguments)
        bound.pop("self")
        for name, parameter in signature.parameters.items():
            if parameter.kind == inspect.Parameter.VAR_KEYWORD:
                bound |= bound.pop(name, {})
        seen["kwargs"] = bound

    def keep_activations(module: nn.Module, args: tuple) -> None:
        flat = args[0].detach().reshape(-1, args[0].shape[-1])
        if "rows" not in seen:
            seen["rows"], seen["token_sample"] = chosen_rows(model, sites, stack, batch, positions, labels, flat)
        activations.append(flat[seen["rows"].index])

    def keep_base_output(module: nn.Module, args: tuple, output: Any) -> None:
        seen["base_output"] = output

    def keep_outputs(module: nn.Module, args: tuple, output: Any) -> None:
        state, seen["extra_outputs"] = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        outputs.append(state.detach().reshape(-1, state.shape[-1])[seen["rows"].index])

    with ExitStack() as hooks:
        seen["recording"] = hooks.enter_context(recording(decoder)) if record else None
        hooks.enter_context(base_model(model).register_forward_hook(keep_base_output))
        hooks.enter_context(entry.register_forward_pre_hook(keep_kwargs, with_kwargs=True))
        for output in stack.outputs:
            hooks.enter_context(output.register_forward_pre_hook(keep_activations))
        for block in stack.blocks:
            hooks.enter_context(block.register_forward_hook(keep_outputs))
        hooks.enter_context(label_states(model, labels))
        with torch.no_grad():
            logits = model(**without_labels(batch), use_cache=False).logits
    if len(activations) != stack.num_layers:
        hint = (
            "the batch has no images (pixel_values)"
            if vision
            else "some blocks did not run (do any attend to pictures?)"
        )
        raise InputError(f"{len(activations)} of {stack.num_layers} blocks of {stack.name} ran once: {hint}")
    # a sum is not finite if a summand is not, so that one look tells of all layers; it may be so of large summands too
    wide = torch.promote_types(activations[0].dtype, torch.float32)
    sums = [act.sum(dtype=wide) for act in activations]
    for layer, act in enumerate([] if bool(torch.stack(sums).isfinite().all()) else activations):
        if not bool(act.isfinite().all()):
            bad = sorted(set(seen["rows"].sample[~act.isfinite().all(1)].tolist()))
            raise DivergedError(
                f"activations of {stack.name} layer {layer} are not finite in samples {bad}; "
                "check the model's weights and dtype (float16 overflows where bfloat16 does not)"
            )
    if vision:
        first, last = _first_image(model, batch), int(labels.index.where(labels.mask, 0).max())
        starts, width = (first,) * labels.num_samples, last + 1 - first
    else:
        starts, width = _windows(seen["rows"], labels, batch["labels"].shape[1])
    return Capture(
        model=model,
        stack=stack,
        batch=batch,
        entry=entry,
        decoder=decoder,
        last_block=sites.text.blocks[-1],
        last_ffn=sites.text.ffns[-1],
        starts=starts,
        width=width,
        labels=labels,
        activations=activations,
        outputs=outputs,
        logits=logits,
        checked=checked,
        **seen,
    )


def chosen_rows(
    model: Any, sites: Sites, stack: Stack, batch: Batch, positions: Positions, labels: Labels, flat: torch.Tensor
) -> tuple[Rows, torch.Tensor]:
    """(the chosen rows of a stack's flat [tokens,F], the sample [tokens] of every token)."""
    vision = stack is not sites.text
    counts = _tokens_per_sample(model, batch, labels.num_samples, len(flat), vision)
    rows = vision_rows(counts, positions) if vision else text_rows(batch, positions, labels)
    token_sample = torch.arange(len(counts), device=flat.device).repeat_interleave(counts)
    return Rows(rows.sample.to(flat.device), rows.index.to(flat.device)), token_sample


def _windows(rows: Rows, labels: Labels, length: int) -> tuple[tuple[int, ...], int]:
    """(the first token of every sample's window, their width): from the first chosen row or label to the last."""
    labelled = labels.index.to(rows.index.device)
    chosen = torch.where(labels.mask.to(labelled.device), labelled, labelled[:, :1])
    position = rows.index - rows.sample * length
    first = chosen.amin(1).scatter_reduce(0, rows.sample, position, "amin")
    last = chosen.amax(1).scatter_reduce(0, rows.sample, position, "amax")
    starts, stops = torch.stack([first, last + 1]).tolist()
    width = max(stop - start for start, stop in zip(starts, stops, strict=True))
    return tuple(min(start, length - width) for start in starts), width


def _first_image(model: Any, batch: Batch) -> int:
    """The first position at which any sample has a picture; 0 where the batch does not say."""
    token, ids = image_token(model.config), batch.get("input_ids")
    if ids is None or token is None:
        return 0
    return int((ids == token).int().argmax(1).min())


def _tokens_per_sample(model: Any, batch: Batch, n: int, tokens: int, vision: bool) -> torch.Tensor:
    """[n] int64. A vision tower's tokens are shared out in proportion to the samples' crops, or image placeholders."""
    if not vision:
        return torch.full((n,), tokens // n, device=batch["labels"].device)
    shares = _image_shares(model.config, batch)
    counts = shares * tokens // max(1, int(shares.sum()))
    if len(shares) != n or int(counts.sum()) != tokens or bool((counts == 0).any()):
        raise InputError(
            f"{tokens} vision tokens do not divide over {shares.tolist()} image placeholders or crops of {n} samples; "
            "IFI needs at least one image in every sample, and exactly one where image_sizes are given"
        )
    return counts


def _image_shares(config: Any, batch: Batch) -> torch.Tensor:
    """Numbers in proportion to each sample's tokens in the vision tower."""
    ids = batch.get("input_ids")
    token = image_token(config)
    if families.PICTURE_SIZES in batch and hasattr(config, families.CROP_SIZES):
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        side, sizes = config.vision_config.image_size, batch[families.PICTURE_SIZES].tolist()
        crops = [image_size_to_num_patches(size, getattr(config, families.CROP_SIZES), side) for size in sizes]
        return torch.tensor(crops, device=batch["labels"].device)
    if ids is None or token is None or families.PADDED_TILES in batch:
        return torch.ones(len(batch["labels"]), dtype=torch.int64, device=batch["labels"].device)
    return (ids == token).sum(1)
