#!/usr/bin/env python3
"""Cycles that a scheduler of a multiprocessor takes for a tile of trellis-coded weights, of instructions alone: nothing is read from memory.

    gpu_instructions.py

A tile is 16 by 16 weights of 4 bits and `mul1`: a word is exchanged, windows are cut out of two, multiplied, and the bytes of the products are operands of
products of bytes, by single warps (`mma.sync`) or by warpgroups (`wgmma`) with 8, 16 and 32 columns. Four warps a scheduler. Needs nvcc and a Hopper GPU.
"""
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TEXT = r"""
#include <cstdio>
typedef unsigned int u32;
#define ROUNDS 4000

__device__ __forceinline__ void states(u32 before, u32 own, u32* s) {
    const u32 f = __byte_perm(own, before, 0x5432), f4 = f >> 4, g4 = own >> 4;
    s[0] = __byte_perm(f4, 0, 0x4421), s[1] = __byte_perm(f, 0, 0x4421), s[2] = f4 & 0xffff, s[3] = own >> 16;
    s[4] = __byte_perm(g4, 0, 0x4421), s[5] = __byte_perm(own, 0, 0x4421), s[6] = g4 & 0xffff, s[7] = own & 0xffff;
}

__device__ __forceinline__ void single(int* c, const u32* s, const u32* b) {
#pragma unroll
    for (int h = 0; h < 2; h++)
        asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(s[2 * h]), "r"(s[2 * h + 4]), "r"(s[2 * h + 1]), "r"(s[2 * h + 5]), "r"(b[2 * h]), "r"(b[2 * h + 1]));
}

#define SUM(i) "+r"(c[i]), "+r"(c[i + 1]), "+r"(c[i + 2]), "+r"(c[i + 3])
#define GROUP(n, sums, a, d) "{\n.reg .pred p;\n.reg .b64 d;\nsetp.eq.u32 p, 0, 0;\nmov.b64 d, {" d "};\nwgmma.mma_async.sync.aligned.m64n" #n "k32.s32.u8.s8 {" sums "}, {" a "}, d, p;\n}"

__device__ __forceinline__ void group(int* c, const u32* s, u32 columns) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
#define OPERANDS "r"(s[2 * h]), "r"(s[2 * h + 4]), "r"(s[2 * h + 1]), "r"(s[2 * h + 5]), "r"(columns + 2 * h), "n"(1024u >> 4 | 1u << 30)
#if COLUMNS == 8
        asm volatile(GROUP(8, "%0,%1,%2,%3", "%4,%5,%6,%7", "%8,%9") : SUM(0) : OPERANDS);
#elif COLUMNS == 16
        asm volatile(GROUP(16, "%0,%1,%2,%3,%4,%5,%6,%7", "%8,%9,%10,%11", "%12,%13") : SUM(0), SUM(4) : OPERANDS);
#else
        asm volatile(GROUP(32, "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", "%16,%17,%18,%19", "%20,%21") : SUM(0), SUM(4), SUM(8), SUM(12) : OPERANDS);
#endif
    }
}

__global__ void __launch_bounds__(256, 2) run(int* out, u32 seed, long long* cycles) {
    __shared__ __align__(1024) unsigned char memory[COLUMNS * 256];
    for (u32 i = threadIdx.x; i < sizeof(memory) / 4; i += 256) ((u32*)memory)[i] = i * seed;
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
#if GROUPS
    const u32 at = 1u << 16 | ((u32)__cvta_generic_to_shared(memory) & 0x3ffff) >> 4;
#else
    const u32 b[4] = {seed, seed * 3, seed * 5, seed * 7};
#endif
    u32 words[2][TILES], made[2][TILES][8];
    int sums[TILES][COLUMNS / 2] = {};
    for (int k = 0; k < 2; k++)
        for (int t = 0; t < TILES; t++) words[k][t] = seed * (threadIdx.x + k * 8 + t);
    const long long start = clock64();
    for (int round = 0; round < ROUNDS; round++) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                u32* s = made[k][t];
                const u32 word = words[k][t];
                states(__shfl_sync(~0u, word, threadIdx.x + 31), word, s);
#pragma unroll
                for (int i = 0; i < 8; i++) s[i] *= 0x83DCD12Du;
                words[k][t] = word + 0x9e3779b9u;
#if !GROUPS
                single(sums[t], s, b);
#endif
            }
#if GROUPS
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int t = 0; t < TILES; t++) group(sums[t], made[k][t], at + 4 * k);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
#endif
        }
    }
#if GROUPS
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; i++) asm volatile("" : "+r"(sums[t][i]) :: "memory");
#endif
    const long long end = clock64();
    int all = 0;
    for (int t = 0; t < TILES; t++)
        for (int i = 0; i < COLUMNS / 2; i++) all += sums[t][i];
    out[blockIdx.x * 256 + threadIdx.x] = all;
    if (threadIdx.x == 0) cycles[blockIdx.x] = end - start;
}

int main() {
    int* out;
    long long* cycles;
    cudaDeviceProp about;
    cudaGetDeviceProperties(&about, 0);
    const int blocks = 2 * about.multiProcessorCount;
    cudaMalloc(&out, blocks * 256 * sizeof(int));
    cudaMallocManaged(&cycles, blocks * sizeof(long long));
    for (int i = 0; i < 2; i++) {
        run<<<blocks, 256>>>(out, 12345, cycles);
        if (cudaError_t error = cudaDeviceSynchronize()) return printf("%s\n", cudaGetErrorString(error)), 1;
    }
    printf("%.1f\n", (double)cycles[blocks / 2] / (ROUNDS * 2.0 * TILES * 4));
}
"""
# Products of warpgroups, columns, tiles side by side.
CASES = [(0, 8, 8), (0, 8, 2), (1, 8, 1), (1, 8, 2), (1, 8, 4), (1, 16, 2), (1, 16, 4), (1, 32, 1), (1, 32, 2)]


def main():
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor() as pool:
        source = Path(directory) / "tile.cu"
        source.write_text(TEXT)

        def built(case):
            program = Path(directory) / "-".join(map(str, case))
            macros = [f"-D{name}={value}" for name, value in zip(("GROUPS", "COLUMNS", "TILES"), case)]
            subprocess.run(["nvcc", "-gencode=arch=compute_90a,code=sm_90a", *macros, "-o", program, source], check=True)
            return program

        for (groups, columns, tiles), program in zip(CASES, list(pool.map(built, CASES))):
            cycles = subprocess.run([program], check=True, capture_output=True, text=True).stdout.strip()
            print(f"{'wgmma' if groups else 'mma.sync':8} {columns:2} columns, {tiles} tiles side by side: {cycles} cycles a tile")


if __name__ == "__main__":
    main()
