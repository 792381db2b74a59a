"""Ways to get forgotten knowledge back out: what an unlearning claim has to survive."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mipfast.errors import DivergedError, InputError
from mipfast.judge import metrics
from mipfast.model import families
from mipfast.model.batch import Batch, check_many, find_labels
from mipfast.model.likelihood import cross_entropy, log_probs
from mipfast.model.patching import frozen_eval, unwrapped
from mipfast.model.weights import check_weights


@contextmanager
def relearned(model: Any, batches: Iterable[Batch], lr: float = 5e-4) -> Iterator[None]:
    """A context manager: the model after one Adam step per batch on all of its weights, which it gets back at exit.

    Judge inside the context on the *rest* of the forgotten knowledge: what comes back there was hidden, not removed.

    Args:
        model: a transformers model.
        batches: some of the forgotten knowledge, as model(**batch) takes it, with labels.
        lr: of Adam without weight decay.

    Raises:
        InputError: for lr that is not positive, one batch in the place of many or a batch without labels.
        ModelError: for weights that training would not reach: offloaded, sharded or quantised.
        DivergedError: for a loss that is not finite.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from mipfast import attacks
        >>> size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2))
        >>> ids = torch.tensor([[3, 5, 7]])
        >>> before = model.lm_head.weight.clone()
        >>> with attacks.relearned(model, [{"input_ids": ids, "labels": ids}]):
        ...     torch.equal(model.lm_head.weight, before)
        False
        >>> torch.equal(model.lm_head.weight, before)
        True
    """
    check_many("batches", batches)
    if not isinstance(lr, int | float) or not lr > 0:
        raise InputError(f"lr={lr!r}; expected a positive number")
    model = unwrapped(model)
    check_weights(model.named_parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        with frozen_eval(model, model.parameters()):
            optimizer = torch.optim.Adam(model.parameters(), lr=lr)
            for step, batch in enumerate(batches):
                loss = cross_entropy(model, batch)
                if not bool(loss.isfinite()):
                    raise DivergedError(f"relearning step {step} has loss {loss.item()}; lower lr ({lr})")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                torch.clear_autocast_cache()  # inside the caller's autocast, casts of the old values
        yield
    finally:
        model.load_state_dict(before)
        torch.clear_autocast_cache()


def membership(
    model: Any,
    members: Iterable[Batch],
    strangers: Iterable[Batch],
    k: float = 0.2,
    tokenizer: Any = None,
    reference: Any = None,
) -> dict[str, float]:
    """Membership inference: do the model's likelihoods tell what it was trained on from what it never saw?

    A sample's likelihood is, of its label tokens,
    - loss: the mean log-probability (Yeom et al., arXiv 1709.01604);
    - min_k: that of the share k of them that are least likely, one at least (Shi et al., arXiv 2310.16789);
    - min_k_plus_plus: the same of (log p - mu) / sigma, mu and sigma the mean and standard deviation of the whole
      vocabulary's log-probabilities under the model's own distribution (Zhang et al., arXiv 2404.02936), sigma^2 at
      least 1e-6 as in open-unlearning: where the model is sure there is no spread to divide by;
    - zlib: loss / bytes of the zlib-compressed text (Carlini et al., arXiv 2012.07805);
    - reference: loss - the reference model's (ibid.).
    For one-token answers loss and min_k are the same.

    Args:
        model: a transformers model.
        members: batches of what it was trained on, as model(**batch) takes them, with labels.
        strangers: batches of what it never saw.
        k: the share of min_k and min_k_plus_plus, in (0, 1].
        tokenizer: whose decode(ids, skip_special_tokens=True) gives the text of label tokens, for zlib.
        reference: another model, which takes the same batches, for reference.

    Returns:
        {"loss", "min_k", "min_k_plus_plus", with a tokenizer "zlib", with a reference "reference": AUC} in percent, of
        "the member has the higher likelihood": 50 cannot be told apart, 100 always; below 50 the members stand out as
        unusually *un*likely. A model that never saw either need not be at 50: compare with a retrained one.

    Raises:
        InputError: for k outside (0, 1], a side without samples, one batch in the place of many, a tokenizer that
            cannot decode or a reference that is no model.
        DivergedError: for likelihoods that are not finite.
        MipfastError: without scikit-learn.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from mipfast import attacks
        >>> size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2))
        >>> batch = {"input_ids": torch.tensor([[3, 5, 7]]), "labels": torch.tensor([[-100, -100, 7]])}
        >>> attacks.membership(model, [batch], [batch])
        {'loss': 50.0, 'min_k': 50.0, 'min_k_plus_plus': 50.0}
    """
    for name, batches in (("members", members), ("strangers", strangers)):
        check_many(name, batches)
    if not isinstance(k, int | float) or not 0 < k <= 1:
        raise InputError(f"k={k!r}; expected a share of the label tokens in (0, 1]")
    if tokenizer is not None and not hasattr(tokenizer, "decode"):
        raise InputError(f"tokenizer is a {type(tokenizer).__name__}; expected one with decode, the model's own")
    if reference is not None and not isinstance(reference, nn.Module):
        raise InputError(f"reference is a {type(reference).__name__}; expected a model, loaded")
    sides = []
    for batches in map(list, (members, strangers)):
        side = _likelihoods(model, batches, k, tokenizer)
        if reference is not None:
            known = _likelihoods(reference, batches, k, None, "reference")["loss"]
            side["reference"] = [mine - its for mine, its in zip(side["loss"], known, strict=True)]
        sides.append(side)
    return {name: 100 * metrics.auc(*(side[name] for side in sides)) for name in sides[0]}


def _likelihoods(
    model: Any, batches: Iterable[Batch], k: float, tokenizer: Any, name: str = "model"
) -> dict[str, list[float]]:
    """{of `membership`'s names those that one model tells: the likelihood of every sample}."""
    model = unwrapped(model)
    scores: dict[str, list[float]] = {"loss": [], "min_k": [], "min_k_plus_plus": []}
    if tokenizer is not None:
        scores["zlib"] = []
    with frozen_eval(model), torch.no_grad():
        for batch in batches:
            counts = find_labels(batch).mask.sum(1).tolist()
            samples = (tensor.split(counts) for tensor in log_probs(model, batch))
            for log_p, target in zip(*samples, strict=True):
                tokens = F.nll_loss(log_p, target, reduction="none")
                if not bool(tokens.isfinite().all()):
                    raise DivergedError(
                        f"sample {len(scores['loss'])} has label tokens of NLL {tokens.tolist()}; "
                        f"expected finite ones: check the {name}'s weights and dtype"
                    )
                share = max(1, int(k * len(tokens)))
                scores["loss"].append(-tokens.mean().item())
                scores["min_k"].append(-tokens.topk(share).values.mean().item())
                least = _standardised(log_p, tokens).topk(share, largest=False).values
                scores["min_k_plus_plus"].append(least.mean().item())
                if tokenizer is not None:
                    text = tokenizer.decode(target.tolist(), skip_special_tokens=True)
                    scores["zlib"].append(scores["loss"][-1] / len(zlib.compress(text.encode())))
    return scores


def _standardised(log_p: torch.Tensor, nll: torch.Tensor) -> torch.Tensor:
    """(log p - mu) / sigma of T tokens [T], of log-probabilities [T,V]."""
    p = log_p.exp()
    log_p = log_p.where(p > 0, 0)  # 0 log 0 = 0: a model may rule words out
    mu = (p * log_p).sum(-1)
    variance = (p * (log_p - mu[:, None]).square()).sum(-1)
    return (-nll - mu) / variance.clamp_min(1e-6).sqrt()


@contextmanager
def quantised(model: Any, bits: int = 4) -> Iterator[None]:
    """A context manager: the model with its weights rounded to integers of `bits` and back; at exit they return.

    The weight of every Linear and Conv1D, embeddings and language-model head left alone. Symmetric, round to nearest,
    one scale per output channel: s round(w / s), s = max|w| / (2^(bits-1) - 1). Editing moves weights so little that
    rounding can move them back: Zhang et al., arXiv 2410.16454. A PeftModel's adapters are rounded apart from what they
    sit on: merge them first.

    Args:
        model: a transformers model.
        bits: 2 to 8.

    Raises:
        InputError: for other bits.
        ModelError: for weights that rounding would not reach: integers already, offloaded, sharded, or made anew in
            every forward pass.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from mipfast import attacks
        >>> size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2))
        >>> with attacks.quantised(model, bits=2):
        ...     values = model.model.layers[0].mlp.up_proj.weight[0].unique()
        >>> len(values)  # -s, 0, s
        3
    """
    if bits not in range(2, 9):
        raise InputError(f"bits={bits!r}; expected 2 to 8")
    model = unwrapped(model)
    kept = {id(e.weight) for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None}
    projections = {  # Conv1D's weights are [in, out]
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and id(module.weight) not in kept
    }
    check_weights((f"{name}.weight", module.weight) for name, module in projections.items())
    before: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}
    try:
        for module in projections.values():
            if id(weight := module.weight) not in before:
                before[id(weight)] = weight, weight.detach().clone()
                weight.data.copy_(_rounded(weight.detach(), bits, dim=1 if isinstance(module, nn.Linear) else 0))
        torch.clear_autocast_cache()
        yield
    finally:
        for weight, original in before.values():
            weight.data.copy_(original)
        torch.clear_autocast_cache()


