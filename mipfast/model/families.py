"""What is known of model families."""

from __future__ import annotations

from typing import Any


def auto_class(config: Any) -> Any:
    """The transformers Auto class that makes this config's model: with its vision tower where it has one."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    with_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if with_images else AutoModelForCausalLM
