"""The `mipfast` command.

tyro makes the options: of a command's arguments, and of a config's fields, whose sentences beside them are the help. It
repeats an option for a list (--group A --group B), which jsonargparse does not, and needs no second declaration of a
field, which typer does.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, make_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from tyro.conf import DisallowNone, Fixed, Positional, Suppress, UseAppendAction, arg
from tyro.constructors import PrimitiveConstructorSpec

from mipfast.errors import InputError, MipfastError, check_installed

console = Console()

# what several commands share
Model = Annotated[str, arg(help="Model folder or Hub id; its code is never run.")]
Tables = Annotated[list[str], UseAppendAction]
TABLES = "A table of --data, or SOURCE/TABLE for one elsewhere; may be given several times."
Seed = Annotated[int, arg(help="Of everything that is drawn.")]
Device = Annotated[str | None, arg(help="cpu, cuda, cuda:1, ...; a GPU where there is one.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], arg(help="Of the weights; auto is the folder's own.")
]


def fields_of(kind: str, **changes: Any) -> Any:
    """The fields of one of mipfast's configs as options, but for changes: {field: another annotation}. The config is
    imported when its command is called, and not for the help of all."""

    def made() -> type:
        module, name = kind.rsplit(".", 1)
        config = getattr(import_module(f"mipfast.{module}"), name)
        changed = []
        for one, hint in changes.items():
            given = config.__dataclass_fields__[one]
            default = MISSING if given.default == "" else given.default  # an empty text is none: it must be given
            changed.append((one, hint, field(default=default, default_factory=given.default_factory, kw_only=True)))
        return make_dataclass(name, changed, bases=(config,), frozen=True)

    return arg(name="", constructor_factory=made)


def _positions(given: list[str]) -> str | list[int]:
    """A name, or indices separated by commas."""
    return [int(index) for index in given[0].split(",") if index] if given[0].replace(",", "").isdigit() else given[0]


HIDDEN = Suppress[Fixed[Any]]
POSITIONS = Annotated[
    Any, PrimitiveConstructorSpec(1, "NAME|0,1,..", _positions, lambda value: True, lambda value: [str(value)])
]
DATA = fields_of("experiment.config.Data", source=Annotated[str, arg(name="data")], groups=HIDDEN)


def demo(
    seeds: int = 1,
    forget: float = 0.10,
    out: Path = Path("demo-report"),
    retrain: bool = False,
    first_seed: int = 0,
    real: bool = False,
    model: str | None = None,
    facts: Path | None = None,
    yes: bool = False,
) -> None:
    """Make a tiny Qwen2.5-VL forget invented people, beside every control.

    Evaluates before, locates neurons (IGI in the text tower, IFI in the vision tower), prunes them, runs RMisU, and
    evaluates what is forgotten and what is kept in text and in pictures: located neurons beside random ones, text only,
    vision only, plain RMU, and with --retrain a model that never saw the people. Runs on a CPU; one seed takes about
    two minutes.

    Baselines, attacks and ablations on the same model: docs/evidence in the source tree, made there by python
    bench/evidence.

    With --real on a pretrained language model instead: which facts it knows, the neurons located for eight capitals, no
    more than do no harm, and what it answers without them, and without as many random ones.

    Args:
        seeds: How many forget sets to run; several give mean ± sd.
        forget: Share of the people to forget: 0.05, 0.10 or 0.15.
        out: Folder for the report, the pictures and the edited model.
        retrain: First train, from nothing, the base and for each forget set the reference that never saw its people:
            minutes a model.
        first_seed: The first forget set.
        real: The demo on a pretrained model: SmolLM2-135M-Instruct, which is fetched after a yes, or --model.
        model: With --real: a model folder, or a Hub id in the cache; nothing is downloaded.
        facts: With --real: a JSON file of facts, in the form of mipfast/demo/facts.json and with "forget".
        yes: With --real: fetch SmolLM2 without being asked.
    """
    import torch

    toy = {"--seeds": seeds != 1, "--forget": forget != 0.10, "--retrain": retrain, "--first-seed": first_seed != 0}
    pretrained = {"--model": model is not None, "--facts": facts is not None, "--yes": yes}
    if odd := [name for name, given in (toy if real else pretrained).items() if given]:
        raise InputError(
            f"{', '.join(odd)} {'with' if real else 'without'} --real; expected none of the toy's options with it, and "
            "none of its own without"
        )
    for module, extra in (("PIL", "data"), ("matplotlib", "eval")):
        check_installed("the demo", extra, module)
    torch.set_num_threads(1)  # two threads on shared cores were up to ten times slower than one
    _quiet_transformers()
    if real:
        return _real_demo(model, facts, yes, out)
    from mipfast.demo.report import accuracy_table, write_report
    from mipfast.demo.run import run
    from mipfast.experiment import page
    from mipfast.files import writing

    if forget not in (0.05, 0.10, 0.15):
        raise InputError(f"--forget {forget}; expected 0.05, 0.10 or 0.15")
    if first_seed < 0 or seeds < 1:
        raise InputError(f"--first-seed {first_seed}, --seeds {seeds}; expected at least 0, and at least 1")
    with writing(out):  # before minutes are spent
        out.mkdir(parents=True, exist_ok=True)
    results = run(list(range(first_seed, first_seed + seeds)), forget, out, retrain, sys.stderr.isatty())
    write_report(results, out)
    console.print(page.terminal([accuracy_table(results), page.Bullets(results["limits"])]))
    console.print(f"{results['seconds']['all']:.0f} s. Report, pictures and edited model: [bold]{out}[/bold]")


def report(folders: Positional[list[Path]], out: Path = Path("report")) -> None:
    """Compare runs: what each forgot and kept in text and in pictures, and what is wrong with it.

    Runs that differ in the seed alone become one row, mean ± sd. Beside the metrics stand the forgetting rate and the
    retention relative to the run's own vanilla model. report.html is one file with everything in it.

    Args:
        folders: Folders of finished runs or evaluations.
        out: Folder for report.html, report.md and the pictures.
    """
    _report(folders, out)


def _real_demo(model: str | None, facts: Path | None, yes: bool, out: Path) -> None:
    check_installed("the demo", "eval", "rouge_score", "sacrebleu")  # which what judges continuations asks for
    from mipfast.demo import facts as fact_file
    from mipfast.demo import real, real_report, smollm2
    from mipfast.experiment import page
    from mipfast.files import writing

    given = fact_file.read(facts or fact_file.SHIPPED)
    with writing(out):  # before minutes are spent
        out.mkdir(parents=True, exist_ok=True)
    folder = smollm2.cached(model) if model else _fetched(yes)
    results = real.run(folder, given, out, sys.stderr.isatty())
    real_report.write_report(results, out)
    console.print(page.terminal(real_report.shown(results)))
    console.print(f"{results['seconds']['all']:.0f} s. Report, pictures and edited model: [bold]{out}[/bold]")


def _fetched(yes: bool) -> Path:
    """SmolLM2's folder, fetched after a yes where it is not there."""
    from rich.prompt import Confirm

    from mipfast.demo import smollm2

    if not (smollm2.FOLDER / "config.json").is_file():
        console.print(f"{smollm2.WHAT}, {smollm2.FOLDER}.", highlight=False)
        if not (yes or sys.stdin.isatty() and Confirm.ask("Fetch it?", console=console)):
            raise InputError(
                f"no model in {smollm2.FOLDER}, and no yes to fetching it; expected one: give --yes, or --model with a "
                "folder of your own"
            )
        smollm2.fetch(smollm2.FOLDER)
    return smollm2.FOLDER


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


