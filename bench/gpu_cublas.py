#!/usr/bin/env python3
"""Products of cuBLAS in fp16 beside which `linear_bench` of crates/gpu stands, and the memory's speed.

    gpu_cublas.py

One graph of products over copies of the weights, more of them than caches hold; the median, 10th and 90th percentile of 50
replays, over the number of products. Needs PyTorch and an NVIDIA GPU.
"""
import torch

COPIES_BYTES = 400 << 20


def median(times):
    times.sort()
    return times[len(times) // 2], times[len(times) // 10], times[len(times) * 9 // 10]


def product(k, n, m, dtype=torch.float16, repeats=50):
    copies = max(2, min(64, COPIES_BYTES // (k * n * 2) + 1))
    weights = [torch.randn(n, k, device="cuda", dtype=dtype) for _ in range(copies)]
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    linear = torch.nn.functional.linear
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            [linear(x, w) for w in weights]
    torch.cuda.synchronize()
    graph, rounds = torch.cuda.CUDAGraph(), max(1, 64 // copies)
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            [linear(x, w) for w in weights]
    for _ in range(5):
        graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (copies * rounds))
    middle, low, high = median(times)
    print(f"{dtype} {k:>6} x {n:<6} m={m:<5} {middle:8.2f} us ({low:.2f} to {high:.2f}) "
          f"{2 * k * n / middle / 1e3:7.0f} GB/s {2 * k * n * m / middle / 1e6:6.1f} TFLOP/s", flush=True)


def copy():
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    for _ in range(3):
        b.copy_(a)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        b.copy_(a)
    end.record()
    torch.cuda.synchronize()
    print(f"copy, read and written: {20 * (1 << 30) / start.elapsed_time(end) / 1e6:.0f} GB/s")


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    print(torch.__version__, torch.cuda.get_device_name(0))
    for k, n in [(4096, 14336), (4096, 4096), (2048, 1536)]:
        for m in [1, 8, 16, 64]:
            product(k, n, m)
    product(4096, 14336, 2048, torch.bfloat16, 20)
    copy()
