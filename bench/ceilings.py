"""What this device can do at most: copy bandwidth and bf16 matmul rate, as one line of JSON."""

import argparse
import json
import statistics
import time

import torch


def median_seconds(call, device, rounds):
    times = []
    for _ in range(rounds + 3):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--mib", type=int, default=1024, help="size of the copied buffer")
    parser.add_argument("--matmul", type=int, default=8192, help="side of the square matrices")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    source = torch.zeros(args.mib * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), device, args.rounds)

    a = torch.randn(args.matmul, args.matmul, device=device).to(torch.bfloat16)
    b = torch.randn(args.matmul, args.matmul, device=device).to(torch.bfloat16)
    matmul = median_seconds(lambda: a @ b, device, args.rounds)

    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                "torch": torch.__version__,
                "copy_gb_per_s": round(2 * source.numel() / copy / 1e9, 1),
                "bf16_matmul_tflop_per_s": round(2 * args.matmul**3 / matmul / 1e12, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