def _rounded(weight: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """dim: along which the inputs lie."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    scale = wide.abs().amax(dim, keepdim=True) / (2 ** (bits - 1) - 1)
    return wide.div(scale.where(scale > 0, 1)).round() * scale


def prefixed(batch: Batch, tokens: Sequence[int] | torch.Tensor, at: int = 0) -> dict[str, torch.Tensor]:
    """The batch with the same text tokens before every sample's prompt: a hint, or examples of what is asked.

    The tokens are attended and not scored; position_ids count on; what is not one value per token is passed through.

    Args:
        batch: as model(**batch) takes it, padded on either side.
        tokens: [P] or [1,P] integers, a tokenizer's input_ids.
        at: how many of a sample's own tokens stay in front of them; 1 keeps a start token first.

    Returns:
        A new batch, every sample P tokens longer.

    Raises:
        InputError: for tokens that are no integers, for anything else that has a value per token (inputs_embeds,
            cross_attention_mask, a 4-D mask), and where the tokens would stand behind a label.

    Example:
        >>> import torch
        >>> from mipfast import attacks
        >>> batch = {"input_ids": torch.tensor([[1, 5, 7]]), "labels": torch.tensor([[-100, -100, 7]])}
        >>> hinted = attacks.prefixed(batch, [8, 9], at=1)
        >>> hinted["input_ids"].tolist(), hinted["labels"].tolist()
        ([[1, 8, 9, 5, 7]], [[-100, -100, -100, -100, 7]])
    """
    ids = batch["input_ids"]
    added = _token_ids(tokens).to(ids)
    fill = {"input_ids": added} | {
        name: torch.full_like(added, value) for name, value in families.VALUE_OF_ADDED_TOKEN.items()
    }
    odd = [
        f"{name} {list(value.shape)}"
        for name, value in batch.items()
        if (name in fill and value.ndim != 2) or (name not in {*fill, "position_ids"} and value.shape[:2] == ids.shape)
    ]
    if odd:
        raise InputError(f"cannot put tokens into {', '.join(odd)}; expected {', '.join(fill)} [n,S] and position_ids")
    attended = batch.get("attention_mask", torch.ones_like(ids)).bool()
    first, last = attended.int().argmax(1), attended.sum(1) - 1
    scored = batch.get("labels", torch.full_like(ids, -100)) != -100
    most = int(last.where(~scored.any(1), last.minimum(scored.int().argmax(1) - first)).min())
    if at not in range(most + 1):
        raise InputError(f"at={at!r} is not inside every sample's prompt; expected an integer 0..{most}")
    starts = (first + at).tolist()

    def longer(name: str, value: torch.Tensor) -> torch.Tensor:
        """[...,n,S] to [...,n,S+P]."""
        rows = zip(value.unbind(-2), starts, strict=True)
        if name == "position_ids":
            steps = torch.arange(len(added), device=value.device)
            parts = [(row[..., :s], row[..., s : s + 1] + steps, row[..., s:] + len(added)) for row, s in rows]
        else:
            parts = [(row[:s], fill[name].to(value), row[s:]) for row, s in rows]
        return torch.stack([torch.cat(part, -1) for part in parts], -2)

    return {name: longer(name, v) if name in {*fill, "position_ids"} else v for name, v in batch.items()}


def _token_ids(tokens: Any) -> torch.Tensor:
    """[P] of [P] or [1,P]."""
    try:
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0, 0)  # refused below, with the tokens in the message
    ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
    if ids.ndim != 1 or (len(ids) and ids.dtype not in (torch.int64, torch.int32)):
        shown = f"a {ids.dtype} tensor {list(ids.shape)}" if isinstance(tokens, torch.Tensor) else repr(tokens)
        raise InputError(f"tokens are {shown}; expected integers of shape [P] or [1,P], a tokenizer's input_ids")
    return ids
