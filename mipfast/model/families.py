"""What is known of model families: the names of transformers (and PEFT) that mipfast relies on, a line each.

Data; whoever computes with a line is named above it. docs/families.md says which one a new family needs.
"""

from __future__ import annotations

from typing import Any

# ------------------------------------------------------ where FFN neurons are: model/sites.py

FFN_NAMES = ("mlp", "feed_forward", "ffn", "ff")  # the module around an FFN's projections
OUTPUT_NAMES = ("down_proj", "fc2", "c_proj", "w2", "linear_fc2", "dense_4h_to_h", "lin2")  # the last of these
TRANSPOSED = ("Conv1D",)  # types of projections whose weight is [in, out]: GPT-2; also edit/train.py, judge/attacks.py
BARE_OUTPUTS = ("fc2",)  # those that may stand in a decoder's block itself: OPT, XGLM, BioGPT
EXPERTS = "experts"  # in the name of every parameter of a mixture of experts
INNER_DECODER = "text_model"  # what get_decoder() of Idefics3 and SmolVLM wraps in transformers 4
# PEFT's: the projection inside its wrapper; the matrices that read what the projection reads, and write what it writes
ADAPTED, ADAPTER_READS, ADAPTER_WRITES = "base_layer", "lora_A", "lora_B"
# PEFT's too: the adapters that a wrapper has worked into its projection; what DoRA scales it by (edit/prune.py)
MERGED, DORA = "merged_adapters", "lora_magnitude_vector"

# ------------------------------------------------------ what stands around a model: model/patching.py

WRAPPED = ("_orig_mod", "module")  # the model inside torch.compile's wrapper, and DistributedDataParallel's and its kin
UNMIXED_FORWARD = "_original_forward"  # where accelerate keeps the forward that it put mixed precision around

# ------------------------------------------------------ what else decides results: model/fingerprint.py

ADAPTER_SWITCHES = ("disable_adapters", "active_adapters", "merged_adapters", "scaling")  # of PEFT's wrappers
NOT_COMPUTED_WITH = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")  # of a config
ROPE_OF_LAST_FORWARD = ("dynamic", "longrope")  # types whose inv_freq is what the last sequence's length asked for

# ------------------------------------------------------ how a gated FFN is made: model/fused_ffn.py

# down(act(gate x) * up x); whether an FFN with these parts computes that is tried, not believed
GATED_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")

# ------------------------------------------------------ attention

# What a decoder may use where its suffix is replayed alone (scoring/prefix_attention.py): both read an explicit mask.
RECORDED_ATTENTION = ("sdpa", "eager")
# True on decoders whose attention is looked up in transformers' registry. Others (Falcon, Bloom, MPT, GPT-J, StableLM)
# have their own, and would take the explicit mask for numbers to add.
USES_REGISTRY = "_supports_attention_backend"
# Arguments of attention functions that the one over a clean prefix does not know: sinks of gpt-oss, biases of T5's kin.
UNKNOWN_TO_PREFIX = ("s_aux", "sinks", "position_bias")
# Projections of a decoder's attention needed at label positions alone in its last block (scoring/replay.py); keys and
# values of every token are seen by later ones.
ROW_BY_ROW = ("q_proj", "o_proj")
# Vision towers whose attention is cut into windows (model/window_attention.py): by this implementation, where a module
# takes this argument.
WINDOWED_ATTENTION, WINDOW_BOUNDS = "sdpa", "cu_seqlens"

# ------------------------------------------------------ arguments of blocks and decoders: scoring/replay.py

STATE_NAMES = ("hidden_states", "hidden_state")  # a block's input, where it is passed by name
BATCH_DIM = {"position_ids": -2}  # of arguments where it is not the first; position_ids are [n,S] or [3,n,S]
NO_BATCH_DIM = ("cache_position", "logits_to_keep")
ONE_FOR_ALL = ("position_ids", "attention_mask")  # a batch dimension of 1 serves every sample
# Arguments of decoders with a token dimension, and which it is: what else they get, they get whole or not at all.
TOKEN_DIM = {"inputs_embeds": 1, "input_ids": 1, "position_ids": -1, "visual_pos_masks": 1, "cache_position": 0}
# Of Qwen3-VL's decoder, one row per picture token; transformers 4 adds them to the blocks' states in place.
DEEPSTACK = ("deepstack_visual_embeds",)

# ------------------------------------------------------ tensors of a batch

# Tables of learned positions, which end (GPT-2's, OPT's); GPT-2 counts padding on the left too (model/batch.py).
LEARNED_POSITIONS = ("wpe", "embed_positions")
# Arguments that change what a model returns, or what came before: no part of a batch (model/batch.py).
NOT_OF_A_BATCH = ("logits_to_keep", "past_key_values", "use_cache", "return_dict")

# Config fields with the id of a picture's placeholder, the first that is there (model/batch.py).
IMAGE_TOKEN = ("image_token_id", "image_token_index")
# One value per text token: what edit/hidden.py may cut behind the last token it needs, with pictures beside them whole.
CUT_WITH_TEXT = {"input_ids", "attention_mask", "position_ids", "mm_token_type_ids"}
PICTURE_TENSORS = {"pixel_values", "image_grid_thw", "image_sizes"}
# One value per text token, and that of a token put before the prompt (judge/attacks.py).
VALUE_OF_ADDED_TOKEN = {"attention_mask": 1, "labels": -100, "subject": 0, "mm_token_type_ids": 0, "token_type_ids": 0}

# Qwen-VL. Its config has these ids (data/encoder.py); PATCHES are [patches of all pictures, ...], GRID [pictures,3] is
# how many each has, and MERGE_SIZE squared of them become one placeholder (model/batch.py, scoring/memory.py and
# cost.py).
QWEN_VL_TOKENS = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
PATCHES, GRID, MERGE_SIZE = "pixel_values", "image_grid_thw", "spatial_merge_size"
# LLaVA-NeXT and -OneVision cut a picture into crops, as many as its size asks for among the config's pinpoints;
# placeholders leave out what pads a crop, the tower does not (scoring/capture.py).
PICTURE_SIZES, CROP_SIZES = "image_sizes", "image_grid_pinpoints"
# A batch with this tensor, Mllama's, has every sample padded to the same pictures and tiles (scoring/capture.py).
PADDED_TILES = "aspect_ratio_ids"


def auto_class(config: Any) -> Any:
    """The transformers Auto class that makes this config's model: with its vision tower where it has one."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    with_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if with_images else AutoModelForCausalLM
