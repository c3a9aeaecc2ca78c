#!/usr/bin/env python3
"""The CUDA C++ kernels of trellis-coded products alone, beside each other and cuBLAS.

    gpu_kernels.py check          # the kernel for sm_90a against the one for every generation
    gpu_kernels.py time [quick]   # microseconds, median (10th to 90th percentile)

Products are launched in one graph over copies of the weights, more of them than caches hold. Needs PyTorch, nvcc and a Hopper GPU.
"""
import ctypes
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent.parent / "crates/gpu/src/ops"
TEXTS = {
    "few": ["halves.cuh", "exl3/codes.cuh", "exl3/trellis.cu"],
    "trellis": ["halves.cuh", "exl3/codes.cuh", "hopper/trellis.cuh", "hopper/product.cu"],
    "plain": ["halves.cuh", "hopper/plain.cuh", "hopper/product.cu"],
}
CODEBOOKS = {"mul1": (1, 0x83DCD12D, 0), "mcg": (0, 0xCBAC1FED, 0)}
COPIES_BYTES = 400 << 20
driver = ctypes.CDLL("libcuda.so.1")
WORK = Path(tempfile.mkdtemp())


def ok(status):
    if status:
        raise RuntimeError(f"CUDA driver error {status}")


class Kernels:
    """The functions of one text, compiled for one shape."""

    known = {}

    def __init__(self, text, defines):
        self.name = WORK / f"{text}-{abs(hash((text, tuple(defines.items()))))}"
        source = "".join(f"#define {k} {v}\n" for k, v in defines.items())
        source += "".join((FOLDER / part).read_text() for part in TEXTS[text])
        self.name.with_suffix(".cu").write_text(source)
        command = ["nvcc", "-gencode", "arch=compute_90a,code=sm_90a", "-cubin", "-o", f"{self.name}.cubin", f"{self.name}.cu"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        self.functions = {}

    def launch(self, function, grid, threads, tensors, word=0):
        if function not in self.functions:
            module, handle = ctypes.c_void_p(), ctypes.c_void_p()
            ok(driver.cuModuleLoadData(ctypes.byref(module), self.name.with_suffix(".cubin").read_bytes()))
            ok(driver.cuModuleGetFunction(ctypes.byref(handle), module, function.encode()))
            self.functions[function] = handle
        values = [ctypes.c_uint64(t.data_ptr()) for t in tensors] + [ctypes.c_uint64(word)]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        ok(driver.cuLaunchKernel(self.functions[function], grid[0], grid[1], 1, threads, 1, 1, 0, stream, pointers, None))


class Matrix:
    """Random rings, with signs and scales around one."""

    def __init__(self, k, n, twice_bits, codebook="mul1", stack=1, inputs=None, outputs=None, bias=False):
        self.k, self.n, self.twice_bits, self.codebook = k, n, twice_bits, codebook
        self.inputs, self.outputs = inputs or k, outputs or n
        words = k // 16 * (n // 16) * 4 * twice_bits * stack
        self.tiles = torch.randint(-2**31, 2**31, (words,), dtype=torch.int32, device="cuda")
        self.suh = torch.randn(stack * k, device="cuda")
        self.svh = torch.randn(stack * n, device="cuda")
        self.bias = torch.randn(stack * self.outputs, device="cuda") if bias else None

    def defines(self):
        mul1, multiplier, addend = CODEBOOKS[self.codebook]
        return {"K_TILES": self.k // 16, "INPUTS": self.inputs, "TWICE_BITS": self.twice_bits, "MUL1": mul1,
                "MULTIPLIER": f"{multiplier}u", "ADDEND": f"{addend}u", "BIAS": int(self.bias is not None)}


SMS = 132


class Old:
    """`trellis.cu`."""

    def __init__(self, matrix, m, entries=0, share=1):
        self.m, self.entries = m, entries
        self.inline = m == 1 or bool(entries)
        self.tile, sets = (1, 1) if self.inline else (4, 1) if m <= 4 else (8, 2) if m <= 8 else (16, 4)
        blocks, k_tiles = matrix.n // 128, matrix.k // 16
        self.blocks, self.ranges = blocks, max(1, min(8 * SMS, blocks * k_tiles // 2))
        self.kernels = Kernels("few", matrix.defines() | {
            "MATRICES": 1, "N_TILES_0": matrix.n // 16, "N_TILES_1": 0, "N_TILES_2": 0, "OUTPUTS_0": matrix.outputs, "OUTPUTS_1": 0, "OUTPUTS_2": 0,
            "SETS": sets, "INLINE": int(self.inline), "ENTRIES": int(bool(entries)), "SHARE": share, "RANGES": self.ranges, "WARPS": 8, "NT": 4, "RESIDENT": 2})
        self.rotated = torch.empty(m * matrix.k, dtype=torch.int32, device="cuda")
        self.partial = torch.empty(-(-min(m, 64) // self.tile) * (blocks + self.ranges) * 4 * sets * 128 if not entries else m * (blocks + self.ranges) * 512, device="cuda")

    def __call__(self, matrix, x, ids, slots, out):
        none = matrix.suh
        bias = matrix.bias if matrix.bias is not None else none
        if not self.inline:
            self.kernels.launch("prepare", (matrix.k // 128, self.m), 32, [x, matrix.suh, none, none, self.rotated], self.m)
        for first in range(0, self.m, 64 if not self.entries else self.m):
            here = min(64, self.m - first) if not self.entries else self.m
            inputs = x if self.inline else self.rotated[first * matrix.k:]
            self.kernels.launch("multiply", (-(-self.ranges * 2 // 8), -(-here // self.tile)), 256,
                                [matrix.tiles, none, none, inputs, matrix.suh, none, none, ids, slots, self.partial], here)
            self.kernels.launch("finish", (self.blocks, here), 256, [self.partial, matrix.svh, none, none, bias, none, none, ids, slots, out[first * matrix.outputs:], none, none])


def columns(m, most):
    return (64, 2) if m <= 32 else (64, 1) if m <= 64 else (most, 1)


class New:
    """`product.cu` with a trellis."""

    def __init__(self, matrix, m):
        self.m = m
        self.n, self.parts = columns(m, 128 if matrix.twice_bits == 8 else 96)
        rows = self.n // self.parts
        row_tiles = -(-m // rows)
        self.ranges = min(SMS, -(-matrix.n // 256) * row_tiles * (matrix.k // 128))
        self.kernels = Kernels("trellis", matrix.defines() | {"N_TILES": matrix.n // 16, "OUTPUTS": matrix.outputs, "N": self.n, "PARTS": self.parts, "WIDTH": matrix.outputs, "BRAIN": 0})
        self.rotated = torch.empty(row_tiles * self.n * matrix.k // 2, dtype=torch.int32, device="cuda")
        self.partial = torch.empty(self.ranges * 3 * rows * 256, device="cuda")
        self.counters = torch.zeros(SMS, dtype=torch.int32, device="cuda")

    def __call__(self, matrix, x, ids, slots, out):
        bias = matrix.bias if matrix.bias is not None else matrix.suh
        self.kernels.launch("prepare", (self.m, -(-matrix.k // 512)), 128, [x, matrix.suh, self.rotated], self.m)
        self.kernels.launch("multiply", (self.ranges, 1), 640,
                            [matrix.tiles, self.rotated, matrix.svh, bias, self.partial, self.counters, out], self.m)


class Plain:
    """`product.cu` with halves, which are there already."""

    def __init__(self, k, n, m, dtype, most):
        self.m, self.k = m, k
        self.n, self.parts = columns(m, most)
        rows = self.n // self.parts
        row_tiles = -(-m // rows)
        self.ranges = min(SMS, -(-n // 256) * row_tiles * (k // 128))
        self.kernels = Kernels("plain", {
            "K_TILES": k // 16, "N_TILES": n // 16, "INPUTS": k, "OUTPUTS": n, "WIDTH": n, "N": self.n, "PARTS": self.parts, "BIAS": 0,
            "BRAIN": int(dtype == torch.bfloat16)})
        self.prepared = torch.empty(row_tiles * self.n * k // 2, dtype=torch.int32, device="cuda")
        self.partial = torch.empty(self.ranges * 3 * rows * 256, device="cuda")
        self.counters = torch.zeros(SMS, dtype=torch.int32, device="cuda")

    def __call__(self, halves, x, out):
        self.kernels.launch("prepare", (self.m, -(-self.k // 512)), 128, [x, x, self.prepared], self.m)
        self.kernels.launch("multiply", (self.ranges, 1), 640, [halves, self.prepared, x, x, self.partial, self.counters, out], self.m)


def in_order(weights):
    """`[n, k]` as the operand has it: tiles of 16 by 16, a lane's eight weights together."""
    n, k = weights.shape
    # [n tile, half of rows, group, pair of k tiles, quad, k tile, half of columns, two]
    parts = weights.reshape(n // 16, 2, 8, k // 32, 4, 2, 2, 2)
    return parts.permute(3, 5, 0, 2, 4, 6, 1, 7).contiguous()


def check():
    torch.manual_seed(1)
    cases = []
    for twice_bits, codebook in [(8, "mul1"), (8, "mcg"), *((b, "mul1") for b in range(2, 17))]:
        cases += [(512, 384, 512, 384, twice_bits, codebook, m, False) for m in ([17, 31, 60, 100, 300] if twice_bits == 8 else [20, 50, 130])]
    cases += [(640, 512, 576, 500, 8, "mul1", m, True) for m in [20, 130]]
    cases += [(4096, 1024, 4096, 1024, 8, "mul1", m, False) for m in [64, 1000]]

    def one(case):
        k, n, inputs, outputs, twice_bits, codebook, m, bias = case
        matrix = Matrix(k, n, twice_bits, codebook, 1, inputs, outputs, bias)
        return case, matrix, Old(matrix, m), New(matrix, m)

    ids = slots = torch.zeros(1, dtype=torch.int32, device="cuda")
    failed = 0
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(one, cases))
    for case, matrix, old, new in made:
        m = case[6]
        x = torch.randn(m, matrix.inputs, device="cuda")
        results = []
        for kernel in (old, new, new):
            out = torch.full((m * matrix.outputs,), float("nan"), device="cuda")
            kernel(matrix, x, ids, slots, out)
            torch.cuda.synchronize()
            results.append(out)
        a, b, again = results
        error = ((a - b).norm() / a.norm()).item()
        same = torch.equal(b, again)
        good = error < (2e-6 if new.parts == 2 else 5e-4) and same
        failed += not good
        print(f"{'ok ' if good else 'BAD'} {case} N={new.n} parts={new.parts}: {error:.2e}{'' if same else ', differs when run again'}", flush=True)
    for dtype, most, m in [(d, n, m) for d in (torch.float16, torch.bfloat16) for n in (96,) for m in (5, 40, 300)]:
        weights, x = torch.randn(384, 640, device="cuda").to(dtype), torch.randn(m, 640, device="cuda")
        plain, out = Plain(640, 384, m, dtype, most), torch.empty(m, 384, device="cuda")
        plain(in_order(weights), x, out)
        right = x.double() @ weights.double().T
        error = ((out - right).norm() / right.norm()).item()
        good = error < {1: 5e-4, 2: 2e-6}[plain.parts] * (16 if dtype == torch.bfloat16 else 1)
        failed += not good
        print(f"{'ok ' if good else 'BAD'} {dtype} m={m} N={plain.n} parts={plain.parts}: {error:.2e}", flush=True)
    sys.exit(f"{failed} differ" if failed else None)


def measure(launch, copies, rounds, repeats=30):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        [launch(c) for c in range(copies)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            [launch(c) for c in range(copies)]
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (copies * rounds))
    times.sort()
    return f"{times[len(times) // 2]:8.2f} ({times[len(times) // 10]:.2f} to {times[len(times) * 9 // 10]:.2f})"


def time(quick):
    shapes = [(4096, 14336), (4096, 4096), (2048, 1536)] if not quick else [(4096, 14336)]
    cases = []
    for k, n in shapes:
        for twice_bits, codebook in [(8, "mul1")] if quick else [(8, "mul1"), (8, "mcg"), (6, "mul1"), (4, "mul1")]:
            for m in [1, 8, 16, 32, 64, 128, 256, 512, 2048] if twice_bits == 8 and codebook == "mul1" else [1, 64]:
                cases.append((k, n, twice_bits, codebook, m, 0))
    if not quick:
        cases.append((2048, 1536, 8, "mul1", 4, 4))

    def one(case):
        k, n, twice_bits, codebook, m, entries = case
        matrix = Matrix(k, n, twice_bits, codebook, max(1, entries))
        return case, matrix, Old(matrix, m, entries), New(matrix, m) if m > 16 else None

    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(one, cases))
    for (k, n, twice_bits, codebook, m, entries), matrix, old, new in made:
        bytes_of = matrix.tiles.numel() * 4
        copies = max(2, min(64, COPIES_BYTES // bytes_of + 1)) if m <= 128 else 4
        matrices = [Matrix(k, n, twice_bits, codebook, max(1, entries)) for _ in range(copies)]
        x = torch.randn(m, k, device="cuda")
        ids = torch.arange(m, dtype=torch.int32, device="cuda") % max(1, entries)
        slots = torch.arange(max(1, entries), dtype=torch.int32, device="cuda")
        out = torch.empty(m * n, device="cuda")
        rounds = max(1, (256 if m <= 128 else 16) // copies)
        says = [f"{k:>5} x {n:<6} {twice_bits / 2} {codebook:<5} m={m:<5}{' experts' if entries else ''}"]
        for name, kernel in (("few", old), ("many", new)):
            if kernel is None or (name == "few" and m > 128):
                continue
            says.append(f"{name} {measure(lambda c: kernel(matrices[c], x, ids, slots, out), copies, rounds)}")
        if twice_bits == 8 and codebook == "mul1" and not entries:
            half = [torch.randn(n, k, device="cuda", dtype=torch.float16) for _ in range(max(2, min(copies, COPIES_BYTES // (2 * n * k) + 1)))]
            xh = x.half()
            if m > 16:
                for most in (96,):
                    plain = Plain(k, n, m, torch.float16, most)
                    says.append(f"halves {plain.n} {measure(lambda c: plain(half[c], x, out), len(half), max(1, (64 if m <= 128 else 16) // len(half)))}")
            says.append(f"cuBLAS {measure(lambda c: torch.nn.functional.linear(xh, half[c]), len(half), max(1, (64 if m <= 128 else 16) // len(half)))}")
        print("  ".join(says), flush=True)
    weights = [torch.randn(14336, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    x = torch.randn(2048, 4096, device="cuda", dtype=torch.bfloat16)
    print(f" 4096 x 14336  bf16      m=2048   cuBLAS {measure(lambda c: torch.nn.functional.linear(x, weights[c]), 4, 4)}")
    blocks = [torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2)]
    print(f"copy of 1 GiB {measure(lambda c: blocks[c].copy_(blocks[1 - c]), 2, 5)}, read and written twice that")


if __name__ == "__main__":
    SMS = torch.cuda.get_device_properties(0).multi_processor_count
    print(torch.__version__, torch.cuda.get_device_name(0), flush=True)
    check() if sys.argv[1:2] == ["check"] else time(sys.argv[2:3] == ["quick"])
