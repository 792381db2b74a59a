"""What every bench row carries (the machine, the commit), and the clock."""

import subprocess
from pathlib import Path

import pytest
import torch


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
