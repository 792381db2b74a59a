"""One tiny random model per transformers family, and small batches for it: text, and text with pictures.

`FAMILIES[name]` says how to build it; the weights' drawing, the padding and the splitting are `tiny`'s.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import transformers as hf
from tiny import BOS, EOS, FIRST_WORD, IMAGE, PAD, PATCH, VISION_END, VISION_START, _pad, _settle, image_batch
from torch.overrides import TorchFunctionMode

SPECIAL = dict(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, **SPECIAL)
LM = dict(vocab_size=64, intermediate_size=48, max_position_embeddings=128, tie_word_embeddings=False, **SIZES)
TOWER = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2)
VIDEO = 63


class Float64(TorchFunctionMode):
    """Inside, torch reads float32 as float64. transformers rounds to float32 in norms, softmaxes and ropes, whatever
    the model's dtype: without this no comparison below 1e-7 would mean anything."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return (torch.Tensor.double if function is torch.Tensor.float else function)(*args, **kwargs)


@dataclass(frozen=True)
class Family:
    """model(): fresh, its weights not yet drawn. picture(i, generator): (number of image tokens, {argument: tensor}) of
    row i's pictures; "qwen" is tiny.image_batch's; None where the family sees nothing. dead: vision layers that run and
    are not used. stacks: the vision towers' names where there are several. text: whether it runs without a picture."""

    model: Callable
    picture: Callable | str | None = None
    dead: tuple[int, ...] = ()
    stacks: tuple[str | None, ...] = (None,)
    text: bool = True


def build(name):
    return _settle(FAMILIES[name].model(), torch.float32).double()


