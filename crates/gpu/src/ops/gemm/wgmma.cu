// Many rows times a matrix by products of warpgroups (wgmma), which only sm_90a has: after `common.cuh`, with 64, 96 or 128 columns.
//
// A block is sixteen warps, each with a tile of sixteen outputs, and one warp that fetches inputs.

#if WGMMA

#define CONSUMERS 16
// Runs of 128 outputs that a warp finishes at once.
#define TOGETHER (N > 64 || HELD > 1 ? 2 : 4)
// Registers for words that are read ahead, and the tiles they are of.
#define REGISTERS (N > 96 || (N > 64 && !DIRECT) ? 8 : 16)
#define WINDOW (HELD * 8 <= REGISTERS ? 8 : HELD * 4 <= REGISTERS ? 4 : 2)
// Tiles of a group of products.
#define GROUP (N > 64 ? 1 : 2)

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
    asm volatile("{\n.reg .pred p;\nagain: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra done;\nbra again;\ndone:\n}"
        :: "r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory"); }

// A barrier of the warps that multiply.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, 512;" ::: "memory"); }

#define R4(a, b, c, d) "%" #a ",%" #b ",%" #c ",%" #d
#define F4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define F16(i) F4(i), F4(i + 4), F4(i + 8), F4(i + 12)
#define R16 R4(0, 1, 2, 3) "," R4(4, 5, 6, 7) "," R4(8, 9, 10, 11) "," R4(12, 13, 14, 15)
#define R32 R16 "," R4(16, 17, 18, 19) "," R4(20, 21, 22, 23) "," R4(24, 25, 26, 27) "," R4(28, 29, 30, 31)
#define R48 R32 "," R4(32, 33, 34, 35) "," R4(36, 37, 38, 39) "," R4(40, 41, 42, 43) "," R4(44, 45, 46, 47)
#define R64 R48 "," R4(48, 49, 50, 51) "," R4(52, 53, 54, 55) "," R4(56, 57, 58, 59) "," R4(60, 61, 62, 63)
#define PRODUCT(n, sums, a0, a1, a2, a3, d, u) "{\n.reg .pred p;\n.reg .b64 d;\nsetp.eq.u32 p, 0, 0;\nmov.b64 d, {" d ", " u "};\n" \
    "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." HALVES "." HALVES " {" sums "}, {" a0 "," a1 "," a2 "," a3 "}, d, p, 1, 1, 0;\n}"

// The warpgroup's 64 outputs times N columns, over sixteen inputs.
__device__ __forceinline__ void multiply_add(float* c, const u32* w, u32 columns) {
#define OPERANDS "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(columns), "n"(((8 * LINE >> 4) | (DEEP == 4 ? 1u : 2u) << 30))
#if N == 64
    asm volatile(PRODUCT(64, R32, "%32", "%33", "%34", "%35", "%36", "%37") : F16(0), F16(16) : OPERANDS);
#elif N == 96
    asm volatile(PRODUCT(96, R48, "%48", "%49", "%50", "%51", "%52", "%53") : F16(0), F16(16), F16(32) : OPERANDS);
#else
    asm volatile(PRODUCT(128, R64, "%64", "%65", "%66", "%67", "%68", "%69") : F16(0), F16(16), F16(32), F16(48) : OPERANDS);
#endif
}

// How the products find a stage, of columns of LINE bytes, sixteen of which change places with others by the column's number: the lower word, in
// which sixteen bytes are one. The upper word is a constant.
__device__ __forceinline__ u32 columns_at(u32 address) { return 1u << 16 | (address & 0x3ffff) >> 4; }

