"""The `mipfast` command."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

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

# what several commands share
Model = Annotated[str, typer.Option(help="Model folder or Hub id; its code is never run.")]
Source = Annotated[str, typer.Option("--data", help="Benchmark: a folder of TABLE/*.parquet, or its Hub id.")]
Names = Annotated[
    str | None,
    typer.Option(help="MLLMU-Bench source with the people's names: tables of picture questions are asked in text too."),
]
Some = Annotated[
    int | None, typer.Option("--limit", min=1, help="Records of each table and modality, drawn by the seed.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Records per batch.")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="auto (the folder's), float32, bfloat16 or float16.")]
TABLES = "A table of --data, or SOURCE/TABLE for one elsewhere; may be given several times."


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
        bool,
        typer.Option(
            "--retrain",
            help="First train, from nothing, the base and for each forget set the reference that never saw its people: "
            "minutes a model.",
        ),
    ] = False,
    first_seed: Annotated[int, typer.Option(min=0, help="The first forget set.")] = 0,
) -> None:
    """Make a tiny Qwen2.5-VL forget invented people, beside every control.

    Evaluates before, locates neurons (IGI in the text tower, IFI in the vision tower), prunes them, runs RMisU, and
    evaluates what is forgotten and what is kept in text and in pictures: located neurons beside random ones, text only,
    vision only, plain RMU, and with --retrain a model that never saw the people. Runs on a CPU; one seed takes about
    two minutes.

    Baselines, attacks and ablations on the same model: docs/evidence in the source tree, made there by python
    bench/evidence.
    """
    import torch

    for module, extra in (("PIL", "data"), ("matplotlib", "eval")):
        if find_spec(module) is None:
            raise MipfastError(f"the demo needs {module}; run: pip install 'mipfast[{extra}]'")
    from mipfast.demo.report import accuracy_table, write_report
    from mipfast.demo.run import run
    from mipfast.experiment import page

    if forget not in (0.05, 0.10, 0.15):
        raise typer.BadParameter(f"{forget}: expected 0.05, 0.10 or 0.15", param_hint="--forget")
    torch.set_num_threads(1)  # two threads on shared cores were up to ten times slower than one
    _quiet_transformers()
    results = run(list(range(first_seed, first_seed + seeds)), forget, out, retrain, sys.stderr.isatty())
    write_report(results, out)
    console.print(page.terminal([accuracy_table(results), page.Bullets(results["limits"])]))
    console.print(f"{results['seconds']['all']:.0f} s. Report, pictures and edited model: [bold]{out}[/bold]")


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of finished runs or evaluations.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for report.html, report.md and the pictures.")] = Path("report"),
) -> None:
    """Compare runs: what each forgot and kept in text and in pictures, and what is wrong with it.

    Runs that differ in the seed alone become one row, mean ± sd. Beside the metrics stand the forgetting rate and the
    retention relative to the run's own vanilla model. report.html is one file with everything in it.
    """
    _report(folders, out)


@app.command()
def doctor() -> None:
    """Show versions, the GPU, and every kernel backend with the reason where one is off."""
    import torch
    from rich.table import Table

    from mipfast import __version__
    from mipfast.ops.backends import status

    table = Table("what", "found", title=f"mipfast {__version__}")
    table.add_row("python", sys.version.split()[0])
    table.add_row("torch", torch.__version__)
    for name in ("transformers", "peft", "triton", "numpy", "safetensors", "matplotlib"):
        table.add_row(name, _version(name))
    table.add_row("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
    for name, usable, reason in status():
        table.add_row(f"backend {name}", escape(("usable" if usable else "off") + (f": {reason}" if reason else "")))
    console.print(table)


@app.command()
def locate(
    model: Model,
    data: Annotated[str, typer.Option(help="JSONL file of samples, as above; with --group a benchmark.")],
    out: Annotated[Path, typer.Option(help="Folder for the scores; one that holds an unfinished run goes on.")],
    group: Annotated[list[str] | None, typer.Option(help=TABLES)] = None,
    modality: Annotated[str, typer.Option(help="Tower to score: text or vision.")] = "text",
    objective: Annotated[str, typer.Option(help="logprob, prob, log_odds or loss.")] = "logprob",
    positions: Annotated[
        str | None, typer.Option(help="last_prompt, answer, first, prompt, all, or indices such as 0,1; vision all.")
    ] = None,
    n_steps: Annotated[int | None, typer.Option(help="Quadrature nodes; text 4, vision 2.")] = None,
    top_k: Annotated[int, typer.Option(help="Neurons the path keeps per layer.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per batch.")] = 8,
    aggregate: Annotated[
        bool, typer.Option("--aggregate", help="Keep only running sums: one small file, however many samples.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first samples.")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the file, show tokens, hours and memory, and stop.")
    ] = False,
) -> None:
    """Score a model's neurons on every sample of a file.

    The file holds one JSON object a line: {"prompt": text, "answer": text} and optionally "image": a path relative to
    the file. With --group, --data is a benchmark's folder or Hub id: scored are its tables' questions with pictures for
    --modality vision, those without for text. Scored is the answer, after the prompt in the tokenizer's chat template
    where it has one. Killed at any moment, the same command goes on to the same result. mipfast.streaming.read(OUT)
    gives the Attribution.
    """
    import torch
    from transformers import AutoConfig

    from mipfast import LocateConfig
    from mipfast.data import checkpoint, load_groups
    from mipfast.data.encoder import Encoder
    from mipfast.experiment import locate_file
    from mipfast.scoring.cost import Device, Shape

    _check_dtype(dtype)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    config = LocateConfig(
        modality=modality,  # type: ignore[arg-type]  # resolved() checks both
        objective=objective,  # type: ignore[arg-type]
        positions=_positions(positions),
        n_steps=n_steps,
        top_k=top_k,
        progress=sys.stderr.isatty(),
    ).resolved()
    _quiet_transformers()
    encoder = Encoder.from_pretrained(model)
    scored: locate_file.Data = data
    if group:
        scored = [r for r in load_groups(data, group) if (r.image is not None) == (modality == "vision")]
    if dry_run:
        surveyed = locate_file.survey(encoder, scored, config, batch_size, limit)
        shape = Shape.of(AutoConfig.from_pretrained(model))
        here = Device.measured(where, torch.float32 if where == "cpu" else torch.bfloat16)
        _show_forecast(surveyed, locate_file.forecast(shape, surveyed, config, [here]))
        return
    loaded = checkpoint.load_model(model, where, dtype)
    locate_file.locate_file(
        loaded, encoder, scored, out, config, batch_size=batch_size, aggregate=aggregate, limit=limit
    )
    console.print(f"done. In Python: mipfast.streaming.read({escape(repr(str(out)))})")


@app.command()
def finetune(
    model: Model,
    data: Source,
    group: Annotated[list[str], typer.Option(help=TABLES)],
    out: Annotated[Path, typer.Option(help="Folder for OUT/model; one that holds an unfinished run goes on.")],
    names: Names = None,
    limit: Some = None,
    full: Annotated[bool, typer.Option("--full", help="Train every weight instead of LoRA.")] = False,
    rank: Annotated[int, typer.Option(help="Of LoRA.")] = 16,
    alpha: Annotated[int, typer.Option(help="Of LoRA: its scale is alpha / rank.")] = 16,
    dropout: Annotated[float, typer.Option(help="Of LoRA.")] = 0.05,
    lr: Annotated[float, typer.Option(help="Learning rate, falling linearly to 0.")] = 2e-5,
    epochs: Annotated[int, typer.Option(help="Passes over the records.")] = 5,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead of epochs.")] = None,
    batch_size: BatchSize = 4,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, one more forward pass.")
    ] = False,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Teach a model the answers of a benchmark's tables: the vanilla model.

    LoRA on every linear layer of the language model, merged at the end: OUT/model is a plain transformers folder.
    Killed at any moment, the same command goes on to the same weights.
    """
    from mipfast.data import load_groups
    from mipfast.experiment import finetune as finetuning

    _check_dtype(dtype)
    _quiet_transformers()
    config = finetuning.FinetuneConfig(
        full=full,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        lr=lr,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
        save_steps=save_steps,
        seed=seed,
    )
    records = load_groups(data, group, names=names, limit=limit, seed=seed)
    written = finetuning.finetune(model, records, out, config, device, dtype, sys.stderr.isatty())
    console.print(f"done. The model: [bold]{escape(str(written))}[/bold]")


