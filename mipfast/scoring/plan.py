"""Which replay is exact on a model: a suffix or whole sequences, blocks that add their FFN's output or native ones."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from mipfast.model.batch import Labels
from mipfast.model.positions import Rows
from mipfast.scoring.capture import NATIVE, Capture
from mipfast.scoring.replay import Replay, _cut

log = logging.getLogger("mipfast")
ADDITIVE, SUFFIX = "additive", "suffix"  # found once per model: blocks add their FFN's output; a suffix's logits match


def plan(capture: Capture, clean_states: bool) -> tuple[Capture, Replay | None]:
    """The cheapest exact way to replay: (capture, perhaps cut to its suffix; a replay of one unscaled copy with every
    block's output at its baseline, and with its neurons' contribution as states), or (capture, None) for native replay.

    The check compares blocks' outputs at the chosen rows with the clean run's: wrong where attention over the prefix is
    not what it was. It goes over all blocks, a forward pass of one copy, where clean_states says they are wanted or
    on a model's first batch; else over the first block, for this batch's mask. Once per model it also compares blocks
    whose neurons are louder, wrong wherever one does more with its FFN's output than add it, and the logits, for what
    lies behind a vision tower."""
    if NATIVE in capture.checked or any(type(output) is not nn.Linear for output in capture.stack.outputs):
        return capture, None
    layers = capture.stack.num_layers if clean_states or ADDITIVE not in capture.checked else 1
    for candidate in filter(None, (suffix(capture), capture)):
        clean = Replay(candidate, 1)
        try:
            with torch.no_grad():
                exact = clean.walk(layers, partial(_block_is_additive, clean)) and _clean_logits_match(clean)
        except Exception as error:  # a family whose glue cannot run on a suffix says so in its own words
            log.debug("%s cannot be replayed from a suffix: %s", type(capture.model).__name__, error)
            exact = False
        if exact:
            capture.checked.update({ADDITIVE, SUFFIX} if candidate.prefix else {ADDITIVE})
            return candidate, clean
    log.info("%s: blocks do more with their FFN than add it; replaying natively", type(capture.model).__name__)
    return capture, None


def _block_is_additive(clean: Replay, layer: int) -> bool:
    """Whether the next block's output at its baseline plus its neurons' contribution is its clean output; takes
    it as a state."""
    capture = clean.capture
    act, weight = capture.activations[layer], capture.stack.outputs[layer].weight
    own = act @ weight.T
    state, _ = clean.baseline_output(carry=False)
    if ADDITIVE not in capture.checked:
        # up to 16 times as loud, so that it is no rounding of the state: a norm behind the FFN hid there in bfloat16
        before = clean.at_rows(state)[0]
        louder = (before.norm(dim=1) / own.norm(dim=1).clamp(min=torch.finfo(own.dtype).tiny)).clamp(1, 16)[:, None]
        output, _ = clean._block(louder * act[None], None)
        if not _close(clean.at_rows(output)[0], before + louder * own, roundings=4):
            return False
    clean.baseline_outputs.append(state)
    clean.push(clean.add_rows(state, own[None]), None)
    return _close(clean.at_rows(clean.states[-1])[0], capture.outputs[layer])


def _clean_logits_match(clean: Replay) -> bool:
    """Whether the clean states give the clean logits."""
    capture = clean.capture
    if capture.prefix is None or capture.entry is capture.decoder or SUFFIX in capture.checked:
        return True
    mask = capture.labels.mask
    return _close(clean.run()[mask], capture.logits[mask])


def _close(found: torch.Tensor, expected: torch.Tensor, roundings: int = 16) -> bool:
    """Every row equal to so many roundings of its norm: 16 of a 16-bit dtype, which sums in float32, are what 80 blocks
    add up to, and 64 of a wider one; a wrong mask or scale is off by more."""
    eps = torch.finfo(found.dtype).eps
    off, norm = (t.to(torch.promote_types(t.dtype, torch.float32)).norm(dim=-1) for t in (found - expected, expected))
    return bool((off <= (64 if eps < 1e-6 else roundings) * eps * norm).all())


def suffix(capture: Capture) -> Capture | None:
    """The capture for which the decoder runs on every sample's window alone: the tokens before it attend as a shared
    clean prefix. None where there is nothing to cut, or the decoder's arguments do not say how."""
    n, length = capture.num_samples, capture.batch["labels"].shape[1]
    starts, width = capture.starts, capture.width
    if capture.recording is None or width == length:
        return None
    prefix = capture.recording.suffix(starts, width)
    if prefix is None:
        return None
    first = torch.tensor(starts, device=capture.labels.index.device)
    index = (capture.labels.index - first[:, None]).clamp(0, width - 1)
    capture = replace(capture, labels=Labels(index, capture.labels.target, capture.labels.mask), prefix=prefix)
    if capture.entry is not capture.decoder:
        return capture  # the decoder's arguments are cut when the replay reaches it
    try:
        kwargs = _cut(capture.kwargs, starts, width)
    except ValueError as error:
        log.debug("no suffix: %s", error)
        return None
    sample, device = capture.rows.sample, capture.rows.index.device
    position = capture.rows.index - sample * length - first.to(device)[sample]
    return replace(
        capture,
        kwargs=kwargs,
        rows=Rows(sample, sample * width + position),
        token_sample=torch.arange(n, device=device).repeat_interleave(width),
    )