def locate(
    model: Model,
    data: str,
    out: Path,
    config: Annotated[Any, fields_of("scoring.config.LocateConfig", positions=POSITIONS, progress=HIDDEN)],
    group: Annotated[Tables, arg(help=TABLES)] = [],  # noqa: B006  # never changed
    batch_size: int = 8,
    limit: int | None = None,
    aggregate: bool = False,
    device: Device = None,
    dtype: Dtype = "auto",
    dry_run: bool = False,
) -> None:
    """Score a model's neurons on every sample of a file.

    The file holds one JSON object a line: {"prompt": text, "answer": text} and optionally "image": a path relative to
    the file. With --group, --data is a benchmark's folder or Hub id: scored are its tables' questions, for --modality
    vision those with pictures, for text those without. Scored is the answer, after the prompt in the tokenizer's chat
    template where it has one. Killed at any moment, the same command goes on to the same result.
    mipfast.streaming.read(OUT) gives the Attribution.

    Args:
        data: JSONL file of samples, as above; with --group a benchmark.
        out: Folder for the scores; one that holds an unfinished run goes on.
        batch_size: Samples per batch.
        limit: Only the first samples.
        aggregate: Keep only running sums: one small file, however many samples.
        dry_run: Check the file, show tokens, hours and memory, and stop.
    """
    import torch
    from transformers import AutoConfig

    from mipfast.data import checkpoint, load_groups
    from mipfast.data.encoder import Encoder
    from mipfast.experiment import locate_file
    from mipfast.scoring.attribution import converged
    from mipfast.scoring.cost import Device, Shape

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    config = replace(config, progress=sys.stderr.isatty()).resolved()
    _quiet_transformers()
    encoder = Encoder.from_pretrained(model)
    scored: locate_file.Samples = data
    if group:
        scored = [r for r in load_groups(data, group) if (r.image is not None) == (config.modality == "vision")]
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
    if line := converged(locate_file.read(out)):
        console.print(line)
    console.print(f"done. In Python: mipfast.streaming.read({escape(repr(str(out)))})")


