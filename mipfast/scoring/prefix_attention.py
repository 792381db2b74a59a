"""Attention of many copies of a suffix over one clean prefix.

In a causal decoder an intervention at positions >= start leaves every earlier token untouched. So only the tokens from
start on run again, and all m copies attend to one set of recorded prefix keys and values, never repeated m times. Every
sample has a start of its own, and all run as many tokens from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mipfast.model import families
from mipfast.model.patching import replaced_attention

NAME = "mipfast_prefix"  # in transformers' registry of attention functions
TORCH_FROM = 128  # suffix tokens; on a CPU torch's attention is 0.8x as fast as ours at 64, 1.4x at 256


@dataclass(eq=False)
class Recording:
    """What the decoder's attention modules saw in the clean run: keys, values [n,heads,S,d] after rotation, and the
    mask [n or 1,1,S,S or more], which is added to the scores. masks: by the identity of what the decoder gave, which
    many modules share, that and the mask."""

    seen: dict[nn.Module, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    masks: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def added(self, given: Tensor, dtype: torch.dtype) -> Tensor:
        """A mask, as what is added to scores."""
        if given.dtype != torch.bool:
            return given
        if id(given) not in self.masks:
            # half of the lowest number: with a score it is still finite in float16, and so is a row that sees nothing
            hidden = torch.zeros_like(given, dtype=dtype).masked_fill_(~given, torch.finfo(dtype).min / 2)
            self.masks[id(given)] = given, hidden
        return self.masks[id(given)][1]

    def suffix(self, starts: Sequence[int], width: int) -> Prefix | None:
        """None where some token before its sample's start looks at one from start on: the prefix would not stay
        clean."""
        layers, masks = {}, dict[int, Tensor]()
        longest = max(starts)
        for module, (key, value, mask) in self.seen.items():
            if id(mask) not in masks:
                if mask.shape[-1] < key.shape[2] or _looks_ahead(mask[..., : key.shape[2]], starts):
                    return None
                masks[id(mask)] = _cut_mask(mask, starts, width)
            layers[module] = (key[:, :, :longest], value[:, :, :longest], masks[id(mask)])
        return Prefix(layers)


@dataclass(frozen=True, eq=False)
class Prefix:
    """layers[module]: keys and values [n,heads,P,d] of the P tokens of the longest prefix, mask [n or 1,1,width,P +
    width], which hides those that are not in a sample's own. samples: of every sequence that runs; None for copies of
    the whole batch."""

    layers: dict[nn.Module, tuple[Tensor, Tensor, Tensor]]
    samples: Tensor | None = None

    _places: dict[int, tuple[Tensor, int]] = field(default_factory=dict, init=False)

    def places(self, rows: int) -> tuple[Tensor, int] | None:
        """(of the first `rows` sequences among copies of the whole batch, how many copies hold them)."""
        if self.samples is None:
            return None
        if rows not in self._places:
            samples = self.samples[:rows]
            n, later = len(next(iter(self.layers.values()))[0]), torch.arange(rows, device=samples.device)
            order = samples.argsort(stable=True)
            counts = torch.bincount(samples, minlength=n)
            copy = later - (counts.cumsum(0) - counts)[samples[order]]
            places = torch.empty_like(order).index_copy_(0, order, copy * n + samples[order])
            self._places[rows] = places, int(counts.max())
        return self._places[rows]


def window(starts: Sequence[int], width: int, device: torch.device) -> Tensor:
    """The tokens [n,width] of every sample's window; [1,width] where all start alike."""
    distinct = starts if len(set(starts)) > 1 else starts[:1]
    return torch.tensor(distinct, device=device)[:, None] + torch.arange(width, device=device)


def _looks_ahead(mask: Tensor, starts: Sequence[int]) -> bool:
    """Whether some token before its sample's start looks at one from start on, by a mask [n or 1,1,S,S]."""
    seen, longest = mask[:, 0, : max(starts)] >= torch.finfo(mask.dtype).min / 4, max(starts)
    if len(set(starts)) == 1:
        return bool(seen[..., longest:].any())
    inside = torch.arange(mask.shape[-1], device=mask.device) >= torch.tensor(starts, device=mask.device)[:, None]
    return bool((seen & ~inside[:, :longest, None] & inside[:, None]).any())


def _cut_mask(mask: Tensor, starts: Sequence[int], width: int) -> Tensor:
    """Of a mask [n or 1,1,S,S] the rows of every sample's window, and as columns the longest prefix and the window."""
    longest, index = max(starts), window(starts, width, mask.device)
    if len(index) == 1:
        return mask[:, :, longest : longest + width, : longest + width]
    rows = mask.expand(len(index), *mask.shape[1:])[torch.arange(len(index), device=mask.device)[:, None], 0, index]
    outside = torch.arange(longest, device=mask.device) >= index[:, :1]
    before = rows[..., :longest].masked_fill(outside[:, None], torch.finfo(mask.dtype).min / 2)
    own = rows.gather(2, index[:, None].expand(-1, width, -1))
    return torch.cat([before, own], -1)[:, None]


class UnsupportedAttention(Exception):
    """The decoder's attention takes arguments that `_attend` does not know."""


