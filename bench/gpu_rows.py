#!/usr/bin/env python3
"""The CUDA C++ kernel for few rows of row formats (`ops/integer.cu`) alone, beside cuBLAS.

    gpu_rows.py check     # every format against products in f64
    gpu_rows.py time      # microseconds, median (10th to 90th percentile)

Launches as `gpu_kernels.py`. Needs PyTorch, nvcc and a GPU that nvcc is told of there.
"""
import sys
from concurrent.futures import ThreadPoolExecutor

import gpu_kernels
import torch
from gpu_kernels import COPIES_BYTES, Kernels, measure, sorted_entries

gpu_kernels.TEXTS["integer"] = ["ptx.cuh", "halves.cuh", "integer.cu"]
HALF, PAIR, GROUP, K2, K3, K4, K6 = range(7)
# Bits of codes and above them, scales, and the zero or the groups of 32 that share a scale.
FORMATS = {
    "q4_0": (4, 0, HALF, 8), "q4_1": (4, 0, PAIR, 1), "q5_0": (4, 1, HALF, 16), "q5_1": (4, 1, PAIR, 1), "q8_0": (8, 0, HALF, 0), "q2_k": (2, 0, K2, 1),
    "q3_k": (2, 1, K3, 1), "q4_k": (4, 0, K4, 1), "q5_k": (4, 1, K4, 1), "q6_k": (4, 2, K6, 1), "int4_g128": (4, 0, GROUP, 4), "int4_g64": (4, 0, GROUP, 2),
    "int4_g32": (4, 0, GROUP, 1), "int8_g128": (8, 0, GROUP, 4), "int8_g32": (8, 0, GROUP, 1),
}


