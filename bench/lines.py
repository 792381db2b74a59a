"""Lines of code of the package, without docstrings, comments and blanks: `python bench/lines.py [FOLDER]`."""

import ast
import io
import sys
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "mipfast"
HEART = ("ops", "model", "scoring", "edit")  # to be read in an evening, but for edit/baselines.py
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> int:
    """How many lines hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for before, one in zip([None, *node.body], node.body, strict=False):
                text = isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant) and one.value.value
                # a docstring, or the sentence under a field
                if isinstance(text, str) and (before is None or isinstance(before, ast.AnnAssign)):
                    lines.difference_update(range(one.lineno, (one.end_lineno or one.lineno) + 1))
    return len(lines)


def by_file(folder: Path = PACKAGE) -> dict[Path, int]:
    """{file, relative to the folder: its lines of code}."""
    return {path.relative_to(folder): code_lines(path.read_text()) for path in sorted(folder.rglob("*.py"))}


def heart(files: dict[Path, int]) -> int:
    """Lines of the rooms one reads first."""
    return sum(n for path, n in files.items() if path.parts[0] in HEART and path.name != "baselines.py")


if __name__ == "__main__":
    files = by_file(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE)
    for path, count in files.items():
        print(f"{count:6,} {path}")
    outside = sum(count for path, count in files.items() if path.parts[0] != "demo")
    print(f"\nwithout demo {outside:,}; heart {heart(files):,}; largest file {max(files.values()):,}")
