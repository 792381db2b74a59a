"""Artefacts on disk: tensors as safetensors, facts as JSON; files appear whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mipfast._version import __version__
from mipfast.errors import ArtefactError

RUN = "run.json"


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let write fill a temporary neighbour of path, a file or a folder, then rename it into place. A folder must not be
    there yet."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            _remove(temporary)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises ArtefactError in place of whatever a full disk, a missing permission or a name that cannot be makes
    Python, safetensors and torch.save raise."""
    try:
        yield
    except (OSError, UnicodeEncodeError, SafetensorError, RuntimeError) as error:
        if type(error) is RuntimeError and "inline_container" not in str(error):  # torch.save names no disk
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ArtefactError(
            f"cannot write {path} ({reason}); make room or give another folder, and run the same again: what is "
            "finished is kept"
        ) from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, lambda p: p.write_text(json.dumps(value, indent=1)))


def read_json(path: Path, remedy: str = "remove it and run the same again") -> dict[str, Any]:
    """An object that `write_json` wrote. Raises ArtefactError for a missing, unreadable or damaged file."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise ArtefactError(f"{path} holds {type(value).__name__}, expected a JSON object; {remedy}")
    return value


def parse_json(text: str) -> Any:
    """Raises ValueError for whatever is no JSON, what is nested too deep included."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


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
    from safetensors.torch import load_file

    paths = Path(folder) / f"{kind}.safetensors", Path(folder) / f"{kind}.json"
    for path in paths:
        if not os.path.isfile(path):  # which no name makes raise
            raise ArtefactError(f"{path} is missing; expected a folder written by save_pretrained of a {kind}")
    try:
        found = load_file(paths[0]), parse_json(paths[1].read_text())
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtefactError(f"{folder} holds a truncated or damaged {kind} ({error}); write it again") from error
    missing = [*(set(tensors) - set(found[0])), *(set(facts) - set(found[1]))]
    if missing:
        raise ArtefactError(f"{folder} holds a {kind} without {', '.join(sorted(missing))}; write it again")
    return found


def claim(folder: Path, identity: dict[str, Any], facts: dict[str, Any] | None = None) -> None:
    """Make the folder this run's by writing run.json, or see that it is and clear what a killed process left behind.

    identity: what the results depend on; facts are written beside it and not compared. Raises ArtefactError where the
    folder is another run's."""
    check_folder(folder)
    identity = json.loads(json.dumps(identity))  # as it will be read back
    if (found := read_run(folder)) is not None:
        clear_left_over(folder)
        differs = next((name for name, wanted in identity.items() if found.get(name) != wanted), None)
        if differs is None:
            return
        if [*folder.iterdir()] != [folder / RUN]:  # a run that made nothing claims nothing
            had, wanted = found.get(differs), identity[differs]
            if isinstance(had, dict) and differs == "config":  # only the settings that differ
                names = [key for key in wanted if had.get(key) != wanted[key]]
                had, wanted = ({key: settings.get(key) for key in names} for settings in (had, wanted))
            raise ArtefactError(
                f"{folder} holds a run with another {differs}: found {had}, this run has {wanted}; "
                "give another folder, or what the first run was given"
            )
    write_json(folder / RUN, identity | (facts or {}))


def clear_left_over(folder: Path) -> None:
    """Remove what a killed process was writing into the folder and could not remove."""
    for left_over in folder.glob(".[0-9]*.*"):
        _remove(left_over)


def check_folder(folder: Path) -> None:
    """Raises ArtefactError where a file, or a link to nothing, stands in a folder's place."""
    if os.path.lexists(folder) and not os.path.isdir(folder):
        kind = "a file" if os.path.exists(folder) else "a link to nothing"
        raise ArtefactError(f"{folder} is {kind}; expected a folder, or a name that is free")


def read_run(folder: Path) -> dict[str, Any] | None:
    """What `claim` wrote, or None in a folder that nobody claimed."""
    path = folder / RUN
    return read_json(path, "remove the folder and run again") if os.path.exists(path) else None


def versions() -> dict[str, str]:
    """Of what is loaded and a number may depend on."""
    found = {"python": sys.version.split()[0], "mipfast": __version__, "torch": torch.__version__}
    loaded = {name: sys.modules.get(name) for name in ("transformers", "triton", "numpy")}
    return found | {name: module.__version__ for name, module in loaded.items() if module}


def machine() -> dict[str, Any]:
    """What the seconds depend on."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"platform": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), **gpu}
