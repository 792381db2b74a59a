"""Artefacts on disk: tensors as safetensors, facts as JSON; files appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mipfast.errors import ArtefactError


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let write fill a temporary neighbour of path, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, lambda p: p.write_text(json.dumps(value, indent=1)))


def save_artefact(folder: str | Path, kind: str, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Write folder/kind.safetensors and folder/kind.json."""
    from safetensors.torch import save_file

    folder = Path(folder)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(folder / f"{kind}.safetensors", lambda p: save_file(contiguous, p))
    write_json(folder / f"{kind}.json", facts)


def load_artefact(
    folder: str | Path, kind: str, tensors: Sequence[str] = (), facts: Sequence[str] = ()
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_artefact` wrote; tensors and facts name what must be in it. Raises ArtefactError for a missing or
    damaged file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    paths = Path(folder) / f"{kind}.safetensors", Path(folder) / f"{kind}.json"
    for path in paths:
        if not path.is_file():
            raise ArtefactError(f"{path} is missing; expected a folder written by save_pretrained of a {kind}")
    try:
        found = load_file(paths[0]), json.loads(paths[1].read_text())
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{folder} holds a truncated or damaged {kind} ({error}); write it again") from error
    missing = [*(set(tensors) - set(found[0])), *(set(facts) - set(found[1]))]
    if missing:
        raise ArtefactError(f"{folder} holds a {kind} without {', '.join(sorted(missing))}; write it again")
    return found
