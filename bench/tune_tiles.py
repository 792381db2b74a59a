"""Time candidate tiles of project_accumulate on this GPU and print the table entry for TILES.

    python bench/tune_tiles.py [--dry]

By hand, when a new kind of GPU turns up: the library itself never tunes. A candidate whose sums differ from the
shipped tile's is refused before it is timed; one that does not compile or fit is skipped. --dry lists the candidates
and needs no GPU.
"""

import argparse
import itertools

import torch

import mipfast_kernels.project_accumulate as kernel

# (steps, rows, H, F, groups), by the rows of tile they choose: text at a position of a few samples, text at many
# positions, Qwen2.5-VL's vision tower
SHAPES = {
    16: [(4, 4, 3584, 18944, 4), (4, 4, 2048, 11008, 4)],
    64: [(4, 16, 3584, 18944, 16), (4, 16, 2048, 11008, 16)],
    128: [(2, 1024, 1280, 3420, 1), (4, 4096, 1280, 3420, 1), (4, 1024, 3584, 18944, 1024)],
}
CANDIDATES = {
    16: list(itertools.product((16,), (32, 64, 128), (64, 128, 256), (4,), (3, 4, 5))),
    64: list(itertools.product((64,), (64, 128, 256), (32, 64, 128), (4, 8), (3, 4))),
    128: list(itertools.product((128,), (64, 128, 256), (32, 64), (4, 8), (3, 4))),
}


def inputs(shape, dtype):
    steps, rows, width, neurons, groups = shape
    return (
        torch.randn(steps, rows, width, device="cuda").to(dtype),
        torch.randn(width, neurons, device="cuda").to(dtype),
        torch.rand(steps, device="cuda"),
        torch.randn(rows, neurons, device="cuda").to(dtype),
        groups,
    )


def microseconds(tile, args, want):
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    kernel.TILES[kernel.architecture()][args[0].element_size()] = [tile]
    try:
        found = kernel.project_accumulate(*args)
    except (OutOfResources, PTXASError, CompilationError):
        return float("inf")
    for name, value, expected in zip(("s1", "s2"), found, want, strict=True):
        if (value - expected).abs().max() > 1e-5 * expected.abs().max():
            raise SystemExit(f"tile {tile} is wrong in {name}")
    return 1e3 * do_bench(lambda: kernel.project_accumulate(*args), return_mode="median")


def tune(dtype):
    shipped = kernel.TILES[kernel.architecture()][dtype.itemsize]
    best = []
    for rows, shapes in SHAPES.items():
        total = dict.fromkeys(CANDIDATES[rows], 1.0)
        for shape in shapes:
            args = inputs(shape, dtype)
            kernel.TILES[kernel.architecture()][dtype.itemsize] = shipped
            want = kernel.project_accumulate(*args)
            times = {tile: microseconds(tile, args, want) for tile in total}
            for tile, time in sorted(times.items(), key=lambda pair: pair[1])[:5]:
                rate = 2 * args[0].numel() * args[1].shape[1] / time / 1e6
                print(f"{shape}: {tile} {time:.1f} us, {rate:.0f} TFLOP/s", flush=True)
            for tile in total:  # the geometric mean over shapes decides
                total[tile] *= times[tile] / min(times.values())
        best.append(min(total, key=lambda tile: total[tile]))
    kernel.TILES[kernel.architecture()][dtype.itemsize] = shipped
    return best


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true")
    if parser.parse_args().dry:
        for rows, shapes in SHAPES.items():
            print(f"{len(CANDIDATES[rows])} tiles of {rows} rows at {shapes}: {CANDIDATES[rows]}")
    else:
        print(f"{kernel.architecture()!r}: {{2: {tune(torch.bfloat16)}}}")
