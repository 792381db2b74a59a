"""Tiny random models and batches, built from configs alone: no download, the same bits on every run.

A float64 model has exactly the weights of the float32 one, so it can serve as the truth for both.
transformers rounds to float32 inside its RMSNorms and inside Qwen's vision rope whatever the model's dtype;
`_truly_float64` removes that, or no comparison below 1e-7 would mean anything.

A batch is what `model(**batch)` takes. Its labels carry the token itself at the answer's places and -100
elsewhere (the models shift inside): the logits at position t - 1 are scored by the label at t.
"""

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from mipfast.model.accelerated import accelerated

PAD, BOS, EOS, VISION_START, VISION_END, IMAGE = range(6)
FIRST_WORD = 6  # the words are FIRST_WORD .. vocab - 1
PATCH, MERGE = 14, 2
TOKENWISE = ("input_ids", "attention_mask", "labels", "position_ids", "mm_token_type_ids", "token_type_ids")
TOKENWISE += ("cross_attention_mask", "subject")


# ---------------------------------------------------------------------------------------------- models


def tiny_llama(dtype=torch.float32):
    """4 layers, hidden 32, 48 neurons a layer, 4 heads on 2 key-value heads, 61 words, no biases."""
    return _settle(LlamaForCausalLM(_llama_config(vocab_size=61)), dtype)


def tiny_qwen_vl(dtype=torch.float32):
    """Qwen2.5-VL: 3 text layers with M-RoPE, 48 neurons each; 3 vision blocks with 40 neurons each.

    Windows are 56 pixels wide, so that a picture of 84 already has four of them. Blocks 0 and 2 look at
    windows, block 1 at the whole picture.
    """
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            rope_theta=1e4,
            rope_scaling=dict(type="mrope", mrope_section=[2, 1, 1]),
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        ),
        vision_config=dict(
            depth=3,
            hidden_size=32,
            intermediate_size=40,
            num_heads=2,
            out_hidden_size=32,
            patch_size=PATCH,
            spatial_merge_size=MERGE,
            window_size=56,
            fullatt_block_indexes=[1],
        ),
        image_token_id=IMAGE,
        video_token_id=63,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    return _settle(Qwen2_5_VLForConditionalGeneration(config), dtype)


def tiny_llava(dtype=torch.float32):
    """LLaVA-1.5: 2 text layers; 3 CLIP blocks, the last of which the model runs and then leaves unused."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=56,
            patch_size=28,
        ),
        text_config=_llama_config(vocab_size=64, num_hidden_layers=2),
        image_token_index=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return _settle(LlavaForConditionalGeneration(config), dtype)


def tiny_moe(dtype=torch.float32):
    """Qwen3-MoE: the experts are one fused 3-D parameter, there is no Linear whose input could be read."""
    config = Qwen3MoeConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=PAD,
    )
    return _settle(Qwen3MoeForCausalLM(config), dtype)


def tiny_polynomial(dtype=torch.float64):
    """A Llama whose `log_odds` is a polynomial in every activation. It has 4 layers and 2 words.

    The norms are identities; queries are zero, so attention is the plain mean of the past (linear); the
    gate's activation is the identity, so an FFN is the product of two linear maps: each native layer doubles
    the degree. With 2 words the log odds are z_y - z_other, which is linear in the logits.
    """
    model = LlamaForCausalLM(_llama_config(vocab_size=2, hidden_act="linear", pad_token_id=None))
    model = _settle(model, dtype)
    model.model.norm = torch.nn.Identity()
    for block in model.model.layers:
        block.input_layernorm = block.post_attention_layernorm = torch.nn.Identity()
        block.self_attn.q_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.mul_(2)  # so that the highest powers weigh something
    return model


def _llama_config(**changes):
    sizes = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    return LlamaConfig(**{**sizes, **changes})


def _settle(model, dtype):
    """Larger weights than a fresh model has (their gradients are not degenerate), eval mode, dtype."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in sorted(model.named_parameters()):
        drawn = torch.randn(weight.shape, generator=generator)
        if "embed_tokens" in name:
            weight.data = 0.5 * drawn
        elif weight.ndim == 1 and "norm" in name and "weight" in name:
            weight.data = 1 + 0.1 * drawn
        else:
            weight.data = (0.02 if "patch_embed" in name else 0.15) * drawn
    model = model.to(dtype).eval()
    return _truly_float64(model) if dtype == torch.float64 else model


def _truly_float64(model):
    for module in list(model.modules()):
        for name, child in module.named_children():
            if "RMSNorm" in type(child).__name__:
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)

    def rotate(q, k, cos, sin):
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        half = modeling_qwen2_5_vl.rotate_half
        return (q * cos + half(q) * sin).to(q.dtype), (k * cos + half(k) * sin).to(k.dtype)

    modeling_qwen2_5_vl.apply_rotary_pos_emb_vision = rotate  # for float32 the same operations as before
    return model


def unchecked_route(call, batch, faster):
    """In the place of `search._check_route`, where replays are counted that the search makes."""
    faster.enter_context(accelerated(call.model, call.sites.stacks, call.known))


# --------------------------------------------------------------------------------------------- batches


