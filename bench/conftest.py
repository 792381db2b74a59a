"""What every bench row carries (the machine, the commit), the clock, and what the bench of whole searches writes."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser):
    group = parser.getgroup("locate")
    group.addoption("--locate-full", action="store_true", help="3 rounds, not 1, and the baselines of a minute too")
    group.addoption("--locate-json", type=Path, help="write their ratios here")
    group.addoption("--locate-scaling", type=Path, metavar="PNG", help="measure how cost scales too, and draw it here")


def pytest_configure(config):
    config.locate_rows, config.locate_scaling = [], {}


def pytest_terminal_summary(terminalreporter, config):
    rows, scaling = config.locate_rows, config.locate_scaling
    if rows:
        terminalreporter.section("whole searches: baseline / ours")
    for row in rows:
        worse = row["ratio"] > row["floor"] if row["floor"] < 1 else row["ratio"] < row["floor"]
        head = f"{row['name']:49}{row['ratio']:8.2f}   floor {row['floor']:5.4g}  target {row['target']:5.4g}"
        terminalreporter.write_line(f"{head}  {'BELOW FLOOR  ' if worse else ''}{row['note']}")
    for axis, found in scaling.items():
        terminalreporter.write_line(f"seconds against {axis} {found['sizes']}: exponents {found['exponents']}")
    if scaling:
        _draw(scaling, config.getoption("locate_scaling"))
    path = config.getoption("locate_json")
    if path and (rows or scaling):
        path.parent.mkdir(parents=True, exist_ok=True)
        machine = {"cpu": {}}
        pytest_benchmark_update_machine_info(config, machine)
        machine = machine["mipfast"] | {"cpu": _cpu(), "cores": os.cpu_count(), "load": os.getloadavg(), "threads": 1}
        path.write_text(json.dumps({"machine": machine, "rows": rows, "scaling": scaling}, indent=1) + "\n")


def _cpu():
    from cpuinfo import get_cpu_info  # pytest-benchmark's own

    return get_cpu_info().get("brand_raw", "unknown")


def _draw(scaling, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(scaling), figsize=(3.2 * len(scaling), 3), sharey=True, squeeze=False)
    for plot, (axis, found) in zip(axes[0], scaling.items(), strict=True):
        for name, times in found["seconds"].items():
            plot.loglog(found["sizes"], times, "o-", label=f"{name}: {found['exponents'][name][0]:.2f}")
        plot.set_xlabel(axis)
        plot.set_xticks(found["sizes"], [str(size) for size in found["sizes"]], minor=False)
        plot.minorticks_off()
        plot.legend(title="exponent", fontsize=8)
    axes[0][0].set_ylabel("CPU seconds")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _commit():
    here = Path(__file__).parent
    try:
        head = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=here, text=True).strip()
        changed = subprocess.check_output(["git", "status", "--porcelain", "-uno"], cwd=here, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if changed else "")


def pytest_benchmark_update_machine_info(config, machine_info):
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = None
    cuda = torch.cuda.is_available()
    machine_info["mipfast"] = {
        "commit": _commit(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if cuda else machine_info["cpu"].get("brand_raw", "cpu"),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count if cuda else None,
        "threads": torch.get_num_threads(),
    }


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def timed(benchmark, device):
    """timed(call, bytes_moved): times call() and notes GB/s and, on a GPU, the peak of allocated memory.

    On a GPU every round writes 256 MiB first, more than any L2 cache holds, and synchronises in the clock.
    """

    def run(call, bytes_moved):
        if device == "cuda":
            flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
            torch.cuda.reset_peak_memory_stats()

            def setup():
                flush.zero_()
                torch.cuda.synchronize()

            def timed_call():
                call()
                torch.cuda.synchronize()

            benchmark.pedantic(timed_call, setup=setup, rounds=50, warmup_rounds=5)
            peak = torch.cuda.max_memory_allocated() - flush.numel()
            benchmark.extra_info["peak_mib"] = round(peak / 2**20, 1)
        else:
            benchmark.pedantic(call, rounds=12, warmup_rounds=2)
        if benchmark.stats is not None:  # None under --benchmark-disable
            seconds = benchmark.stats.stats
            benchmark.extra_info["gb_per_s_median"] = round(bytes_moved / seconds.median / 1e9, 2)
            benchmark.extra_info["gb_per_s_best"] = round(bytes_moved / seconds.min / 1e9, 2)

    return run
