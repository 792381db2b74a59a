"""The `mipfast` command."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from mipfast.errors import MipfastError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find the neurons that carry a piece of knowledge in a multimodal model, and make the model forget it.",
)
console = Console()


@app.callback()
def _setup() -> None:
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_path=False)],
        force=True,
    )
    logging.getLogger("mipfast").setLevel(logging.INFO)


@app.command()
def demo(
    seeds: Annotated[int, typer.Option(min=1, help="How many forget sets to run; several give mean ± sd.")] = 1,
    forget: Annotated[float, typer.Option(help="Share of the people to forget: 0.05, 0.10 or 0.15.")] = 0.10,
    out: Annotated[Path, typer.Option(help="Folder for the report, the pictures and the edited model.")] = Path(
        "demo-report"
    ),
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train the base model from nothing first (minutes).")
    ] = False,
    first_seed: Annotated[int, typer.Option(help="The first forget set; 0-2 have a retrained reference.")] = 0,
) -> None:
    """Make a tiny Qwen2.5-VL forget invented people, beside every control.

    Evaluates before, locates neurons (IGI in the text tower, IFI in the vision tower), prunes them, runs RMisU, and
    evaluates what is forgotten and what is kept in text and in pictures: located neurons beside random ones, text only,
    vision only, plain RMU, and a model that never saw the people. Runs on a CPU; one seed takes about two minutes.
    """
    import torch

    for module, extra in (("PIL", "data"), ("matplotlib", "eval")):
        if find_spec(module) is None:
            raise MipfastError(f"the demo needs {module}; run: pip install 'mipfast[{extra}]'")
    from mipfast.demo.run import run
    from mipfast.report import accuracy_table, write_report

    if forget not in (0.05, 0.10, 0.15):
        raise typer.BadParameter(f"{forget}: expected 0.05, 0.10 or 0.15", param_hint="--forget")
    torch.set_num_threads(1)  # two threads on shared cores were up to ten times slower than one
    _quiet_transformers()
    results = run(list(range(first_seed, first_seed + seeds)), forget, out, retrain, progress=sys.stderr.isatty())
    write_report(results, out)
    console.print(accuracy_table(results))
    for limit in results["limits"]:
        console.print(f"- {escape(limit)}")
    console.print(f"{results['seconds']['all']:.0f} s. Report, pictures and edited model: [bold]{out}[/bold]")


@app.command()
def doctor() -> None:
    """Show versions, the GPU, and every kernel backend with the reason where one is off."""
    import torch
    from rich.table import Table

    from mipfast import __version__
    from mipfast.backend import status

    table = Table("what", "found", title=f"mipfast {__version__}")
    table.add_row("python", sys.version.split()[0])
    table.add_row("torch", torch.__version__)
    for name in ("transformers", "peft", "triton", "numpy", "safetensors", "matplotlib"):
        table.add_row(name, _version(name))
    table.add_row("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
    for name, usable, reason in status():
        table.add_row(f"backend {name}", escape(("usable" if usable else "off") + (f": {reason}" if reason else "")))
    console.print(table)


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _quiet_transformers() -> None:
    """Loading bars and notices of a two-megabyte checkpoint say nothing to the reader of a table."""
    from transformers.utils import logging as notices

    notices.set_verbosity_error()
    notices.disable_progress_bar()


def main() -> None:
    """Entry point: a MipfastError is one line for the user, not a traceback."""
    try:
        app()
    except MipfastError as error:
        console.print(f"[bold red]error:[/bold red] {escape(str(error))}")
        sys.exit(2)


if __name__ == "__main__":
    main()
