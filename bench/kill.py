"""Killed at random moments and resumed: is the result the same to the bit? `python bench/kill.py [--kills N]`

`mipfast locate` over a file and `mipfast run` are each started in a process of their own, which is sent SIGKILL after a
random time below the whole run's, and started again in the same folder, until it ends; then what it wrote is compared
with the folder of a run that nothing stopped, and a new folder is begun, until that many living processes were killed.
Then each is run with files limited to several sizes, as on a disk that is full, which must end in one line and exit
code 2, leave nothing half-written, and go on to the same bits when the limit is gone. Prints counts;
results/cpu/kill.json has them. Linux; some ten minutes.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # twins.py: tables and a model small enough to run often

import torch
import transformers  # imported before the processes part, which takes longer than they live
import twins
import yaml
from safetensors import safe_open
from test_pipeline import EXAMPLE, SMALL

from mipfast import cli
from mipfast.experiment import finetune, locate_file, pipeline  # noqa: F401
from mipfast.files import versions
from mipfast.judge import records

RESULT = Path(__file__).parent / "results" / "cpu" / "kill.json"
SAMPLES = 16
LIMITS = {"locate": (100, 5_000), "run": (100, 20_000, 4_000_000)}  # bytes a file may have


def start(line: list[str], limit: int | None = None) -> tuple[int, int]:
    """A process that runs a command line: its id, and what it prints."""
    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        return child, reader
    code = 1
    try:
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write fails, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sys.argv = ["mipfast", *line]
        sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def finish(line: list[str], limit: int | None = None) -> tuple[int, str]:
    """(exit code, what was printed)."""
    child, reader = start(line, limit)
    with os.fdopen(reader, errors="replace") as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def kill(line: list[str], after: float) -> bool:
    """Whether the process was still there to be killed."""
    child, reader = start(line)
    with os.fdopen(reader, errors="replace") as pipe:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)  # of one that has ended nothing comes: it is not waited for yet
        pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise SystemExit(f"{' '.join(line)} ended with {status}")
    return status != 0


def results(folder: Path) -> dict[str, object]:
    """What a run computed, file by file: tensors as bytes, answers and scores as text; not seconds or versions."""
    found: dict[str, object] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key).reshape(-1).view(torch.uint8) for key in sorted(file.keys())}
            found[name] = {key: bytes(tensor.numpy()) for key, tensor in tensors.items()}
        elif path.name.startswith(("rows-", "MIPFAST_", ".")) or path.name in ("path.json", "config.yaml"):
            found[name] = path.read_bytes().replace(os.fsencode(folder), b"")
        elif path.name == "summary.json":
            summary = json.loads(path.read_text())
            found[name] = [summary["models"], summary["neurons"]]
        else:
            found[name] = None  # that it is there
    return {name: value for name, value in found.items() if not name.startswith("report")}


def study(kind: str, line: list[str], work: Path, kills: int, rng: random.Random) -> dict[str, object]:
    """line: {} stands for the folder."""

    def into(folder: Path) -> list[str]:
        return [part.replace("{}", str(folder)) for part in line]

    whole = work / f"{kind}-whole"
    began = time.monotonic()
    code, said = finish(into(whole))
    seconds = time.monotonic() - began
    if code:
        raise SystemExit(said)
    expected, folder, number, moments, folders = results(whole), work / f"{kind}-0", 0, [], 0

    def check(folder: Path) -> None:
        code, said = finish(into(folder))
        if code or results(folder) != expected:
            other = {n for n in {*expected, *results(folder)} if expected.get(n) != results(folder).get(n)}
            raise SystemExit(f"{folder} differs after {moments}: {code} {sorted(other)} {said}")
        shutil.rmtree(folder)

    while len(moments) < kills:
        moment = rng.uniform(0, seconds)
        if kill(into(folder), moment):
            moments.append(round(moment, 3))
            print(f"{kind}: killed {len(moments)} of {kills}, after {moment:.2f} of {seconds:.2f} s", flush=True)
            continue
        check(folder)
        folders, number = folders + 1, number + 1
        folder = work / f"{kind}-{number}"
    check(folder)
    full = []
    for limit in LIMITS[kind]:
        folder = work / f"{kind}-{limit}"
        code, said = finish(into(folder), limit)
        last = said.strip().splitlines()[-1]
        half = [str(path) for path in folder.rglob(".[0-9]*.*")] if folder.exists() else []
        if code != 2 or "cannot write" not in last or "Traceback" in said or half:
            raise SystemExit(f"{kind}, files of {limit} bytes: {code}, {half}, {said}")
        check(folder)
        full.append({"bytes a file": limit, "said": last.replace(str(folder), "OUT"), "then the same bits": True})
        print(f"{kind}: files of at most {limit} bytes: {last}; then the same bits", flush=True)
    return {
        "seconds unstopped": round(seconds, 2),
        "killed": len(moments),
        "after seconds": moments,
        "folders finished and compared": folders + 1,
        "files compared": len(expected),
        "different": 0,
        "full disk": full,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a thread pool would not live through a fork
    transformers.utils.logging.disable_progress_bar()
    locate_file.CHUNK, records.CHUNK = 1, 8  # many files, so many places to be killed at
    rng = random.Random(options.seed)
    found: dict[str, object] = {"seed": options.seed, "versions": versions(), "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        demo = twins.write_model(work / "demo")
        data = work / "samples.jsonl"
        lines = [
            {"prompt": "What is the name of the person ? " * (1 + i % 3), "answer": "Oslo"} for i in range(SAMPLES)
        ]
        data.write_text("".join(json.dumps(one) + "\n" for one in lines))
        locate = f"locate --model {demo} --data {data} --out {{}} --batch-size 1 --n-steps 2 --device cpu"
        found["locate"] = study("locate", locate.split(), work, options.kills, rng)
        tables = twins.write_mllmu(work / "data", count=5)
        (tables / "bench").rename(tables / "mllmu")
        (tables / "train").rename(tables / "mllmu-train")
        (tables / "mllmu-train" / "ft_Data").rename(tables / "mllmu" / "ft_Data")
        shutil.copytree(tables / "mllmu" / "retain_95", tables / "mllmu" / "Retain_Set")
        given = yaml.safe_load(EXAMPLE.read_text().replace("data/mllmu", str(tables / "mllmu")))
        given |= {"model": str(demo), "dtype": "auto", "device": "cpu"}
        for stage, changes in SMALL.items():
            given[stage] |= changes
            if stage != "finetune":
                given[stage]["data"]["limit"] = 5
        (work / "run.yaml").write_text(yaml.safe_dump(given))
        found["run"] = study("run", f"run {work / 'run.yaml'} --out {{}}".split(), work, options.kills, rng)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    for kind in ("locate", "run"):
        one = found[kind]
        print(
            f"{kind}: {one['killed']} killed, {one['folders finished and compared']} folders, {one['different']} differ"
        )


if __name__ == "__main__":
    main()