@app.command()
def unlearn(
    model: Model,
    data: Source,
    forget: Annotated[list[str], typer.Option(help=TABLES)],
    retain: Annotated[list[str], typer.Option(help="The same, of what is to be kept.")],
    out: Annotated[Path, typer.Option(help="Folder for everything; one that holds an unfinished run goes on.")],
    general: Annotated[list[str] | None, typer.Option(help="The same, of general knowledge.")] = None,
    names: Names = None,
    limit: Some = None,
    fraction: Annotated[float, typer.Option(help="Share of each layer's neurons that is edited.")] = 0.1,
    aggregate: Annotated[str, typer.Option(help="How text neurons are chosen: snr, contrast, mean or union.")] = "snr",
    vision: Annotated[bool, typer.Option(help="Edit the vision tower too.")] = True,
    layer: Annotated[int | None, typer.Option(help="Steered text block; three fifths of the depth.")] = None,
    steering: Annotated[float, typer.Option(help="Target's length, in mean retain norms.")] = 1.0,
    alpha: Annotated[float, typer.Option(help="Weight of the retain loss, 0 to 1.")] = 0.5,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead of epochs.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the forget batches.")] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate of RMisU.")] = 3e-3,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Make a model forget one table of a benchmark and keep others: locate, prune, misdirect.

    Text questions of --forget choose text neurons (IGI), its pictures vision neurons (IFI); --retain and --general say
    what must not break. Give --limit where tables are long: locating takes a forward and backward pass per layer for
    every record. OUT/unlearn/model is a plain transformers folder, OUT/unlearn/path the neurons,
    OUT/locate their scores. Killed at any moment, the same command goes on.
    """
    from mipfast import LocateConfig, RMisUConfig
    from mipfast.experiment import pipeline
    from mipfast.experiment.config import Data, UnlearnStage

    _check_dtype(dtype)
    _quiet_transformers()
    groups = {"forget": forget, "retain": retain} | ({"general": general} if general else {})
    edit = RMisUConfig(layer=layer, steering_coeff=steering, alpha=alpha, steps=steps, epochs=epochs, lr=lr, seed=seed)
    stage = UnlearnStage(
        fraction=fraction,
        aggregate=aggregate,  # type: ignore[arg-type]  # select checks it
        rmisu=edit,
        data=Data(data, groups, names, limit),
        batch_size=batch_size,
        vision=LocateConfig("vision") if vision else None,
    )
    pipeline.unlearn_folder(model, stage, out, seed, device, dtype, sys.stderr.isatty())
    console.print(f"done. The model: [bold]{escape(str(out / 'unlearn' / 'model'))}[/bold]")


@app.command("eval")
def evaluate(
    model: Model,
    data: Source,
    group: Annotated[list[str], typer.Option("--group", "--groups", help=TABLES)],
    out: Annotated[Path, typer.Option(help="Folder for the answers; one that holds an unfinished run goes on.")],
    limit: Some = None,
    batch_size: BatchSize = 16,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 50,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Ask a model a benchmark's questions, and score what it writes and how likely it finds the answers.

    OUT/MIPFAST_SUMMARY.json holds every metric by table, modality and task, OUT/MIPFAST_EVAL.json every record's.
    Killed at any moment, the same command goes on.
    """
    from mipfast.experiment import pipeline
    from mipfast.experiment.config import Data, EvalStage

    _check_dtype(dtype)
    _quiet_transformers()
    stage = EvalStage(Data(data, {"all": group}, limit=limit), batch_size, max_new_tokens)
    judged = pipeline.evaluate_folder(model, stage, out, seed, device, dtype, sys.stderr.isatty())
    _show_metrics(judged.summary)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="The experiment, as YAML; examples/ has one.")],
    out: Annotated[str | None, typer.Option(help="Folder for everything, instead of the file's.")] = None,
    device: Device = None,
) -> None:
    """Run a whole experiment: fine-tune, locate, unlearn, evaluate before and after.

    Killed at any moment, the same command goes on; stages that are finished are skipped. OUT/summary.json holds every
    metric of both models, OUT/report/report.html shows them, OUT/finetune/model and OUT/unlearn/model are plain
    transformers folders.
    """
    from dataclasses import replace

    from mipfast.experiment import pipeline
    from mipfast.experiment.config import Experiment

    _quiet_transformers()
    experiment = Experiment.from_yaml(config)
    experiment = replace(experiment, out=out or experiment.out, device=device or experiment.device)
    pipeline.run(experiment, sys.stderr.isatty())
    _report([Path(experiment.out)], Path(experiment.out) / "report")