@contextmanager
def recording(decoder: Any) -> Iterator[Recording | None]:
    """Record keys, values and masks of every attention module; None where the decoder's attention is not
    transformers'."""
    from transformers.masking_utils import sdpa_mask

    known = getattr(decoder.config, "_attn_implementation", None) in families.RECORDED_ATTENTION
    if not known or not getattr(decoder, families.USES_REGISTRY, False):
        yield None
        return
    record = Recording()

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        mask = attention_mask  # transformers passes it by place or by name
        if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[1] != 1:
            raise UnsupportedAttention(f"{type(module).__name__} without an explicit mask that serves every head")
        mask = record.added(mask, query.dtype)
        record.seen[module] = (key, value, mask)
        return _attend(query, key, value, mask[..., : key.shape[2]], None, None, **kwargs), None

    def explicit_mask(*args: Any, **kwargs: Any) -> Any:
        return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})

    with replaced_attention([decoder.config], NAME, attend, explicit_mask):
        yield record


@contextmanager
def attending(decoder: Any, prefix: Prefix) -> Iterator[None]:
    """The decoder runs on the windows of copies of the batch; the mask it builds is not used."""

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        clean_key, clean_value, mask = prefix.layers[module]
        samples = None if prefix.samples is None else prefix.samples[: len(query)]  # some may have yet to leave
        if samples is not None and len(mask) > 1:
            mask = mask[samples]
        given = (mask, clean_key, clean_value, samples, prefix.places(len(query)))
        return _attend(query, key, value, *given, **kwargs), None

    with replaced_attention([decoder.config], NAME, attend):
        yield


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    clean_key: Tensor | None,
    clean_value: Tensor | None,
    samples: Tensor | None = None,
    places: tuple[Tensor, int] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **ignored: Any,
) -> Tensor:
    """Softmax attention [m·n,S',heads,d] of suffix queries [m·n,heads,S',d] over the clean prefix (shared by the m
    copies) and their own suffix keys. mask [n or 1,1,S',S] is added to the scores; sliding_window is in it already.
    With samples [rows] there are as many queries, keys and masks, and places ([rows], m) among copies of the batch."""
    if any(ignored.get(name) is not None for name in families.UNKNOWN_TO_PREFIX):
        raise UnsupportedAttention(f"attention sinks or biases: {sorted(ignored)}")
    rows, heads, length, width = query.shape
    n, shared = (len(clean_key) if clean_key is not None else rows), key.shape[1]
    m, group = (rows // n if places is None else places[1]), heads // shared
    scaling = scaling if scaling is not None else width**-0.5
    before = clean_key.shape[2] if clean_key is not None else 0
    if softcap is None and (clean_key is None or before <= length and length >= TORCH_FROM):
        # a prefix no longer than the suffix may be copied: torch's fused attention keeps no [S',S] weights
        mask = mask.to(query.dtype)
        if len(mask) > 1 and samples is None:
            mask = mask.repeat(m, 1, 1, 1)
        if clean_key is not None and clean_value is not None:
            before_key, before_value = (
                x.repeat(m, 1, 1, 1) if samples is None else x[samples] for x in (clean_key, clean_value)
            )
            key, value = torch.cat([before_key, key], 2), torch.cat([before_value, value], 2)
        if group > 1 and query.is_cuda:  # none of its fused kernels takes a mask and grouped heads together
            key, value, group = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), 1
        out = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=group > 1)
        return out.transpose(1, 2).contiguous()
    q = query.reshape(rows, shared, group, length, width)
    scores = q.flatten(2, 3) @ key.transpose(-1, -2)
    scores = scores.view(rows, shared, group, length, -1)
    if clean_key is not None and before:
        over_prefix = _over_prefix(q, clean_key.transpose(-1, -2), m, n, places)
        scores = torch.cat([over_prefix, scores], -1)
    scores = scores * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if samples is None:
        scores = (scores.unflatten(0, (m, n)) + mask[:, :, None]).flatten(0, 1)
    else:
        scores = scores + mask[:, :, None]
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    weights = scores.softmax(-1, dtype=wide).to(value.dtype)
    over_prefix, own = weights.split([before, key.shape[2]], -1)
    out = (own.flatten(2, 3) @ value).view(rows, shared, group, length, -1)
    if before:
        assert clean_value is not None
        out = out + _over_prefix(over_prefix, clean_value, m, n, places)
    return out.reshape(rows, heads, length, -1).transpose(1, 2).contiguous()


def _over_prefix(x: Tensor, clean: Tensor, m: int, n: int, places: tuple[Tensor, int] | None) -> Tensor:
    """The product of x [rows,shared,group,S',x] with what every sample has once, clean [n,shared,x,y]."""
    group, length = x.shape[2:4]
    if places is not None:
        x = x.new_zeros(m * n, *x.shape[1:]).index_copy(0, places[0], x)
    found = _ungroup(_regroup(x, m, n) @ clean, m, n, group, length)
    return found if places is None else found[places[0]]


def _regroup(x: Tensor, m: int, n: int) -> Tensor:
    """[m·n,shared,group,S',x] -> [n,shared,m·group·S',x]: all copies and grouped heads are queries of one product."""
    return x.unflatten(0, (m, n)).permute(1, 2, 0, 3, 4, 5).flatten(2, 4)


def _ungroup(x: Tensor, m: int, n: int, group: int, length: int) -> Tensor:
    """The inverse of `_regroup`."""
    return x.unflatten(2, (m, group, length)).permute(2, 0, 1, 3, 4, 5).flatten(0, 1)
