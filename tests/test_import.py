"""What importing mipfast may load, and who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mipfast

ROOT = Path(__file__).resolve().parents[1]

# The law: a folder of mipfast imports itself and folders on lower floors. The files at the top stand on the first floor
# or on the last.
FLOORS = [
    {"_version", "errors", "files"},
    {"ops"},
    {"model"},
    {"data", "scoring"},
    {"edit", "judge"},
    {"experiment"},
    {"demo", "integrations"},
    {"__init__", "__main__", "cli"},
]
TOP = FLOORS[0] | FLOORS[-1]
# other names for documented deep imports
ALIASES = {"attacks", "baselines", "cost", "evaluation", "metrics", "samples", "streaming"}
# who may import what is not everybody's
ONLY = {
    **dict.fromkeys(("mipfast_kernels", "mipfast._C", "triton"), ("ops",)),
    "tyro": ("cli",),
    "yaml": ("experiment", "integrations"),
}
# files that know less than their folder may: what they may not import
KNOW_LESS = {
    "ops/reference.py": {"mipfast.ops", "mipfast.errors"},
    "ops/backends.py": {"mipfast.ops"},
    **{
        f"edit/{name}.py": {"mipfast.scoring", "mipfast.edit.neuron_path"}
        for name in ("prune", "train", "hidden", "steering", "misdirect", "lora", "baselines")
    },
}


def imports(file):
    """Every module a file imports, anywhere in it, as dotted names ('from a import b' gives a and a.b)."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return found


def reaches(found, target):
    return any(name == target or name.startswith(target + ".") for name in found)


SOURCES = sorted(p for p in (ROOT / "mipfast").rglob("*.py"))


def module_of(file):
    return file.relative_to(ROOT / "mipfast").with_suffix("").parts[0]


@pytest.mark.parametrize("file", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(file):
    found, module = imports(file), module_of(file)
    floor = next((i for i, names in enumerate(FLOORS) if module in names), len(FLOORS) - 1)
    for i, names in enumerate(FLOORS[floor:], floor):
        for name in names - {module, "__init__"} - (TOP if i == floor else set()):
            assert not reaches(found, f"mipfast.{name}"), f"{module} (floor {floor}) may not import {name} ({i})"
    for name in ALIASES if module != "__init__" else ():
        assert not reaches(found, f"mipfast.{name}"), f"mipfast.{name} is for users; import what it stands for"
    for name in KNOW_LESS.get(str(file.relative_to(ROOT / "mipfast")), ()):
        assert not reaches(found, name), f"{file.stem} may not import {name}"
    for name, rooms in ONLY.items():
        assert module in rooms or not reaches(found, name), f"only {' and '.join(rooms)} may import {name}"


def test_the_top_holds_folders_and_little_else():
    top = {path.stem for path in (ROOT / "mipfast").glob("*.py")}
    assert top == TOP | ALIASES
    for name in ALIASES:
        assert len((ROOT / "mipfast" / f"{name}.py").read_text().splitlines()) <= 5
    assert not {path.name for path in (ROOT / "mipfast").iterdir()} & set(mipfast._HOMES), "it would hide the function"


def test_deep_imports_leave_the_public_names_what_they_are():
    run("""
import importlib, pkgutil, types
import mipfast
for module in pkgutil.walk_packages(mipfast.__path__, "mipfast."):
    if module.name not in ("mipfast._C", "mipfast.__main__"):
        importlib.import_module(module.name)
for name in mipfast.__all__:
    if name not in ("__version__", "attacks", "baselines", "ops"):
        assert callable(getattr(mipfast, name)), name
for name in mipfast.ops.__all__:
    assert callable(getattr(mipfast.ops, name)), name
for name in ("attacks", "baselines", "cost", "data", "evaluation", "metrics", "ops", "samples", "streaming"):
    assert isinstance(getattr(mipfast, name), types.ModuleType), name
""")


@pytest.mark.parametrize("file", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: p.stem)
def test_kernels_know_nothing_of_mipfast(file):
    outside = {name.split(".")[0] for name in imports(file)} - {"torch", "triton", "mipfast_kernels"}
    assert not outside - sys.stdlib_module_names


def test_csrc_knows_nothing_of_torch():
    for file in (ROOT / "csrc").iterdir():
        includes = [line for line in file.read_text().splitlines() if line.startswith("#include")]
        assert not any(word in line for line in includes for word in ("torch", "ATen", "c10"))


def test_nothing_shadows_another_package_from_the_checkout():
    # Hugging Face's `kernels`, which transformers imports, would be replaced by ours for whoever stands here
    assert not (ROOT / "kernels" / "__init__.py").exists()
    # pytest would put the checkout on sys.path, and its mipfast, without _C, before an installed one
    assert not (ROOT / "conftest.py").exists()


def test_every_source_folder_is_a_package():
    # setup.py finds packages by __init__.py: a folder without one works in the checkout and is missing in the wheel
    for file in SOURCES:
        assert (file.parent / "__init__.py").exists(), f"{file.parent.name} would not be installed"


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_is_light():
    heavy = "{'triton', 'transformers', 'datasets', 'matplotlib', 'PIL', 'tyro', 'yaml'}"
    assert run(f"import sys, mipfast; print(sorted({heavy} & set(sys.modules)))").strip() == "[]"


def test_everything_works_without_triton_and_extension():
    code = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
sys.modules.update(dict.fromkeys(("triton", "mipfast._C", "tyro")))
import mipfast, torch
from mipfast.ops import backends
for _ in range(2):
    s1, s2 = mipfast.ops.riemann_accumulate(torch.ones(2, 3, 4), torch.ones(2))
print("sum", s1.sum().item(), [usable for _, usable, _ in backends.status()])
"""
    output = run(code)
    assert "sum 24.0 [True, False, False, False]" in output
    assert output.count("mipfast._C is missing") == 1