def text(name, seed=1):
    """Two rows of 9 and 11 words, 2 and 1 of them the answer, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(FIRST_WORD, VIDEO, (length,), generator=generator) for length in (9, 11)]
    return _arguments(name, _pad(rows, [2, 1], "right"))


def pictures(name, model, seed=1):
    """Two rows: BOS, pictures, 3 and 4 words, EOS, an answer of 1 and 2 words; padded on the right."""
    if FAMILIES[name].picture == "qwen":
        return image_batch(model, 2, seed, [4 * PATCH, 6 * PATCH])
    generator = torch.Generator().manual_seed(seed)
    rows, inputs = [], []
    for i in range(2):
        tokens, arguments = FAMILIES[name].picture(i, generator)
        words = torch.randint(FIRST_WORD, VIDEO, (4 + 2 * i,), generator=generator)
        middle = torch.tensor([EOS])
        rows.append(torch.cat([torch.tensor([BOS] + [IMAGE] * tokens), words[: 3 + i], middle, words[3 + i :]]))
        inputs.append(arguments)
    batch = _arguments(name, _pad(rows, [1, 2], "right"))
    for argument in inputs[0]:
        value = torch.cat([one[argument] for one in inputs])
        batch[argument] = value.double() if value.is_floating_point() else value
    if name == "mllama":  # from its picture on, a row looks at its tiles
        after = (batch["input_ids"] == IMAGE).cumsum(1)
        batch["cross_attention_mask"] = after[:, :, None, None] * batch["aspect_ratio_mask"][:, None]
    return batch


def _arguments(name, batch):
    """What else a family asks for."""
    images = batch["input_ids"] == IMAGE
    if FAMILIES[name].picture == "qwen":
        batch["mm_token_type_ids"] = images.long()
    if name == "gemma3":
        batch["token_type_ids"] = images.long()  # the tokens of one picture see each other
    return batch


# ---------------------------------------------------------------------------------------- text families


def _qwen3(**sliding):
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(head_dim=8, **sliding, **LM))


def _mistral():
    return hf.MistralForCausalLM(hf.MistralConfig(head_dim=8, sliding_window=4, **LM))


def _gemma2():
    config = hf.Gemma2Config(
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        attn_implementation="eager",  # sdpa has no softcap
        **LM,
    )
    return hf.Gemma2ForCausalLM(config)


def _gpt2():
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_positions=128, n_embd=32, n_layer=3, n_head=4, **SPECIAL))


def _falcon(**layout):
    config = hf.FalconConfig(vocab_size=64, ffn_hidden_size=48, **(SIZES | dict(num_key_value_heads=None)), **layout)
    return hf.FalconForCausalLM(config)


def _bloom():
    return hf.BloomForCausalLM(hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=3, n_head=4, **SPECIAL))


def _opt(**changes):
    sizes = dict(hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32)
    return hf.OPTForCausalLM(hf.OPTConfig(vocab_size=64, max_position_embeddings=128, **sizes, **SPECIAL, **changes))


def _lora(model, *targets, **settings):
    peft = pytest.importorskip("peft", reason="peft is not installed (it is in the extra dev)")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(targets), **settings))


# ----------------------------------------------------------------------------------------------- Qwen-VL


def _qwen_vl(kind, vision, **text):
    rope = dict(rope_theta=1e4, rope_scaling=dict(rope_type="default", mrope_section=[2, 1, 1]))
    config = getattr(hf, kind + "Config")(
        text_config=dict(LM, **rope, **text),
        vision_config=dict(patch_size=PATCH, spatial_merge_size=2, depth=3, num_heads=2, **vision),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    return getattr(hf, kind + "ForConditionalGeneration")(config)


def _qwen2_vl():
    return _qwen_vl("Qwen2VL", dict(embed_dim=32, hidden_size=32, mlp_ratio=2))


def _qwen3_vl():
    """Vision blocks 0 and 1 also feed text blocks 0 and 1 directly (deepstack)."""
    vision = dict(hidden_size=32, intermediate_size=40, out_hidden_size=32)
    return _qwen_vl("Qwen3VL", dict(vision, num_position_embeddings=16, deepstack_visual_indexes=[0, 1]), head_dim=8)


# ------------------------------------------------------------------------------------- one encoder + Llama


def _noise(generator, *shape):
    return torch.randn(shape, generator=generator)


def _llava():
    """The last CLIP block runs, and the model reads the one before."""
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(image_size=56, patch_size=28, **TOWER),
            text_config=hf.LlamaConfig(**LM),
            image_token_index=IMAGE,
            vision_feature_layer=-2,
        )
    )


def _llava_picture(i, generator):
    return 4, dict(pixel_values=_noise(generator, 1, 3, 56, 56))


def _llava_onevision():
    return hf.LlavaOnevisionForConditionalGeneration(
        hf.LlavaOnevisionConfig(
            vision_config=hf.SiglipVisionConfig(image_size=56, patch_size=28, vision_use_head=False, **TOWER),
            text_config=hf.Qwen2Config(**LM),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=[[56, 56], [56, 112]],
        )
    )


def _llava_onevision_picture(i, generator):
    """Row 0: two crops and the whole, 4 patches each; row 1: one crop and the whole, and a crop of padding. Every row
    of crop patches ends in a newline token."""
    pixels = _noise(generator, 1, 3, 3, 56, 56)
    if i:
        pixels[:, 2] = 0
    return (4 + 2 * 3 if i else 4 + 2 * 5), dict(
        pixel_values=pixels, image_sizes=torch.tensor([[56, 56 if i else 112]])
    )


def _gemma3():
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            text_config=hf.Gemma3TextConfig(
                head_dim=8, query_pre_attn_scalar=8, sliding_window=4, sliding_window_pattern=2, **LM
            ),
            vision_config=hf.SiglipVisionConfig(image_size=56, patch_size=14, vision_use_head=False, **TOWER),
            mm_tokens_per_image=4,
            boi_token_index=VISION_START,
            eoi_token_index=VISION_END,
            image_token_index=IMAGE,
            tie_word_embeddings=False,
        )
    )


def _internvl():
    return hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(
            vision_config=hf.InternVLVisionConfig(image_size=56, patch_size=14, **TOWER),
            text_config=hf.Qwen2Config(**LM),
            image_token_id=IMAGE,
            image_seq_length=4,
            tie_word_embeddings=False,
        )
    )


def _tiles(i, generator):
    """Row i has i + 1 tiles of 4 image tokens."""
    return 4 * (i + 1), dict(pixel_values=_noise(generator, i + 1, 3, 56, 56))


def _idefics(kind):
    config = getattr(hf, kind + "Config")(
        text_config=hf.LlamaConfig(**LM),
        vision_config=dict(image_size=56, patch_size=14, **TOWER),
        image_token_id=IMAGE,
        pad_token_id=PAD,
    )
    return getattr(hf, kind + "ForConditionalGeneration")(config)


def _idefics_picture(i, generator):
    """Row 0: one picture and one of padding, which the model takes out; row 1: two. 4 image tokens each."""
    pixels = _noise(generator, 1, 2, 3, 56, 56)
    if i == 0:
        pixels[:, 1] = 0
    return 4 * (i + 1), dict(pixel_values=pixels, pixel_attention_mask=torch.ones(1, 2, 56, 56, dtype=torch.long))


def _pixtral(kind, text):
    """All pictures of a batch are one sequence of the tower."""
    config = getattr(hf, kind + "Config")(
        vision_config=dict(model_type="pixtral", image_size=56, patch_size=14, head_dim=16, **TOWER),
        text_config=text,
        image_token_id=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
        **({"vision_feature_layer": -1} if kind == "Mistral3" else {}),
    )
    return getattr(hf, kind + "ForConditionalGeneration")(config)


def _pixtral_picture(i, generator):
    """Row 0: 2x2 tokens of 2x2 patches each; row 1: 1x2, padded below."""
    return 4 - 2 * i, dict(
        pixel_values=_noise(generator, 1, 3, 56, 56), image_sizes=torch.tensor([[28 if i else 56, 56]])
    )


def _mllama():
    """Text block 1 attends to the pictures. Vision block 0 is read directly; the tower ends in a second, global one."""
    return hf.MllamaForConditionalGeneration(
        hf.MllamaConfig(
            text_config=dict(LM, cross_attention_layers=[1], rope_theta=1e4, rope_scaling=dict(rope_type="default")),
            vision_config=dict(
                hidden_size=32,
                intermediate_size=40,
                num_hidden_layers=2,
                num_global_layers=2,
                attention_heads=2,
                vision_output_dim=64,
                image_size=28,
                patch_size=14,
                max_num_tiles=2,
                intermediate_layers_indices=[0],
                supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
            ),
            image_token_index=IMAGE,
        )
    )


def _mllama_picture(i, generator):
    """Row 0: one tile and one of padding; row 1: two tiles."""
    tiles = torch.tensor([[[1, i]]])
    return 1, dict(
        pixel_values=_noise(generator, 1, 1, 2, 3, 28, 28),
        aspect_ratio_ids=torch.tensor([[1 + i]]),
        aspect_ratio_mask=tiles,
    )


FAMILIES = {
    "llama": Family(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LM))),
    "qwen3": Family(_qwen3),
    "qwen3-sliding": Family(lambda: _qwen3(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "mistral": Family(_mistral),
    "gemma2": Family(_gemma2),
    "qwen2-vl": Family(_qwen2_vl, "qwen"),
    "qwen3-vl": Family(_qwen3_vl, "qwen"),
    "llava": Family(_llava, _llava_picture, dead=(2,)),
    "llava-onevision": Family(_llava_onevision, _llava_onevision_picture),
    "gemma3": Family(_gemma3, _tiles),
    "internvl": Family(_internvl, _tiles),
    "idefics3": Family(lambda: _idefics("Idefics3"), _idefics_picture),
    "smolvlm": Family(lambda: _idefics("SmolVLM"), _idefics_picture),
    "mllama": Family(
        _mllama,
        _mllama_picture,
        stacks=("model.vision_model.transformer.layers", "model.vision_model.global_transformer.layers"),
        text=False,
    ),
    "mistral3": Family(lambda: _pixtral("Mistral3", hf.MistralConfig(head_dim=8, **LM)), _pixtral_picture),
    "lighton-ocr": Family(lambda: _pixtral("LightOnOcr", hf.Qwen3Config(head_dim=8, **LM)), _pixtral_picture),
    "gpt2": Family(_gpt2),
    "falcon": Family(lambda: _falcon(new_decoder_architecture=False, parallel_attn=True)),
    "falcon-new": Family(lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2)),
    "falcon-sequential": Family(lambda: _falcon(new_decoder_architecture=False, parallel_attn=False)),
    "bloom": Family(_bloom),
    "doge": Family(lambda: hf.DogeForCausalLM(hf.DogeConfig(**LM))),
    "opt": Family(_opt),
    "opt-350m": Family(lambda: _opt(do_layer_norm_before=False)),  # its norms stand behind
    "gpt2-lora": Family(lambda: _lora(_gpt2(), "c_attn", "c_fc", "c_proj", fan_in_fan_out=True)),
    "llava-lora": Family(
        lambda: _lora(_llava(), "q_proj", "up_proj", "down_proj", "fc1", "fc2"), _llava_picture, dead=(2,)
    ),
}
