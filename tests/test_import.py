"""What importing mipfast may load, and who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

EDITING = {"pruning", "training", "direction", "misdirection", "baselines", "lora", "trainer"}
LOCATING = {"attribution", "path", "unlearning"} | EDITING
ENGINE = {"sites", "ffn", "windows", "capture", "prefix", "replay", "chunks", "memory", "quadrature"}

# module of mipfast (a package counts with all it holds) -> modules of mipfast it may not import
FORBIDDEN = {
    "errors": {"reference", "backend", "ops"} | ENGINE | LOCATING,
    "reference": {"backend", "ops"} | ENGINE | LOCATING,
    "backend": {"reference", "ops"} | ENGINE | LOCATING,
    "ops": ENGINE | LOCATING,
    "products": {"reference", "ops"} | ENGINE | LOCATING,
    **{name: LOCATING for name in ENGINE},
    **{name: {"attribution", "path", "replay", "unlearning"} for name in EDITING},
    **{name: ENGINE | LOCATING for name in ("evaluation", "data", "metrics", "report", "page", "comparison")},
    **{name: LOCATING for name in ("attacks", "likelihood")},
}
# these stand above locating, each on those before it
for name in ENGINE | LOCATING | {"data", "evaluation", "attacks", "likelihood"}:
    FORBIDDEN[name] = FORBIDDEN.get(name, set()) | {"cost", "samples", "streaming", "finetuning", "pipeline"}


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
    for name in FORBIDDEN.get(module, ()):
        assert not reaches(found, f"mipfast.{name}"), f"{module} may not import {name}"
    if module not in ("ops", "backend"):
        for name in ("mipfast_kernels", "mipfast._C", "triton"):
            assert not reaches(found, name), f"only ops and backend may import {name}"
    if module not in ("cli", "__main__"):
        assert not reaches(found, "mipfast.cli"), "nothing imports cli"
        if module != "integrations":
            assert not reaches(found, "mipfast.integrations"), "nothing imports integrations"


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
    heavy = "{'triton', 'transformers', 'datasets', 'matplotlib', 'PIL'}"
    assert run(f"import sys, mipfast; print(sorted({heavy} & set(sys.modules)))").strip() == "[]"


def test_everything_works_without_triton_and_extension():
    code = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
sys.modules["triton"] = sys.modules["mipfast._C"] = None
import mipfast, torch
from mipfast import backend
for _ in range(2):
    s1, s2 = mipfast.ops.riemann_accumulate(torch.ones(2, 3, 4), torch.ones(2))
print("sum", s1.sum().item(), [usable for _, usable, _ in backend.status()])
"""
    output = run(code)
    assert "sum 24.0 [True, False, False, False]" in output
    assert output.count("mipfast._C is missing") == 1
