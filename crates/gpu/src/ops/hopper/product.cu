// Many rows times a matrix by products of warpgroups (wgmma), which only sm_90a has.
//
// Defined before this text, besides what `trellis.cuh` and `plain.cuh` say: N (columns of the second operand: 64, 96 or 128), PARTS (2: a row is
// halves and what these leave, two columns; 1: halves alone), OUTPUTS (from a row of results to the next), WIDTH (outputs of the matrix), BIAS, and
// BRAIN (halves are bf16).
//
// A block is sixteen warps, each with a tile of sixteen outputs, and one warp that fetches inputs. A lane's eight weights of a tile are its part of
// the first operand, in registers; the second lies in shared memory. Depth, outputs and tiles of rows together are cut evenly over the blocks of a
// launch. A tile of outputs that several blocks share is added up, in order, and finished by the one that comes last.

#define OUTS 256
#define CONSUMERS 16
#define BLOCKS ((N_TILES + 15) / 16)
// Steps of 128 inputs, eight tiles.
#define STEPS (K_TILES / 8)
#define ROWS (N / PARTS)
// Tiles of a stage, bytes of a column of it, and stages: those of one step or of two.
#define DEEP (N > 64 ? 2 : 4)
#define LINE (DEEP * 32)
#define STAGE (N * LINE)
#define STAGES 4
// Runs of 128 outputs that a warp finishes at once.
#define TOGETHER (N > 64 || HELD > 1 ? 2 : 4)
// Registers for words that are read ahead, and the tiles they are of.
#define REGISTERS (N > 96 || (N > 64 && !DIRECT) ? 8 : 16)
#define WINDOW (HELD * 8 <= REGISTERS ? 8 : HELD * 4 <= REGISTERS ? 4 : 2)
// Tiles of a group of products.
#define GROUP (N > 64 ? 1 : 2)

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

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

// Byte of a stage where column `n` has input `k`.
__device__ __forceinline__ u32 place(u32 n, u32 k) {
    const u32 mixed = DEEP == 4 ? n % 8 : n / 2 % 4;
    return n * LINE + ((k / 8) ^ mixed) * 16 + k % 8 * 2;
}