def packed(codes, bits):
    """`[n, k]` codes as words, low ones first."""
    parts = codes.reshape(-1, 32 // bits).long() << (torch.arange(32 // bits, device="cuda") * bits)
    words = parts.sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def halves(values):
    return values.half().contiguous().view(torch.int16)


class Matrix:
    """Random codes and scales; `weights` are what they mean, in f64, where wanted."""

    def __init__(self, name, n, k, stack=1, decode=False):
        codes_bits, high_bits, scales, span = self.format = FORMATS[name]
        self.n, self.k = n, k
        rows, cuda = n * stack, {"device": "cuda"}
        low = torch.randint(0, 1 << codes_bits, (rows, k), dtype=torch.int16, **cuda)
        high = torch.randint(0, 1 << high_bits, (rows, k), dtype=torch.int16, **cuda)
        none = torch.zeros(4, dtype=torch.int32, **cuda)
        self.codes, self.high, self.over = packed(low, codes_bits), packed(high, high_bits) if high_bits else none, none
        q = (low + (high << codes_bits)) if decode else None
        random = lambda per: (torch.rand(rows, k // per, **cuda) * 0.02 + 0.001).half()
        small = lambda per, low, high: torch.randint(low, high, (rows, k // per), **cuda)
        spread = lambda v, per: v.double().repeat_interleave(per, 1)
        d = random(32 if scales in (HALF, PAIR) else 256)
        if scales == HALF:
            self.scales = halves(d)
            value = lambda: spread(d, 32) * ((q.to(torch.int8) if codes_bits == 8 else q).double() - span)
        elif scales == PAIR:
            m = random(32)
            self.scales = torch.stack([halves(d), halves(m)], 2).contiguous()
            value = lambda: spread(d, 32) * q.double() + spread(m, 32)
        elif scales == GROUP:
            word = torch.randint(0, 1 << 23, (rows, k // (32 * span)), **cuda) | 0x3C000000
            self.scales = (word & -256 | torch.randint(0, 1 << codes_bits, word.shape, **cuda)).int()
            value = lambda: spread((self.scales & -256).view(torch.float32), 32 * span) * (q.double() - spread(self.scales & 255, 32 * span))
        elif scales in (K2, K4):
            per, top = (16, 16) if scales == K2 else (32, 64)
            s, m, least = small(per, 0, top), small(per, 0, top), random(256)
            self.scales = (s | m << 4).to(torch.uint8) if scales == K2 else (s | m << 8).to(torch.int16)
            self.over = torch.stack([halves(d), halves(least)], 2).contiguous()
            value = lambda: spread(d, 256) * spread(s, per) * q.double() - spread(least, 256) * spread(m, per)
        else:
            s = small(16, 0, 64) if scales == K3 else small(16, -128, 128)
            self.scales, self.over = s.to(torch.uint8).contiguous(), halves(d)
            value = lambda: spread(d, 256) * spread(s - 32 if scales == K3 else s, 16) * (q.double() - (4 if scales == K3 else 32))
        self.weights = value().view(stack, n, k) if decode else None
        self.bias = torch.randn(rows, **cuda)

    def bytes(self):
        return sum(t.numel() * t.element_size() for t in (self.codes, self.high, self.scales, self.over))


class Product:
    """`m` rows times up to three matrices; entries have a matrix each."""

    def __init__(self, matrices, m, entries=0, share=1, grouped=0, bias=0):
        self.m, self.entries, self.grouped, self.share, self.k = m, entries, grouped, share, matrices[0].k
        self.tile = (1 if entries and not grouped else min(grouped or 8, 1 << (m - 1).bit_length()))
        self.inline = int(self.tile * -(-self.k // 1024) * 640 <= 12 << 10)
        outs, warps, resident = self.cut(sum(matrix.n for matrix in matrices), max(matrix.format[1] for matrix in matrices))
        defines = {"MATRICES": len(matrices), "GROUPS": self.k // 32, "M": self.tile, "R": outs, "INLINE": self.inline, "ENTRIES": int(bool(entries)),
                   "GROUPED": int(bool(grouped)), "SHARE": share, "BIAS": bias, "WARPS": warps, "RESIDENT": resident}
        for i in range(3):
            matrix = matrices[i] if i < len(matrices) else None
            values = matrix.format if matrix else FORMATS["q4_0"]
            defines |= dict(zip((f"{name}_{i}" for name in ("CODES", "HIGH", "SCALES", "SPAN")), values)) | {f"OUTPUTS_{i}": matrix.n if matrix else 0}
        self.kernels = Kernels("integer", defines)
        sets = sum(-(-matrix.n // outs) for matrix in matrices)
        self.tiles = min(m, entries + m // grouped) if grouped else -(-m // self.tile)
        self.warps = warps
        self.blocks = min(-(-sets // warps), max(1, gpu_kernels.SMS * resident // (self.tiles if entries else 1)))
        self.prepared = torch.empty(m * -(-self.k // 1024) * 640, dtype=torch.int32, device="cuda")

    def cut(self, outputs, high):
        """As `ops/integer.rs` has it: outputs of a warp, warps of a block, blocks of a multiprocessor."""
        if self.tile == 1:
            few = outputs < 64 * gpu_kernels.SMS
            return (1, 32, 1) if few and self.k > 8192 else (1, 16, 2) if few and self.k < 4096 else (2, 16, 2)
        return {2: (4, 16, 1), 4: (2 if high == 2 else 4, 16, 1), 8: (4, 8, 1)}[self.tile]

    def __call__(self, matrices, x, ids, slots, outs, order=None):
        none = matrices[0].bias
        each = lambda f: [f(matrices[i]) if i < len(matrices) else none for i in range(3)]
        if not self.inline:
            self.kernels.launch("prepare", (-(-self.k // 2048), len(x)), 256, [x, none, self.prepared])
        arrays = [*each(lambda w: w.codes), *each(lambda w: w.high), *each(lambda w: w.scales), *each(lambda w: w.over), *each(lambda w: w.bias)]
        to = [outs[i] if i < len(outs) else none for i in range(3)]
        self.kernels.launch("multiply", (self.blocks, self.tiles), 32 * self.warps, [*arrays, x if self.inline else self.prepared, none, ids, none if order is None else order, slots, *to], self.m)


def check():
    torch.manual_seed(1)
    cases = [(name, 500, k, m, 0, 1) for name in FORMATS for k in (256, 2816) for m in (1, 2, 3, 7, 13)]
    cases += [("q4_k", 1000, 14336, m, 0, 3) for m in (1, 3, 8)] + [("q4_0", 130, 576, m, 0, 2) for m in (1, 5)]
    cases += [(name, 384, 512, m, grouped, 2) for name in ("q4_k", "q8_0", "int4_g128") for m, grouped in ((12, 1), (24, 4), (60, 8))]

    def one(case):
        name, n, k, m, grouped, count = case
        names = [name, "q6_k" if count > 2 else name, name][:count]
        matrices = [Matrix(f, n, k, 5 if grouped else 1, True) for f in names]
        return case, matrices, Product(matrices, m, 5 * bool(grouped), 3 if grouped else 1, 0 if grouped == 1 else grouped, 1)

    failed = 0
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(one, cases))
    for case, matrices, product in made:
        m, grouped = case[3], case[4]
        x = torch.randn(m // 3 if grouped else m, case[2], device="cuda") * torch.exp(torch.randn(case[2], device="cuda"))
        ids = torch.randint(0, 5, (m,), dtype=torch.int32, device="cuda")
        slots = torch.tensor([3, 1, 4, 0, 2], dtype=torch.int32, device="cuda")
        order, table = sorted_entries(product, ids, 5) if grouped > 1 else (None, ids)
        outs = [torch.full((m, w.n), float("nan"), device="cuda") for w in matrices]
        product(matrices, x, table, slots, outs, order)
        torch.cuda.synchronize()
        errors = []
        for matrix, out in zip(matrices, outs):
            if grouped:
                at = slots[ids.long()].long()
                right = torch.einsum("ek,enk->en", x.double()[torch.arange(m, device="cuda") // 3], matrix.weights[at]) + matrix.bias.view(5, -1)[at]
            else:
                right = x.double() @ matrix.weights[0].T + matrix.bias
            errors.append(((out - right).norm() / right.norm()).item())
        alone = True
        if not grouped and m > 1:
            # The last row alone.
            single = Product(matrices, 1, bias=1) if m in (3, 13) else None
            if single:
                one_out = [torch.empty(1, w.n, device="cuda") for w in matrices]
                single(matrices, x[-1:].contiguous(), ids, slots, one_out)
                alone = all(torch.equal(a[-1:], b) for a, b in zip(outs, one_out))
        good = all(e < 1e-4 for e in errors) and alone
        failed += not good
        print("ok " if good else "BAD", case, *(f"{e:.2e}" for e in errors), "" if alone else "other bits alone", flush=True)
    sys.exit(f"{failed} differ" if failed else None)


def time(wanted):
    cases = [("int4_g128", 4096, 14336, m) for m in (1, 2, 4, 8, 16)]
    cases += [(name, 4096, 14336, m) for name in ("q4_0", "q4_k", "q6_k", "q8_0", "q5_0", "q3_k", "q2_k") for m in (1, 8)]
    cases += [("q4_k", k, n, m) for k, n in ((4096, 4096), (14336, 4096), (2048, 1536)) for m in (1, 4, 8, 16)]
    cases = [c for c in cases if not wanted or c[0] in wanted]

    def one(case):
        name, k, n, m = case
        matrix = Matrix(name, n, k)
        return case, matrix, Product([matrix], m)

    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(one, cases))
    for (name, k, n, m), matrix, product in made:
        copies = max(2, min(64, COPIES_BYTES // matrix.bytes() + 1))
        matrices = [Matrix(name, n, k) for _ in range(copies)]
        x, out = torch.randn(m, k, device="cuda"), torch.empty(m, n, device="cuda")
        ids = torch.zeros(1, dtype=torch.int32, device="cuda")
        says = measure(lambda c: product([matrices[c]], x, ids, ids, [out]), copies, max(1, 256 // copies))
        rate = matrix.bytes() / float(says.split()[0]) / 1e3
        print(f"{name:<10} {k:>5} x {n:<6} m={m:<3} {says}  {rate:6.0f} GB/s", flush=True)


if __name__ == "__main__":
    gpu_kernels.SMS = torch.cuda.get_device_properties(0).multi_processor_count
    print(torch.__version__, torch.cuda.get_device_name(0), flush=True)
    check() if sys.argv[1:2] == ["check"] else time(sys.argv[2:])