def finetune(
    model: Model,
    data: Annotated[Any, DATA],
    group: Annotated[Tables, arg(help=TABLES)],
    out: Path,
    config: Annotated[Any, fields_of("experiment.finetune.FinetuneConfig", seed=HIDDEN)],
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Teach a model the answers of a benchmark's tables: the vanilla model.

    LoRA on every linear layer of the language model, merged at the end: OUT/model is a plain transformers folder.
    Killed at any moment, the same command goes on to the same weights.

    Args:
        out: Folder for OUT/model; one that holds an unfinished run goes on.
    """
    from mipfast.experiment import finetune as finetuning

    _quiet_transformers()
    records = replace(data, groups={"all": group}).all(seed)
    config = replace(config, seed=seed)
    written = finetuning.finetune(model, records, out, config, device, dtype, sys.stderr.isatty())
    console.print(f"done. The model: [bold]{escape(str(written))}[/bold]")


def unlearn(
    model: Model,
    data: Annotated[Any, DATA],
    forget: Annotated[Tables, arg(help=TABLES)],
    retain: Annotated[Tables, arg(help="The same, of what is to be kept.")],
    out: Path,
    stage: Annotated[
        Any,
        fields_of(
            "experiment.config.UnlearnStage", **dict.fromkeys(("text", "vision", "rmisu", "progress", "data"), HIDDEN)
        ),
    ],
    rmisu: Annotated[
        Any,
        fields_of(
            "edit.config.RMisUConfig",
            steering_coeff=Annotated[float, arg(aliases=["--steering"])],
            trainable=Literal["path", "down"],
            positions=POSITIONS,
            seed=Suppress[Fixed[int]],  # of Any, tyro would take its 0 for the False of progress: it caches by equality
            **dict.fromkeys(("lora_rank", "lora_alpha", "progress"), HIDDEN),
        ),
    ],
    general: Annotated[Tables, arg(help="The same, of general knowledge.")] = [],  # noqa: B006  # never changed
    vision: bool = True,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Make a model forget one table of a benchmark and keep others: locate, prune, misdirect.

    Text questions of --forget choose text neurons (IGI), its pictures vision neurons (IFI); --retain and --general say
    what must not break. Give --limit where tables are long: locating takes a forward and backward pass per layer for
    every record. OUT/unlearn/model is a plain transformers folder, OUT/unlearn/path the neurons,
    OUT/locate their scores. Killed at any moment, the same command goes on.

    Args:
        out: Folder for everything; one that holds an unfinished run goes on.
        vision: Edit the vision tower too.
    """
    from mipfast.experiment import pipeline

    _quiet_transformers()
    groups = {"forget": forget, "retain": retain} | ({"general": general} if general else {})
    changes = {} if vision else {"vision": None}
    stage = replace(stage, rmisu=replace(rmisu, seed=seed), data=replace(data, groups=groups), **changes)
    pipeline.unlearn_folder(model, stage, out, pipeline.Where(seed, device, dtype, sys.stderr.isatty()))
    console.print(f"done. The model: [bold]{escape(str(out / 'unlearn' / 'model'))}[/bold]")


def evaluate(
    model: Model,
    data: Annotated[Any, DATA],
    group: Annotated[Tables, arg(help=TABLES, aliases=["--groups"])],
    out: Path,
    stage: Annotated[Any, fields_of("experiment.config.EvalStage", data=HIDDEN)],
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Ask a model a benchmark's questions, and score what it writes and how likely it finds the answers.

    OUT/MIPFAST_SUMMARY.json holds every metric by table, modality and task, OUT/MIPFAST_EVAL.json every record's.
    Killed at any moment, the same command goes on.

    Args:
        out: Folder for the answers; one that holds an unfinished run goes on.
    """
    from mipfast.experiment import pipeline

    _quiet_transformers()
    stage = replace(stage, data=replace(data, groups={"all": group}))
    judged = pipeline.evaluate_folder(model, stage, out, pipeline.Where(seed, device, dtype, sys.stderr.isatty()))
    _show_metrics(judged.summary)


def run(config: Positional[Path], out: str | None = None, device: Device = None) -> None:
    """Run a whole experiment: fine-tune, locate, unlearn, evaluate before and after.

    Killed at any moment, the same command goes on; stages that are finished are skipped. OUT/summary.json holds every
    metric of both models, OUT/report/report.html shows them, OUT/finetune/model and OUT/unlearn/model are plain
    transformers folders.

    Args:
        config: The experiment, as YAML; examples/ has one.
        out: Folder for everything, instead of the file's.
    """
    from mipfast.experiment import pipeline
    from mipfast.experiment.config import Experiment

    _quiet_transformers()
    experiment = Experiment.from_yaml(config)
    experiment = replace(experiment, out=out or experiment.out, device=device or experiment.device)
    pipeline.run(experiment, sys.stderr.isatty())
    _report([Path(experiment.out)], Path(experiment.out) / "report")


def _report(folders: list[Path], out: Path) -> None:
    from mipfast.experiment import comparison, comparison_page, page

    compared = comparison.compare(folders)
    found = comparison_page.parts(compared)
    written = page.write(out, compared.title, found)
    console.print(page.terminal(found))
    console.print(f"Everything, in one file: [bold]{escape(str(written))}[/bold]")


def _show_help() -> None:
    from rich.table import Table

    console.print("[bold]mipfast COMMAND --help[/bold] explains a command and its options.\n")
    console.print("Find the neurons that carry a piece of knowledge in a multimodal model, and make it forget it.\n")
    table = Table.grid(padding=(0, 2))
    for name, command in COMMANDS.items():
        table.add_row(f"[bold]{name}[/bold]", str(command.__doc__).split("\n")[0])
    console.print(table)


def _show_metrics(metrics: dict[str, float]) -> None:
    from rich.table import Column, Table

    table = Table(Column("metric", no_wrap=True), "value")
    for metric, value in metrics.items():
        table.add_row(metric, f"{value:.3f}")
    console.print(table)


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


COMMANDS: dict[str, Callable[..., None]] = {
    "eval" if command is evaluate else command.__name__: command
    for command in (demo, report, doctor, locate, finetune, unlearn, evaluate, run)
}


def app(arguments: Sequence[str] | None = None) -> None:
    """Run a command line, sys.argv's where there is none. Raises what the command raises."""
    handler = RichHandler(console=console, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("mipfast").setLevel(logging.INFO)
    name, *options = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in COMMANDS:
        tyro.cli(COMMANDS[name], prog=f"mipfast {name}", args=options, config=(DisallowNone,))
    elif name in ("-h", "--help"):
        _show_help()
    else:
        raise InputError(f"there is no command {name}; expected {', '.join(COMMANDS)}")


def main() -> None:
    """Entry point: what the user can mend is one line, not a traceback."""
    try:
        app()
    except KeyboardInterrupt:
        _stop("stopped: what is finished is kept, and the same command goes on from there", 130)
    except MipfastError as error:
        _stop(f"error: {error}", 2)
    except OSError as error:  # of what is read; it names the file
        _stop(f"error: {error}; give what can be read, and run the same again: what is finished is kept", 2)


def _stop(line: str, code: int) -> None:
    shown = line.encode(errors="backslashreplace").decode()  # a file's name need not be Unicode
    console.print(f"[bold red]{escape(shown)}[/bold red]", soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
