"""To a type checker every public name has its real type, though each is loaded only when it is first asked for."""

import re
import subprocess
import sys
from pathlib import Path

import mipfast

ROOT = Path(__file__).resolve().parents[1]
# what the others are made of takes a minute to check, and their types are not ours
SETTINGS = """
[mypy]
mypy_path = {root}:{root}/kernels
[mypy-torch.*,transformers.*,numpy.*,scipy.*,sklearn.*,matplotlib.*,rich.*,PIL.*,pyarrow.*,datasets.*,tqdm.*]
follow_imports = skip
ignore_missing_imports = True
"""


def test_every_public_name_has_its_type(tmp_path):
    names = [name for name in mipfast.__all__ if name != "__version__"]
    (tmp_path / "mypy.ini").write_text(SETTINGS.format(root=ROOT))
    asks = [f"import mipfast\nfrom mipfast import {', '.join(names)}\n"]
    asks += [f"reveal_type({name})\nreveal_type(mipfast.{name})\n" for name in names]
    (tmp_path / "user.py").write_text("".join(asks))
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "user.py"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    revealed = [line.split("Revealed type is ")[1].strip('"') for line in output.splitlines() if "Revealed" in line]
    assert len(revealed) == 2 * len(names), output
    for name, (imported, attribute) in zip(names, zip(revealed[::2], revealed[1::2], strict=True), strict=True):
        assert imported == attribute and imported not in ("Any", "builtins.object"), f"{name}: {imported}"
        expected = "ModuleType" if name in ("attacks", "baselines", "ops") else "def "
        assert expected in imported, f"{name}: {imported}"
    located = revealed[2 * names.index("locate")]
    assert re.search(r"-> mipfast\.scoring\.attribution\.Attribution$", located)
    assert "mipfast.edit.neuron_path.NeuronPath" in revealed[2 * names.index("NeuronPath")]
    assert "top_k: int" in revealed[2 * names.index("LocateConfig")]


def test_it_holds_every_name_once():
    assert sorted(mipfast.__all__) == mipfast.__all__ and set(mipfast._HOMES) <= set(mipfast.__all__)
    for name in mipfast.__all__:
        assert getattr(mipfast, name) is not None