extern "C" __global__ void __launch_bounds__(32 * (CONSUMERS + 4), 1) multiply(
    const u32* tiles, const u32* x, const float* __restrict__ svh, const float* __restrict__ bias,
    float* partial, u32* counters, float* __restrict__ out, const __grid_constant__ Info info)
{
    __shared__ __align__(1024) unsigned char memory[STAGES * STAGE];
    __shared__ __align__(8) u64 barriers[2 * STAGES];
    const u32 lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const u32 end = first_unit(info.rows, blockIdx.x + 1);
    u32 unit = first_unit(info.rows, blockIdx.x);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2 * STAGES; i++)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barriers + i)), "r"(i < STAGES ? 1 : CONSUMERS));
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    const u32 full = shared_address(barriers), empty = full + 8 * STAGES;

    if (warp >= CONSUMERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (warp > CONSUMERS) return;
        wait_for_last();
        let_next_start();
        u32 stage = 0, parity = 1;
        for (; unit < end; unit++) {
            const u32 tile = unit / STEPS, step = unit - tile * STEPS, row_tile = tile % row_tiles(info.rows);
#pragma unroll
            for (int i = 0; i < 8 / DEEP; i++) {
                // Who multiplies with the first stage gives the last one back before there was anything in it.
                wait(empty + 8 * stage, stage == STAGES - 1 ? parity ^ 1 : parity);
                if (lane == 0) {
                    const char* from = (const char*)x + ((u64)row_tile * (K_TILES / DEEP) + step * (8 / DEEP) + i) * STAGE;
                    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(full + 8 * stage), "n"(STAGE) : "memory");
                    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                        :: "r"(shared_address(memory + stage * STAGE)), "l"(from), "n"(STAGE), "r"(full + 8 * stage) : "memory");
                }
                __syncwarp();
                stage++;
                if (stage == STAGES) stage = 0, parity ^= 1;
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");
    // Halves were written by a launch before; codes of a trellis were there.
    if (DIRECT) wait_for_last();
    Weights<1, WINDOW> weights(tiles, warp, info.rows, unit, end);
    wait_for_last();
    float sums[N / 2];
    u32 operand[2][4 * GROUP];
    const u32 first_columns = columns_at(shared_address(memory));
    u32 half = 0, parity = 0;
    while (unit < end) {
        const u32 tile = unit / STEPS;
        const u32 steps = min((tile + 1) * STEPS, end) - unit;
#pragma unroll
        for (int i = 0; i < N / 2; i++) sums[i] = 0;
        for (u32 step = steps; step > 0; step--) {
#pragma unroll
            for (int g = 0; g < 8 / GROUP; g++) {
                // Weights that are the operand as they are read make room for others when the products are done.
                if (!DIRECT)
#pragma unroll
                    for (int i = 0; i < GROUP; i++) {
                        weights.own.operand(operand[g % 2] + 4 * i, weights.words[(g * GROUP + i) % WINDOW][0]);
                        weights.refill(g * GROUP + i);
                    }
                const int stage = g * GROUP / DEEP, in_stage = g * GROUP % DEEP;
                const u32 columns = first_columns + stage * (STAGE / 16) + in_stage * 2 + (DEEP == 4 ? half * (2 * STAGE / 16) : 0);
                const u32 ready = full + 8 * stage + (DEEP == 4 ? half * 16 : 0);
                if (in_stage == 0) wait(ready, parity);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (int i = 0; i < GROUP; i++) multiply_add(sums, DIRECT ? weights.words[(g * GROUP + i) % WINDOW][0] : operand[g % 2] + 4 * i, columns + i * 2);
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                // All products but these are done.
                if (DIRECT)
#pragma unroll
                    for (int i = 0; i < GROUP; i++) weights.refill(g * GROUP + i - GROUP);
                const u32 before = stage > 0 ? ready - 8 : full + 8 * (DEEP == 2 ? STAGES - 1 : STAGES - 1 - 2 * half);
                if (in_stage == 0 && lane == 0) arrive(before + 8 * STAGES);
            }
            if (DEEP == 2) {
                parity ^= 1;
            } else {
                parity ^= half;
                half ^= 1;
            }
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
        for (int i = 0; i < N / 2; i++) asm volatile("" : "+f"(sums[i]) :: "memory");
        unit += steps;

        const Tile of(tile, again(info.rows));
        of.leave(of.part(partial, blockIdx.x) + warp * 16 + lane / 4, sums);
        of.finish<CONSUMERS, TOGETHER>(partial, counters, svh, bias, out, warp, meet);
    }
}

#endif
