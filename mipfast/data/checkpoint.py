"""Models in folders: loading, saving, and the tokenizer files beside them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mipfast.errors import InputError, ModelError
from mipfast.model.families import auto_class

# files that a tokenizer, a processor or a chat template is read from
COMPANIONS = """tokenizer* vocab* merges.txt special_tokens_map.json added_tokens.json chat_template*
*processor_config.json *.model""".split()


def load_model(folder: str | Path, device: str = "cpu", dtype: str = "auto") -> nn.Module:
    """The model of a transformers folder in eval mode, with its vision tower where it has one.

    No code from the folder runs.

    Args:
        folder: a local folder or a Hub id.
        device: what torch calls it.
        dtype: of the weights: auto (as in the folder), float32, bfloat16 or float16.

    Raises:
        ModelError: where there is no model.
        InputError: for a device that torch does not have here.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from mipfast.samples import load_model
        >>> size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        >>> folder = tempfile.mkdtemp()
        >>> LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2)).save_pretrained(folder)
        >>> type(load_model(folder)).__name__
        'LlamaForCausalLM'
    """
    from transformers import AutoConfig

    check_device(device)
    auto = auto_class(_loaded(AutoConfig, folder))
    model, keys = _loaded(auto, folder, dtype=dtype, output_loading_info=True)
    if missing := sorted(keys["missing_keys"]):  # transformers draws them at random
        raise ModelError(f"{folder} has no weights for {len(missing)} tensors, such as {missing[0]}; fetch it again")
    return model.eval().to(device)


def check_device(device: str | None) -> None:
    """Raises InputError for one that torch does not have here; None is any."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={device!r} is not to be had here ({_first_sentence(error)}); expected cpu") from error


def save_model(model: Any, source: str | Path, folder: str | Path) -> None:
    """Write a plain transformers folder: weights and config, the tokenizer's and the processor's files.

    Args:
        model: a transformers model.
        source: the folder or Hub id the model came from; its tokenizer's and processor's files are copied as they are.
        folder: where to write.

    Example:
        >>> import mipfast, tempfile
        >>> from pathlib import Path
        >>> from mipfast.samples import load_model, save_model
        >>> demo = Path(mipfast.__file__).parent / "demo" / "weights" / "base"  # a small model with its tokenizer
        >>> folder = tempfile.mkdtemp()
        >>> save_model(load_model(demo), demo, folder)
        >>> sorted(file.name for file in Path(folder).glob("tokenizer*"))
        ['tokenizer.json', 'tokenizer_config.json']
    """
    if not Path(source).is_dir():
        from huggingface_hub import snapshot_download

        source = snapshot_download(str(source), allow_patterns=COMPANIONS)
    model.save_pretrained(folder)
    for pattern in COMPANIONS:
        for file in Path(source).glob(pattern):
            shutil.copyfile(file, Path(folder) / file.name)


def _loaded(auto: Any, folder: str | Path, **options: Any) -> Any:
    """Raises ModelError in place of whatever transformers, tokenizers and safetensors raise for a folder that lacks
    something or is damaged."""
    name = str(folder)
    if not Path(folder).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ModelError(f"there is no folder {name}; expected a transformers folder or Hub id")
    try:
        return auto.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:
        reason = f"{type(error).__name__}: {_first_sentence(error)}"
        raise ModelError(
            f"{folder} gives no {auto.__name__} ({reason}); expected a transformers folder or Hub id"
        ) from error


def _first_sentence(error: BaseException) -> str:
    """transformers goes on for a paragraph, and breaks its lines within a sentence."""
    return str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
