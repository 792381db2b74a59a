"""What every bench row carries: the machine and its limits, the commit, the clock; and the tables at the end."""

import itertools
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import ceilings  # noqa: E402
import shapes  # noqa: E402
from accuracy import assert_accurate  # noqa: E402
from compare import slim, table  # noqa: E402

from mipfast import ops  # noqa: E402
from mipfast.ops import reference  # noqa: E402


def pytest_addoption(parser):
    group = parser.getgroup("locate")
    group.addoption("--locate-full", action="store_true", help="5 rounds, not 1, and the baselines of a minute too")
    group.addoption("--locate-json", type=Path, help="write their ratios here")
    group.addoption("--large-dry", action="store_true", help="test_bench_large.py at toy sizes, a walk only")
    group.addoption("--locate-scaling", type=Path, metavar="PNG", help="measure how cost scales too, and draw it here")


def pytest_configure(config):
    config.locate_rows, config.large_rows, config.locate_scaling = [], [], {}
    config.op_rows, config.limits = [], None
    if not shapes.GPU:
        config.option.benchmark_timer = "time.process_time"  # a busy neighbour stretches the wall clock


def pytest_terminal_summary(terminalreporter, config):
    if config.op_rows:
        terminalreporter.section("ops")
        terminalreporter.write_line(table(config.op_rows))
    rows, scaling = config.locate_rows, config.locate_scaling
    if rows:
        terminalreporter.section("whole searches: baseline / ours")
    for row in rows:
        terminalreporter.write_line(_search(row))
    if config.large_rows:
        terminalreporter.section("whole searches at 3B and 7B: baseline / ours")
    for row in config.large_rows:
        for line in _large(row):
            terminalreporter.write_line(line)
    for axis, found in scaling.items():
        terminalreporter.write_line(f"seconds against {axis} {found['sizes']}: exponents {found['exponents']}")
    if scaling:
        _draw(scaling, config.getoption("locate_scaling"))
    path = config.getoption("locate_json")
    if path and (rows or config.large_rows or scaling):
        path.parent.mkdir(parents=True, exist_ok=True)
        machine = {"cpu": {}}
        pytest_benchmark_update_machine_info(config, machine)
        machine = machine["mipfast"] | {"cpu": _cpu(), "cores": os.cpu_count(), "load": os.getloadavg(), "threads": 1}
        found = {"machine": machine, "rows": rows, "large": config.large_rows, "scaling": scaling}
        path.write_text(json.dumps(found, indent=1) + "\n")


def _search(row):
    goals, floor = "", row["floor"]
    if floor:
        missed = row["ratio"] > floor if row["name"].startswith("memory") else row["ratio"] < floor
        goals = f"floor {floor:5.4g}  target {row['target']:5.4g}{'  BELOW FLOOR' if missed else ''}"
    return f"{row['name']:48}{row['ratio']:8.2f}   {goals:29}  {row['note']}"


def _large(row):
    """The lines of a row of test_bench_large.py; one whose call was not profiled has the first three."""

    def missed(yes):
        return "  MISSED" if yes else ""

    ratio, target, over, most = (row[key] for key in ("ratio", "target", "over_floor", "over_floor_target"))
    yield f"{row['name']:66}{ratio:8.2f}   target {target}{missed(ratio < target)}"
    yield f"    {over:.2f}x the cost model's floor   target {most}{missed(over > most)}"
    yield (
        f"    {row['released_seconds']:.3f} s / {row['seconds']:.4f} s a sample; {row['flop_per_s'] / 1e12:.4g} TFLOP/s"
        f" = {row['matmul_share']:.1%} of a large product's; error {row['error']:.2e}, native replay's"
        f" {row['native_error']:.2e}, path shared {row['path_shared']:.0%}"
    )
    if "kernels" in row:
        yield (
            f"    no kernel {row['launch_gaps']:.0%} of the time; peak {row['peak_gib']:.1f} GiB, cost model"
            f" {row['modelled_gib']:.1f}"
        )
        for kernel, share in row["kernels"].items():
            yield f"    {share:6.1%}  {kernel[:100]}"


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


def _driver():
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.check_output(command, text=True).split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


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
        "driver": _driver() if cuda else None,
        "limits": config.limits,
        "threads": torch.get_num_threads(),
    }


def pytest_benchmark_update_json(output_json):
    slim(output_json)


