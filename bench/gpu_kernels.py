#!/usr/bin/env python3
"""The CUDA C++ kernels of trellis-coded products alone, beside each other and cuBLAS.

    gpu_kernels.py check [few|wgmma|mma]   # against products in f64 with weights decoded by PyTorch; all kernels, or one
    gpu_kernels.py time [few|many]         # microseconds, median (10th to 90th percentile); `few` rows alone are done in ten seconds

Kernels are `few` (`trellis.cu`) and two for many rows: `wgmma`, which only Hopper has, and `mma`. Products are launched in one graph over copies of
the weights, more of them than caches hold, each of which starts while the last one ends. Needs PyTorch, nvcc and a GPU from sm_80 on.
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
    "few": ["ptx.cuh", "halves.cuh", "exl3/codes.cuh", "exl3/trellis.cu"],
    "trellis": ["ptx.cuh", "halves.cuh", "exl3/codes.cuh", "gemm/trellis.cuh", "gemm/common.cuh", "gemm/warpgroups.cuh", "gemm/wgmma.cu", "gemm/mma.cu"],
    "plain": ["ptx.cuh", "halves.cuh", "gemm/plain.cuh", "gemm/common.cuh", "gemm/warpgroups.cuh", "gemm/wgmma.cu", "gemm/mma.cu"],
}
CODEBOOKS = {"mul1": (1, 0x83DCD12D, 0), "mcg": (0, 0xCBAC1FED, 0), "3inst": (0, 89226354, 64248484)}
COPIES_BYTES = 400 << 20
MOST_PAIRS, RESIDENT = 32, 2
driver = ctypes.CDLL("libcuda.so.1")
WORK = Path(tempfile.mkdtemp())


def ok(status):
    if status:
        raise RuntimeError(f"CUDA driver error {status}")


class Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [("id", ctypes.c_uint32), ("pad", ctypes.c_uint32), ("value", ctypes.c_uint32), ("rest", ctypes.c_uint32 * 15)]


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")]
    _fields_ += [("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(Attribute)), ("count", ctypes.c_uint32)]


# A launch may start before the one before it has ended, as the engine's do, from a generation on.
PROGRAMMATIC_STREAM_SERIALIZATION, OVERLAPPING = 6, 90


class Kernels:
    """The functions of one text, compiled for one shape."""

    known = {}

    def __init__(self, text, defines):
        self.name = WORK / f"{text}-{abs(hash((text, tuple(defines.items()))))}"
        source = "".join(f"#define {k} {v}\n" for k, v in defines.items())
        source += "".join((FOLDER / part).read_text() for part in TEXTS[text])
        self.name.with_suffix(".cu").write_text(source)
        command = ["nvcc", f"-arch=sm_{GENERATION}", "-cubin", "-o", f"{self.name}.cubin", f"{self.name}.cu"]
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
        overlap = Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
        config = Config(grid[0], grid[1], 1, threads, 1, 1, 0, stream, ctypes.pointer(overlap), int(GENERATION.rstrip("a")) >= OVERLAPPING)
        ok(driver.cuLaunchKernelEx(ctypes.byref(config), self.functions[function], pointers, None))


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

    def decoded(self, slot):
        """`[k, n]`, by the definition of the format."""
        bits = 128 * self.twice_bits
        tiles = self.k // 16 * (self.n // 16)
        words = self.tiles.view(-1, tiles, bits // 32)[slot].long() & 0xFFFFFFFF
        position = torch.arange(256, device="cuda")
        first = ((position // 8 * 8 * self.twice_bits + (position % 8 + 1) * self.twice_bits) // 2 - 16) % bits
        high, low = words[:, first // 32], words[:, (first // 32 + 1) % (bits // 32)]
        states = ((high << 32 | low) >> (48 - first % 32)) & 0xFFFF
        mul1, multiplier, addend = CODEBOOKS[self.codebook]
        made = (states * multiplier + addend) & 0xFFFFFFFF
        if mul1:
            total = sum(made >> shift & 0xFF for shift in (0, 8, 16, 24))
            values = ((1024 + total).float() * 0.00676727294921875 - 10.3828125).half()
        else:
            made = (made & 0x8FFF8FFF) ^ 0x3B603B60
            halves = [(made >> shift & 0xFFFF).to(torch.int32).to(torch.int16).view(torch.float16) for shift in (0, 16)]
            values = halves[0] + halves[1]
        lane, j = position // 8, position % 8
        row, column = lane % 4 * 2 + j % 2 + j % 4 // 2 * 8, lane // 4 + j // 4 * 8
        placed = torch.empty(tiles, 16, 16, device="cuda", dtype=torch.float64)
        placed[:, row, column] = values.double()
        return placed.view(self.k // 16, self.n // 16, 16, 16).permute(0, 2, 1, 3).reshape(self.k, self.n)

    def product(self, x, slot=0):
        padded = torch.zeros(len(x), self.k, device="cuda", dtype=torch.float64)
        padded[:, : self.inputs] = x
        signs = torch.tensor([[(-1) ** bin(i & j).count("1") for j in range(128)] for i in range(128)], device="cuda", dtype=torch.float64) / 128**0.5
        turned = ((padded * self.suh.view(-1, self.k)[slot]).view(len(x), -1, 128) @ signs).view(len(x), -1)
        sums = ((turned @ self.decoded(slot)).view(len(x), -1, 128) @ signs).view(len(x), -1) * self.svh.view(-1, self.n)[slot]
        return sums[:, : self.outputs] + (0 if self.bias is None else self.bias.view(-1, self.outputs)[slot])


# Multiprocessors of the device, and what kernels are compiled for.
SMS, GENERATION = 132, "90a"


def sorted_entries(kernel, ids, experts):
    """Entries by their experts, and expert, first and rows of every tile."""
    order, table, first = torch.argsort(ids, stable=True).int(), [], 0
    for expert, count in enumerate(torch.bincount(ids, minlength=experts).tolist()):
        table += [(expert, first + at, min(kernel.grouped, count - at)) for at in range(0, count, kernel.grouped)]
        first += count
    table += [(0, 0, 0)] * (kernel.tiles - len(table))
    return order, torch.tensor(table, dtype=torch.int32, device="cuda")


class Few:
    """`trellis.cu`: rows of one matrix, or entries with a matrix each, of one stack or of two; by their matrices where a tile's rows are given."""

    def __init__(self, matrix, m, entries=0, share=1, matrices=1, grouped=0):
        self.m, self.matrices, self.grouped = m, matrices, grouped
        self.inline = not grouped and (m == 1 or bool(entries))
        slim = matrix.codebook != "mul1" or matrix.twice_bits not in (2, 4, 6, 8)
        if self.inline or (grouped or m) <= 4:
            self.tile, sets, tiles = 1 if self.inline else 4, 1, 4 if slim else 8
        else:
            self.tile, sets, tiles = 8, 2, 2 if slim else 4
        self.tiles = min(m, entries + m // grouped) if grouped else -(-m // self.tile)
        blocks, pairs, wide = matrices * matrix.n // 128, matrix.k // 32, tiles
        together = self.tiles if grouped else m
        # Blocks of columns beside each other: so many that few inputs are rotated by more than one block of threads.
        beside = 1
        while self.inline and not entries and beside < wide and blocks * pairs > MOST_PAIRS * RESIDENT * SMS * beside and (matrices == 1 or matrix.n // 128 % (2 * beside) == 0):
            beside *= 2
        shares, bands = wide // beside, -(-blocks // beside)
        units = bands * pairs
        wanted = blocks * shares * max(-(-pairs // 64) if self.inline else 1, 12 * SMS // (blocks * shares * together)) if entries else RESIDENT * shares * SMS
        if self.inline and not entries:
            wanted *= -(-units * shares // (48 * wanted))
        self.ranges = min(units, max(wanted, -(-units // max(1, pairs * 3 // 4))))
        longest = shares * -(-units // self.ranges)
        touched, groups = (longest + pairs - 2) // pairs + 1, (longest + 2) // 4 + 1
        self.blocks, self.groups = blocks, -(-self.ranges // shares)
        widths = {f"{name}_{i}": value if i < matrices else 0 for i in range(3) for name, value in (("N_TILES", matrix.n // 16), ("OUTPUTS", matrix.outputs))}
        self.kernels = Kernels("few", matrix.defines() | widths | {
            "MATRICES": matrices, "SETS": sets, "INLINE": int(self.inline), "ENTRIES": int(bool(entries)), "GROUPED": int(bool(grouped)), "SHARE": share,
            "RANGES": self.ranges, "NT": tiles, "BESIDE": beside, "TOUCHED": touched, "GROUPS": groups, "RESIDENT": RESIDENT})
        self.step = max(1, (6 << 20) // ((blocks + self.ranges) * self.tile * 128)) if grouped else 64 // self.tile
        self.prepared = torch.empty(matrices * m * matrix.k, dtype=torch.int32, device="cuda")
        self.partial = torch.empty(self.step * (blocks + self.ranges) * self.tile * 128, device="cuda")
        self.left = torch.full((max(1, m) * (bands + self.groups) * beside * 128,), -1, dtype=torch.int32, device="cuda")

    def __call__(self, matrix, x, ids, slots, out, by_expert=None):
        none = matrix.suh
        bias = matrix.bias if matrix.bias is not None else none
        each = [[array] * 3 for array in (matrix.tiles, matrix.suh, matrix.svh, bias)]
        tiles, suh, svh, biases = each
        outs = [out[i * self.m * matrix.outputs:] if i < self.matrices else none for i in range(3)]
        if self.inline:
            self.kernels.launch("multiply", (self.groups, self.m), 256, [*tiles, x, none, *suh, *svh, *biases, ids, none, slots, self.left, *outs])
            return
        self.kernels.launch("prepare", (matrix.k // 128, self.matrices * self.m), 32, [x, none, *suh, ids, slots, self.prepared], self.m)
        words = matrix.k // 2 + matrix.k // 32 + matrix.k // 128 if CODEBOOKS[matrix.codebook][0] else matrix.k
        order, table = by_expert or (none, none)
        for done in range(0, self.tiles, self.step):
            here = min(self.step, self.tiles - done)
            if self.grouped:
                table_here, inputs, rows, finished, to = table[done:], self.prepared, self.m, here * self.tile, outs
            else:
                rows = finished = min(here * self.tile, self.m - done * self.tile)
                table_here, inputs, to = none, self.prepared[done * self.tile * words:], [out[done * self.tile * matrix.outputs:], none, none]
            self.kernels.launch("multiply", (self.groups, here), 256, [*tiles, inputs, *[none] * 10, table_here, order, slots, self.partial, *[none] * 3], rows)
            self.kernels.launch("finish", (self.blocks, finished), 256, [self.partial, *svh, *biases, table_here, order, slots, *to])


class Product:
    """`wgmma.cu` or `mma.cu`."""

    def __init__(self, product, weights, k, n, m, most, defines, grouped=0, experts=1):
        self.m, self.k, self.grouped = m, k, grouped
        if grouped:
            self.n, self.parts = grouped, 1
            self.threads, resident = (256 if product == "mma" else 640), 1
        elif product == "mma":
            self.n, self.parts = (32, 2) if m <= 16 else (64, 2) if m <= 32 else (64, 1) if m <= 64 else (128, 1)
            self.threads, resident = 256, 2 if self.n == 32 else 1
        else:
            self.n, self.parts = (64, 2) if m <= 32 else (64, 1) if m <= 64 else (most, 1)
            self.threads, resident = 640, 1
        rows = self.n // self.parts
        row_tiles = self.tiles = min(m, experts + m // rows) if grouped else -(-m // rows)
        self.ranges = min(resident * SMS, -(-n // 256) * row_tiles * (k // 128))
        self.kernels = Kernels(weights, {
            "WGMMA": int(product == "wgmma"),
            "K_TILES": k // 16, "N_TILES": n // 16, "INPUTS": k, "OUTPUTS": n, "WIDTH": n, "N": self.n, "PARTS": self.parts, "BIAS": 0, "BRAIN": 0,
            "GROUPED": int(bool(grouped)), "SHARE": 1, "HEADS": 0} | defines)
        self.prepared = torch.empty(row_tiles * self.n * k // 2, dtype=torch.int32, device="cuda")
        self.partial = torch.empty(self.ranges * 3 * rows * 256, device="cuda")
        self.counters = torch.zeros(self.ranges, dtype=torch.int32, device="cuda")

    def multiply(self, weights, x, suh, svh, bias, out, by_expert=None, slots=None):
        order, table = by_expert or (x, x)
        slots, told = x if slots is None else slots, self.tiles if self.grouped else self.m
        rows = self.tiles * self.n if self.grouped else self.m
        self.kernels.launch("prepare", (rows, -(-self.k // 512)), 128, [x, x, suh, order, table, slots, self.prepared], told)
        arrays = [weights, self.prepared, svh, bias, order, table, slots, self.partial, self.counters, out]
        self.kernels.launch("multiply", (self.ranges, 1), self.threads, arrays, told)


class Many(Product):
    """With a trellis."""

    def __init__(self, product, matrix, m, grouped=0, experts=1, share=1):
        most = 128 if matrix.twice_bits == 8 else 96
        widths = {"INPUTS": matrix.inputs, "OUTPUTS": matrix.outputs, "WIDTH": matrix.outputs, "SHARE": share}
        super().__init__(product, "trellis", matrix.k, matrix.n, m, most, widths | matrix.defines(), grouped, experts)

    def __call__(self, matrix, x, ids, slots, out, by_expert=None):
        bias = matrix.bias if matrix.bias is not None else matrix.suh
        self.multiply(matrix.tiles, x, matrix.suh, matrix.svh, bias, out, by_expert, slots)


class Plain(Product):
    """With halves, which are there already."""

    def __init__(self, product, k, n, m, dtype):
        super().__init__(product, "plain", k, n, m, 96, {"BRAIN": int(dtype == torch.bfloat16)})

    def __call__(self, halves, x, out):
        self.multiply(halves, x, x, x, x, out)


def in_order(weights):
    """`[n, k]` as the operand has it: tiles of 16 by 16, a lane's eight weights together."""
    n, k = weights.shape
    # [n tile, half of rows, group, pair of k tiles, quad, k tile, half of columns, two]
    parts = weights.reshape(n // 16, 2, 8, k // 32, 4, 2, 2, 2)
    return parts.permute(3, 5, 0, 2, 4, 6, 1, 7).contiguous()


def products():
    """Kernels for many rows that the device has."""
    return ["wgmma", "mma"] if GENERATION == "90a" else ["mma"]


def check(only):
    torch.manual_seed(1)
    many = [name for name in products() if only in (None, name)]
    cases = []
    for twice_bits, codebook in [(8, "mul1"), (8, "mcg"), *((b, "mul1") for b in range(2, 17) if b != 8)]:
        sizes = [1, 2, 7, 16, 17, 31, 60, 100, 300] if twice_bits == 8 else [1, 3, 8, 12, 20, 50, 130]
        cases += [(512, 384, 512, 384, twice_bits, codebook, m, False, 0) for m in sizes]
    cases += [(640, 512, 576, 500, 8, codebook, m, True, 0) for m in [1, 5, 20, 130] for codebook in CODEBOOKS]
    cases += [(4096, 1024, 4096, 1024, 8, "mul1", m, False, 0) for m in [1, 4, 64, 1000]]
    cases += [(128, 8192, 128, 8192, 8, "mul1", m, False, 0) for m in [1, 4]]
    cases += [(640, 512, 576, 500, bits, codebook, m, True, matrices) for bits in (6, 8) for codebook in CODEBOOKS for matrices in (1, 2) for m in (12, 24, 60)]
    cases += [(640, 512, 576, 500, bits, codebook, 300, True, 1) for bits in (6, 8) for codebook in CODEBOOKS]

    def one(case):
        k, n, inputs, outputs, twice_bits, codebook, m, bias, stacks = case
        matrix = Matrix(k, n, twice_bits, codebook, 5 if stacks else 1, inputs, outputs, bias)
        if m == 300 and stacks:
            return case, matrix, [(name, Many(name, matrix, m, columns, 5, 3)) for name in many for columns in ([64, 128] if twice_bits == 8 else [64])]
        # Of the sorted ones, the fewer in tiles of four.
        grouped = {12: 0, 24: 4, 60: 8}[m] if stacks else 0
        kernels = [("few", Few(matrix, m, 5 * bool(stacks), 3 if stacks else 1, max(1, stacks), grouped))] if m <= 128 and only in (None, "few") else []
        least = {"wgmma": 16, "mma": 8}
        return case, matrix, kernels + [(name, Many(name, matrix, m)) for name in many if m > least[name] and not stacks]

    failed = 0
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(one, cases))
    for case, matrix, kernels in made:
        if not kernels:
            continue
        m, stacks = case[6], case[8]
        x = torch.randn(m // 3 if stacks else m, matrix.inputs, device="cuda")
        ids = torch.randint(0, 5, (m,), dtype=torch.int32, device="cuda")
        slots = torch.tensor([3, 1, 4, 0, 2], dtype=torch.int32, device="cuda")
        if stacks:
            right = torch.cat([matrix.product(x[e // 3 : e // 3 + 1], slots[ids[e].item()].item()) for e in range(m)] * stacks)
        else:
            right = matrix.product(x)
        says = []
        for name, kernel in kernels:
            outs = [torch.full(right.shape, float("nan"), device="cuda") for _ in range(2)]
            by_expert = {"by_expert": sorted_entries(kernel, ids, 5)} if stacks and kernel.grouped else {}
            [kernel(matrix, x, ids, slots, out.view(-1), **by_expert) for out in outs]
            torch.cuda.synchronize()
            error = ((outs[0] - right).norm() / right.norm()).item()
            # Weights of `mul1` are not rounded to halves by `few`; rows are by the others.
            bound = (4e-4 if case[5] == "mul1" else 2e-6) if name == "few" else 2e-6 if kernel.parts == 2 else 5e-4
            good = error < bound and torch.equal(*outs)
            failed += not good
            says.append(f"{name} {error:.2e}{'' if torch.equal(*outs) else ', differs when run again'}{'' if good else ' BAD'}")
        print(case, *says, flush=True)
    for name, dtype, m in [(name, dtype, m) for name in many for dtype in (torch.float16, torch.bfloat16) for m in (5, 20, 40, 70, 300)]:
        weights, x = torch.randn(384, 640, device="cuda").to(dtype), torch.randn(m, 640, device="cuda")
        plain, out = Plain(name, 640, 384, m, dtype), torch.empty(m, 384, device="cuda")
        plain(in_order(weights), x, out)
        right = x.double() @ weights.double().T
        error = ((out - right).norm() / right.norm()).item()
        good = error < {1: 5e-4, 2: 2e-6}[plain.parts] * (16 if dtype == torch.bfloat16 else 1)
        failed += not good
        print(f"{'ok ' if good else 'BAD'} {name} {dtype} m={m} N={plain.n} parts={plain.parts}: {error:.2e}", flush=True)
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


def time(only):
    cases = []
    for k, n in [(4096, 14336), (4096, 4096), (2048, 1536)]:
        for twice_bits, codebook in [(8, "mul1"), (8, "mcg"), (6, "mul1"), (4, "mul1")]:
            sizes, others = {
                "few": ([1, 4, 8, 16], [1]),
                "many": ([9, 16, 32, 64, 128, 256, 512, 2048], [64, 2048]),
                None: ([1, 8, 16, 32, 64, 128, 256, 512, 2048], [1, 64]),
            }[only]
            cases += [(k, n, twice_bits, codebook, m, 0) for m in (sizes if (twice_bits, codebook) == (8, "mul1") else others)]
    if only != "many":
        cases += [(2048, 1536, 8, "mul1", 4, 4), (2048, 1536, 8, "mul1", 8, 8)]
    if only != "few":
        cases += [(2048, n, 8, "mul1", m, experts) for n, experts in [(768, 128), (1536, 64)] for m in (1024, 4096, 16384)]

    def one(case):
        k, n, twice_bits, codebook, m, entries = case
        matrix = Matrix(k, n, twice_bits, codebook, max(1, entries))
        if entries > 8:
            columns = 64 if m // entries <= 64 else 128
            return case, matrix, [("few", Few(matrix, m, entries, grouped=8))] + [(name, Many(name, matrix, m, columns, entries)) for name in products()]
        few = [("few", Few(matrix, m, entries, matrices=2 if entries == 8 else 1))] if m <= 128 else []
        return case, matrix, few + [(name, Many(name, matrix, m)) for name in products() if m > 8 and not entries]

    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(one, cases))
    for (k, n, twice_bits, codebook, m, entries), matrix, kernels in made:
        bytes_of = matrix.tiles.numel() * 4
        copies = max(2, min(64, COPIES_BYTES // bytes_of + 1)) if m <= 128 else 4
        matrices = [Matrix(k, n, twice_bits, codebook, max(1, entries)) for _ in range(copies)]
        x = torch.randn(m, k, device="cuda")
        ids = torch.arange(m, dtype=torch.int32, device="cuda") % max(1, entries)
        if entries > 8:
            ids = torch.randint(0, entries, (m,), dtype=torch.int32, device="cuda")
        slots = torch.arange(max(1, entries), dtype=torch.int32, device="cuda")
        out = torch.empty(2 * m * n, device="cuda")
        rounds = max(1, (256 if m <= 128 else 16) // copies)
        by_expert = {name: {"by_expert": sorted_entries(kernel, ids, entries)} if entries > 8 else {} for name, kernel in kernels}
        says = [f"{k:>5} x {n:<6} {twice_bits / 2} {codebook:<5} m={m:<5}{' experts' if entries else ''}{', two matrices' if entries == 8 else ''}"]
        for name, kernel in kernels:
            says.append(f"{name} {measure(lambda c: kernel(matrices[c], x, ids, slots, out, **by_expert[name]), copies, rounds)}")
        if twice_bits == 8 and codebook == "mul1" and not entries:
            half = [torch.randn(n, k, device="cuda", dtype=torch.float16) for _ in range(max(2, min(copies, COPIES_BYTES // (2 * n * k) + 1)))]
            xh = x.half()
            if m > 16:
                for name in products():
                    plain = Plain(name, k, n, m, torch.float16)
                    says.append(f"halves {name} {measure(lambda c: plain(half[c], x, out), len(half), max(1, (64 if m <= 128 else 16) // len(half)))}")
            says.append(f"cuBLAS {measure(lambda c: torch.nn.functional.linear(xh, half[c]), len(half), max(1, (64 if m <= 128 else 16) // len(half)))}")
        print("  ".join(says), flush=True)
    if only:
        return
    weights = [torch.randn(14336, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    x = torch.randn(2048, 4096, device="cuda", dtype=torch.bfloat16)
    print(f" 4096 x 14336  bf16      m=2048   cuBLAS {measure(lambda c: torch.nn.functional.linear(x, weights[c]), 4, 4)}")
    blocks = [torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2)]
    print(f"copy of 1 GiB {measure(lambda c: blocks[c].copy_(blocks[1 - c]), 2, 5)}, read and written twice that")


if __name__ == "__main__":
    SMS = torch.cuda.get_device_properties(0).multi_processor_count
    GENERATION = "{}{}".format(*torch.cuda.get_device_capability(0)).replace("90", "90a")
    print(torch.__version__, torch.cuda.get_device_name(0), flush=True)
    verb, only = [*sys.argv[1:], None, None][:2]
    {"check": check, "time": time}[verb](only)
