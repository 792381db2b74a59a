"""What this device can do at most: copy bandwidth and matmul rates, as one line of JSON."""

import argparse
import json
import statistics
import time

import torch


def median_seconds(call, device, rounds):
    clock = time.perf_counter if device == "cuda" else time.process_time
    times = []
    for _ in range(rounds + 3):
        if device == "cuda":
            torch.cuda.synchronize()
        start = clock()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return statistics.median(times[3:])


def measured(device, rounds=10, mib=None, matmul=None):
    """{"copy": bytes per second, read and written; "fp32", "bf16": FLOP per second of a square product}."""
    mib = mib or (1024 if device == "cuda" else 256)
    matmul = matmul or (8192 if device == "cuda" else 1024)
    source = torch.zeros(mib * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"copy": 2 * source.numel() / median_seconds(lambda: target.copy_(source), device, rounds)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(matmul, matmul, device=device).to(dtype) for _ in range(2))
        found[name] = 2 * matmul**3 / median_seconds(lambda a=a, b=b: a @ b, device, rounds)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--mib", type=int, help="size of the copied buffer")
    parser.add_argument("--matmul", type=int, help="side of the square matrices")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = measured(device, args.rounds, args.mib, args.matmul)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    rates = {f"{dtype}_matmul_tflop_per_s": round(found[dtype] / 1e12, 2) for dtype in ("fp32", "bf16")}
    copy = round(found["copy"] / 1e9, 1)
    print(json.dumps({"device": name, "torch": torch.__version__, "copy_gb_per_s": copy, **rates}))


if __name__ == "__main__":
    main()