extern "C" __global__ void __launch_bounds__(32 * (CONSUMERS + 4), 1) multiply(
    const u32* __restrict__ tiles, const u32* __restrict__ x, const float* __restrict__ svh, const float* __restrict__ bias,
    float* partial, u32* counters, float* __restrict__ out, const __grid_constant__ Info info)
{
    __shared__ __align__(1024) unsigned char memory[STAGES * STAGE];
    __shared__ __align__(8) u64 barriers[2 * STAGES];
    __shared__ u32 is_last;
    const u32 lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const u32 row_tiles = (info.rows + ROWS - 1) / ROWS;
    const u32 units = BLOCKS * row_tiles * STEPS, ranges = gridDim.x, range = blockIdx.x;
    u32 unit = (u64)units * range / ranges;
    const u32 end = (u64)units * (range + 1) / ranges;
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
        u32 stage = 0, parity = 1;
        for (; unit < end; unit++) {
            const u32 tile = unit / STEPS, step = unit - tile * STEPS, row_tile = tile % row_tiles;
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
    const u32 quad = lane % 4, group = lane / 4;
    const Lane own(lane);

    // Weights are read ahead over the ends of tiles; past the last, the last again.
    const u32* source[SOURCES];
    u32 words[WINDOW][HELD], next = unit, left;
    auto seek = [&]() {
        left = ~0u;
        if (next < end) {
            const u32 tile = next / STEPS, step = next - tile * STEPS;
            const u32 column = min(tile / row_tiles * 16 + warp, (u32)N_TILES - 1);
            const u32* from = tiles + ((u64)step * 8 * N_TILES + column) * WORDS;
#pragma unroll
            for (int j = 0; j < SOURCES; j++) source[j] = from + own.place_of[j];
            left = min((u32)STEPS - step, end - next);
            next += left;
        }
    };
    auto read = [&](int i) { own.read(words[i % WINDOW], source, (u64)i * N_TILES * WORDS); };
    auto advance = [&]() {
        left--;
        if (left == 0) {
            seek();
            if (left != ~0u) return;
        } else if (left < ~0u - 1) {
#pragma unroll
            for (int j = 0; j < SOURCES; j++) source[j] += (u64)8 * N_TILES * WORDS;
        }
    };
    // Reads what comes WINDOW tiles after the one that is done with.
    auto refill = [&](int at) {
        if (at == 8 - WINDOW) advance();
        read((at + 8 + WINDOW) % 8);
    };
    seek();
#pragma unroll
    for (int i = 0; i < WINDOW; i++) read(i);

    float sums[N / 2];
    u32 operand[2][4 * GROUP];
    const u32 first_columns = columns_at(shared_address(memory));
    u32 half = 0, parity = 0;
    while (unit < end) {
        const u32 tile = unit / STEPS, row_tile = tile % row_tiles, block = tile / row_tiles;
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
                        own.operand(operand[g % 2] + 4 * i, words[(g * GROUP + i) % WINDOW]);
                        refill(g * GROUP + i);
                    }
                const int stage = g * GROUP / DEEP, in_stage = g * GROUP % DEEP;
                const u32 columns = first_columns + stage * (STAGE / 16) + in_stage * 2 + (DEEP == 4 ? half * (2 * STAGE / 16) : 0);
                const u32 ready = full + 8 * stage + (DEEP == 4 ? half * 16 : 0);
                if (in_stage == 0) wait(ready, parity);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (int i = 0; i < GROUP; i++) multiply_add(sums, DIRECT ? words[(g * GROUP + i) % WINDOW] : operand[g % 2] + 4 * i, columns + i * 2);
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                // All products but these are done.
                if (DIRECT)
#pragma unroll
                    for (int i = 0; i < GROUP; i++) refill(g * GROUP + i - GROUP);
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

        const u32 rows = min(info.rows - row_tile * ROWS, (u32)ROWS);
        const u32 lead = ((u64)tile * STEPS * ranges + ranges - 1) / units, tail = (((u64)(tile + 1) * STEPS - 1) * ranges + ranges - 1) / units;
        // Parts of a tile that other blocks began, of one that others end, and of one's own.
        auto part = [&](u32 of) { return partial + ((u64)of * 3 + (of > lead ? 0 : lead < tail ? 1 : 2)) * ROWS * OUTS; };
        float* to = part(range) + warp * 16 + group;
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            const float* c = sums + 4 * j;
            if (PARTS == 2) {
                const u32 row = 4 * j + quad;
                if (row < rows) to[row * OUTS] = c[0] + c[1], to[row * OUTS + 8] = c[2] + c[3];
            } else {
                const u32 row = 8 * j + 2 * quad;
                if (row < rows) to[row * OUTS] = c[0], to[row * OUTS + 8] = c[2];
                if (row + 1 < rows) to[(row + 1) * OUTS] = c[1], to[(row + 1) * OUTS + 8] = c[3];
            }
        }
        if (lead < tail) {
            __threadfence();
            meet();
            if (threadIdx.x == 0) {
                is_last = atomicAdd(counters + lead, 1) == tail - lead;
                if (is_last) counters[lead] = 0;
            }
            meet();
            if (!is_last) continue;
            __threadfence();
        } else {
            meet();
        }
        for (u32 first = warp; first < 2 * rows; first += CONSUMERS * TOGETHER) {
            float v[TOGETHER][4] = {};
#pragma unroll 1
            for (u32 of = lead; of <= tail; of++) {
                float4 s[TOGETHER];
#pragma unroll
                for (int j = 0; j < TOGETHER; j++) {
                    const u32 i = first + j * CONSUMERS;
                    if (i < 2 * rows) s[j] = __ldcg((const float4*)(part(of) + i / 2 * OUTS + i % 2 * 128 + lane * 4));
                }
#pragma unroll
                for (int j = 0; j < TOGETHER; j++) v[j][0] += s[j].x, v[j][1] += s[j].y, v[j][2] += s[j].z, v[j][3] += s[j].w;
            }
#pragma unroll
            for (int j = 0; j < TOGETHER; j++) {
                const u32 i = first + j * CONSUMERS, row = i / 2, column = block * OUTS + i % 2 * 128 + lane * 4;
                if (i >= 2 * rows || column >= N_TILES * 16) continue;
                outputs(v[j], svh, column);
                float* to = out + (u64)(row_tile * ROWS + row) * OUTPUTS + column;
#if BIAS
#pragma unroll
                for (int c = 0; c < 4; c++)
                    if (column + c < WIDTH) v[j][c] += bias[column + c];
#endif
                if (OUTPUTS % 4 == 0 && WIDTH % 4 == 0) {
                    if (column < WIDTH) *(float4*)to = make_float4(v[j][0], v[j][1], v[j][2], v[j][3]);
                } else {
#pragma unroll
                    for (int c = 0; c < 4; c++)
                        if (column + c < WIDTH) to[c] = v[j][c];
                }
            }
        }
        if (lead == tail) meet();
    }
}

// Rows in the order of the second operand: a warp per 128 columns of a row.
extern "C" __global__ void __launch_bounds__(128) prepare(
    const float* __restrict__ x, const float* __restrict__ suh, u32* __restrict__ prepared)
{
    const u32 block = blockIdx.y * 4 + threadIdx.x / 32, row = blockIdx.x;
    if (block >= K_TILES / 8) return;
    const u32 column = block * 128 + threadIdx.x % 32 * 4, n = row % ROWS * PARTS;
    float v[4];
    inputs(v, x + (u64)row * INPUTS, suh, column);
    char* tile = (char*)prepared + (u64)(row / ROWS) * (K_TILES / DEEP) * STAGE;
#pragma unroll
    for (int p = 0; p < 2; p++) {
        u32 high, low;
        split(v[2 * p], v[2 * p + 1], high, low);
        const u32 at = pair_at(column) + p * PAIR_STEP, k = at % (16 * DEEP);
        char* stage = tile + (u64)(at / (16 * DEEP)) * STAGE;
        *(u32*)(stage + place(n, k)) = high;
        if (PARTS == 2) *(u32*)(stage + place(n + 1, k)) = low;
    }
}