@pytest.fixture(scope="session")
def limits(pytestconfig):
    """What this machine can do at most, measured once: {"copy": bytes/s, "fp32": FLOP/s, "bf16": FLOP/s}."""
    pytestconfig.limits = ceilings.measured(shapes.DEVICE)
    return pytestconfig.limits


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def choice():
    with ExitStack() as entered:
        yield entered


@pytest.fixture
def measure(benchmark, pytestconfig, limits, request, choice):
    """measure(op, provider, inputs, options, eager=, compiled=, moved=, flops=0, through=identity): asserts that the
    provider computes the op, times it, and adds a row to the table.

    inputs: tensors by name, of the dtype measured; options: the op's other arguments. eager and compiled: plain
    functions of both. through(function) is what is run, where that is more than the function. moved: bytes that have
    to be read and written; flops: operations that have to be done. A kernel and the reference are held to the
    design's accuracy rule, baselines to 2 % of the largest value (in bfloat16 they round where a kernel does not).

    Rounds alternate with eager's, so that both meet the same machine. CPU: one thread, process time. GPU: 256 MiB
    written before each round, more than any L2 holds, and a synchronisation in the clock.
    """

    def run(op, provider, inputs, options, *, eager, compiled, moved, flops=0, through=lambda function: function):
        def call_of(function, **tensors):
            return lambda: through(function)(**(tensors or inputs), **options)

        call = _call(op, provider, call_of, eager, compiled)
        if provider in shapes.KERNELS:
            choice.enter_context(ops.backend(provider))  # out here: choosing it is no part of the op
        benchmark.group = f"{op} {request.node.callspec.id.removeprefix(provider + '-')} {shapes.DEVICE}"
        reference_op = getattr(reference, op, eager)  # plain torch may be the reference
        gold = call_of(reference_op, **{name: tensor.double() for name, tensor in inputs.items()})()
        eager32 = call_of(reference_op, **{name: tensor.float() for name, tensor in inputs.items()})()
        for found, exact, ordinary in zip(*map(_listed, (call(), gold, eager32)), strict=True):
            if provider == "reference" or provider in shapes.KERNELS:
                assert_accurate(found, exact, ordinary, provider)
            else:
                assert (found.double() - exact).abs().max() <= 0.02 * exact.abs().max(), f"{provider} is wrong"
        del gold, eager32
        extra = benchmark.extra_info
        extra["peak_mib"] = round(_peak_bytes(call) / 2**20, 1)
        baseline, timed, eager_seconds = _alone(call_of(eager)), _alone(call), []
        if shapes.GPU:
            flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")

        def setup():
            start = benchmark._timer()
            baseline()
            eager_seconds.append(benchmark._timer() - start)
            if shapes.GPU:
                flush.zero_()
                torch.cuda.synchronize()

        start = benchmark._timer()
        timed()
        rounds = min(max(int(0.2 / (benchmark._timer() - start + 1e-9)), 3), 100)
        benchmark.pedantic(timed, setup=setup, rounds=rounds, warmup_rounds=1)
        if benchmark.stats is None:  # under --benchmark-disable
            return
        seconds = benchmark.stats.stats.median
        extra["times_eager"] = round(statistics.median(eager_seconds[1:]) / seconds, 2)
        extra["gb_per_s"] = round(moved / seconds / 1e9, 2)
        extra["share_of_copy"] = round(moved / seconds / limits["copy"], 3)
        if flops:
            rate = limits["bf16" if next(iter(inputs.values())).dtype == torch.bfloat16 else "fp32"]
            extra["tflop_per_s"] = round(flops / seconds / 1e12, 3)
            extra["share_of_matmul"] = round(flops / seconds / rate, 3)
        pytestconfig.op_rows.append(dict(group=benchmark.group, provider=provider, seconds=seconds, **extra))

    return run


def _call(op, provider, call_of, eager, compiled):
    if provider == "eager":
        return call_of(eager)
    if provider == "reference":
        return call_of(getattr(reference, op))
    if provider.startswith("compile-"):
        torch._dynamo.reset()
        return call_of(torch.compile(compiled[provider.removeprefix("compile-")], dynamic=False))
    return call_of(getattr(ops, op))


def _listed(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _alone(call):
    """Keeps no result, as the next round's would then need another buffer, and waits for the GPU."""

    def run():
        call()
        if shapes.GPU:
            torch.cuda.synchronize()

    return run


def _peak_bytes(call):
    """The most that a call holds at once beyond its inputs: what it allocates through torch."""
    if shapes.GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes), default=0)