def _report(folders: list[Path], out: Path) -> None:
    from mipfast.experiment import comparison, page

    compared = comparison.compare(folders)
    found = comparison.parts(compared)
    written = page.write(out, compared.title, found)
    console.print(page.terminal(found))
    console.print(f"Everything, in one file: [bold]{escape(str(written))}[/bold]")


def _check_dtype(dtype: str) -> None:
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"{dtype}: expected auto, float32, bfloat16 or float16", param_hint="--dtype")


def _show_metrics(metrics: dict[str, float]) -> None:
    from rich.table import Column, Table

    table = Table(Column("metric", no_wrap=True), "value")
    for metric, value in metrics.items():
        table.add_row(metric, f"{value:.3f}")
    console.print(table)


def _positions(given: str | None) -> str | list[int] | None:
    """A name, or indices separated by commas."""
    if given is None or not given.replace(",", "").isdigit():
        return given
    return [int(index) for index in given.split(",") if index]


def _show_forecast(surveyed: Any, forecast: Any) -> None:
    from rich.table import Table

    table = Table("what", "at least", title="before the run")
    table.add_row("samples", str(surveyed.samples))
    table.add_row("tokens", str(surveyed.tokens))
    table.add_row("PFLOP", f"{forecast.flops / 1e15:.4g}")
    table.add_row("memory", f"{forecast.memory / 1e9:.3g} GB")
    for name, seconds in forecast.seconds.items():
        table.add_row(f"time on {name}", _time(seconds))
    console.print(table)


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} seconds"


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
