"""Hidden states behind one block, from a forward pass that ends there."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from mipfast.edit.prune import active_prunes
from mipfast.errors import InputError
from mipfast.model import families
from mipfast.model.batch import Batch, image_token, read_batch, without_labels
from mipfast.model.patching import plain_forward, unwrapped
from mipfast.model.positions import Positions, text_rows
from mipfast.model.sites import Sites, check_layer, find_sites


def hidden_states(
    model: Any, batch: Batch, layer: int, positions: Positions = "last_prompt", sites: Sites | None = None
) -> torch.Tensor:
    """Hidden states behind one text block, where RMisU steers them (arXiv 2511.06793 section 3.3).

    The forward pass ends there; tokens that no chosen position sees are left out, and the block's FFN runs at the
    chosen positions only. Differentiable.

    Args:
        model: a transformers causal or vision-language model, perhaps inside PEFT's or torch.compile's wrapper.
        batch: what model(**batch) takes, with labels [n,S] (-100 = not scored).
        layer: the text block, from 0.
        positions: which tokens: last_prompt, answer, first, prompt, all, subject (of a batch with a bool or int
            subject [n,S]), or indices [P] or [n,P].
        sites: find_sites(model), where it is called often.

    Returns:
        [T,D] of the model's dtype: the T chosen tokens, sample by sample.

    Raises:
        InputError: a layer that the model does not have, a batch that cannot be used, or a block that does not run.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import mipfast
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2))
        >>> ids = torch.tensor([[1, 5, 9, 7]])
        >>> batch = {"input_ids": ids, "labels": torch.where(ids == 7, ids, -100)}
        >>> mipfast.hidden_states(model, batch, layer=0).shape
        torch.Size([1, 16])
    """
    model = unwrapped(model)
    stack = (sites or find_sites(model)).text
    check_layer(layer, stack)
    batch, labels = read_batch(model, batch)
    block, ffn = stack.blocks[layer], stack.ffns[layer]
    inputs, rows, shape = _seen(model, batch, text_rows(batch, positions, labels).index)

    def gather(module: nn.Module, args: tuple) -> tuple:
        # Bloom's FFN is given the residual too, which it adds
        other = len(args) > 1 or args[0].shape[:-1] != shape
        return args if other else (args[0].flatten(0, 1)[None, rows],)

    def scatter(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if output.shape[:-1] == shape or args[0].shape[:-1] != (1, len(rows)):  # not what gather gave
            return output
        return output.new_zeros(shape.numel(), output.shape[-1]).index_copy(0, rows, output[0]).unflatten(0, shape)

    def stop(module: nn.Module, args: tuple, output: Any) -> None:
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    with plain_forward(model), ExitStack() as hooks:
        if not _hooked(model):
            hooks.enter_context(ffn.register_forward_pre_hook(gather))
            hooks.enter_context(ffn.register_forward_hook(scatter))
        hooks.enter_context(block.register_forward_hook(stop))
        try:
            model(**inputs, use_cache=False)
        except _Reached as reached:
            return reached.hidden.flatten(0, -2)[rows]
    raise InputError(
        f"the steered block {type(block).__name__} did not run in a forward pass of {type(model).__name__}"
    )


def _seen(model: Any, batch: Batch, rows: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor, torch.Size]:
    """(inputs cut behind the last of the rows of [n·S], the rows in them, [n,S] of them). Uncut where it is not known
    how."""
    inputs, shape = without_labels(batch), batch["labels"].shape
    stop = int((rows % shape[1]).max()) + 1
    tokenwise = {name: value for name, value in inputs.items() if name in families.CUT_WITH_TEXT}
    picture = image_token(model.config)
    if (
        _hooked(model)
        or "input_ids" not in inputs
        or not inputs.keys() <= families.CUT_WITH_TEXT | families.PICTURE_TENSORS
        or any(value.ndim != 2 and name != "position_ids" for name, value in tokenwise.items())
        or (picture is not None and bool((inputs["input_ids"][:, stop:] == picture).any()))
    ):
        return inputs, rows, shape
    cut = {name: value[..., :stop] for name, value in tokenwise.items()}
    return {**inputs, **cut}, rows // shape[1] * stop + rows % shape[1], torch.Size((shape[0], stop))


def _hooked(model: nn.Module) -> bool:
    """True if an activation prune is active: its hook indexes token positions, so the sequence must not be cut."""
    return any(handle.mode == "activations" for handle in active_prunes(model))


class _Reached(Exception):
    """Carries the steered block's output out of the forward pass."""

    def __init__(self, hidden: torch.Tensor):
        self.hidden = hidden