def text_batch(model, lengths, answer_lengths, padding="right", seed=0):
    """Random words: row i has `lengths[i]` tokens, of which the last `answer_lengths[i]` are the answer.

    padding "right" or "left" fills up to the longest row; None demands equal lengths. Qwen-VL gets positions
    of shape (3, B, S) and `mm_token_type_ids`.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab = model.config.get_text_config().vocab_size
    first = FIRST_WORD if vocab > FIRST_WORD else 0
    rows = [torch.randint(first, vocab, (length,), generator=generator) for length in lengths]
    batch = _pad(rows, answer_lengths, padding)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    if _is_qwen(model):
        batch["mm_token_type_ids"] = torch.zeros_like(batch["input_ids"])
        positions = positions.expand(3, -1, -1)
    return {**batch, "position_ids": positions}


def image_batch(model, n, seed=0, size=56, padding="right", question=4, answer_lengths=None):
    """n rows of BOS, picture, `question` words (one more in each further row), EOS, answer.

    size: pixels; one for all rows or a list with, for each row, a side, a (height, width) pair, or a list of
    those ([] is a row without a picture). answer_lengths default to 1, 2, 3, 1, 2, ... There are no
    position_ids: the model works out its M-RoPE positions itself. For LLaVA every row has one picture of 56.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab = model.config.get_text_config().vocab_size
    sizes = list(size) if isinstance(size, list) else [size] * n
    answer_lengths = answer_lengths or [1 + i % 3 for i in range(n)]
    rows, grids = [], []
    for i in range(n):
        pictures = sizes[i] if isinstance(sizes[i], list) else [sizes[i]]
        row = [BOS]
        for picture in pictures:
            height, width = picture if isinstance(picture, tuple) else (picture, picture)
            grids.append([1, height // PATCH, width // PATCH])
            tokens = grids[-1][1] * grids[-1][2] // MERGE**2
            row += [VISION_START] + [IMAGE] * tokens + [VISION_END]
        words = torch.randint(FIRST_WORD, vocab - 1, (question + i + answer_lengths[i],), generator=generator)
        row += words[: question + i].tolist() + [EOS] + words[question + i :].tolist()
        rows.append(torch.tensor(row))
    batch = _pad(rows, answer_lengths, padding)
    if not _is_qwen(model):
        return {**batch, "pixel_values": torch.randn(n, 3, 56, 56, generator=generator).to(model.dtype)}
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).long()
    if grids:
        grid = torch.tensor(grids)
        patches = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * PATCH**2, generator=generator)
        batch |= dict(pixel_values=patches.to(model.dtype), image_grid_thw=grid)
    return batch


def marked(batch, *spans):
    """The batch with the subject of every sample: of its attended tokens those from start to stop."""
    subject = torch.zeros_like(batch["labels"], dtype=torch.bool)
    for row, mask, (start, stop) in zip(subject, batch["attention_mask"], spans, strict=True):
        row[mask.nonzero()[start:stop, 0]] = True
    return batch | {"subject": subject}


def split(batch, i, keep_padding=False):
    """The batch of sample i alone, without its padding (or with it).

    A row without a picture from a batch with pictures gets the positions that it had there: Qwen-VL counts
    them from the mask only where there is a picture.
    """
    ids = batch["input_ids"][i]
    keep = torch.ones_like(ids, dtype=torch.bool)
    if "attention_mask" in batch and not keep_padding:
        keep = batch["attention_mask"][i].bool()
    one = {}
    for name, value in batch.items():
        if name not in TOKENWISE:
            continue
        one[name] = value[:, i : i + 1, keep] if value.ndim == 3 else value[i : i + 1, keep]
    if "image_grid_thw" in batch:
        pictures = (batch["input_ids"] == VISION_START).sum(-1).tolist()
        before, own = sum(pictures[:i]), pictures[i]
        patches = batch["image_grid_thw"].prod(-1).tolist()
        start, count = sum(patches[:before]), sum(patches[before : before + own])
        if own:
            one["image_grid_thw"] = batch["image_grid_thw"][before : before + own]
            one["pixel_values"] = batch["pixel_values"][start : start + count]
        else:
            one["position_ids"] = (one["attention_mask"].cumsum(-1) - 1).clamp_min(0).expand(3, -1, -1)
    else:
        one |= {name: _own(value, batch, i) for name, value in batch.items() if name not in TOKENWISE}
    return one


def _own(value, batch, i):
    """Row i's part of what is not one row per token: one entry per row, or tiles in proportion to the image tokens."""
    n = len(batch["input_ids"])
    if len(value) == n:
        return value[i : i + 1]
    images = (batch["input_ids"] == IMAGE).sum(-1)
    parts = (images * len(value) // images.sum()).tolist()
    return value[sum(parts[:i]) : sum(parts[: i + 1])]


def _pad(rows, answer_lengths, padding):
    longest = max(len(row) for row in rows)
    if padding is None and any(len(row) != longest for row in rows):
        raise ValueError("rows of unequal length need padding")
    ids = torch.full((len(rows), longest), PAD)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (row, answer) in enumerate(zip(rows, answer_lengths, strict=True)):
        start = longest - len(row) if padding == "left" else 0
        stop = start + len(row)
        ids[i, start:stop], mask[i, start:stop] = row, 1
        labels[i, stop - answer : stop] = row[-answer:]
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def _is_qwen(model):
    return model.config.model_type in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
