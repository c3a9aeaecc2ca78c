// Many rows times a matrix by products of single warps (mma.sync), which every device from sm_80 on has: after `common.cuh`, with 32, 64 or 128
// columns.
//
// A block is eight warps, each with two tiles of sixteen outputs, so that what a warp reads of the second operand is multiplied twice; all of them
// fetch inputs, three stages ahead.

#if !WGMMA

#define WARPS 8
#define COUNT 2
// Blocks of a multiprocessor, which have its registers to share.
#define RESIDENT (N > 32 ? 1 : 2)
// Runs of 128 outputs that a warp finishes at once.
#define TOGETHER (RESIDENT == 1 ? 4 : 2)
// Tiles of inputs that weights are decoded before they are multiplied, and those that their words are read ahead.
#define AHEAD (RESIDENT == 1)
#define WINDOW (HELD == 1 ? 8 : 4)

__device__ __forceinline__ void multiply_add(float* c, const u32* a, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." HALVES "." HALVES ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) multiply(
    const u32* tiles, const char* x, const float* __restrict__ svh, const float* __restrict__ bias,
    float* partial, u32* counters, float* __restrict__ out, const __grid_constant__ Info info)
{
    __shared__ __align__(128) unsigned char memory[STAGES * STAGE];
    wait_for_last();
    let_next_start();
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 end = first_unit(info.rows, blockIdx.x + 1);
    u32 unit = first_unit(info.rows, blockIdx.x);
    const u32 first_stage = shared_address(memory);

    // Stages of inputs follow each other over tiles of rows, and begin again with the next outputs; past the last as well.
    u32 ahead = unit * (8 / DEEP) % (row_tiles(info.rows) * (K_TILES / DEEP));
    auto fetch = [&](u32 slot) {
        const char* from = x + (u64)ahead * STAGE;
#pragma unroll
        for (u32 i = 0; i < STAGE; i += 32 * WARPS * 16) {
            const u32 at = i + threadIdx.x * 16;
            if (STAGE % (32 * WARPS * 16) == 0 || at < STAGE)
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(first_stage + slot * STAGE + at), "l"(from + at) : "memory");
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        ahead++;
        if (ahead == row_tiles(again(info.rows)) * (K_TILES / DEEP)) ahead = 0;
    };
#pragma unroll
    for (u32 i = 0; i < STAGES - 1; i++) fetch(i);

    Weights<COUNT, WINDOW> weights(tiles, warp * COUNT, info.rows, unit, end);
    // The lane's row of the first matrices of the second operand: sixteen columns, eight inputs and the next eight.
    const u32 own_row = place(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);

    float sums[COUNT][N / 2];
    u32 operand[2][COUNT][4];
    auto decode = [&](int at) {
#pragma unroll
        for (int t = 0; t < COUNT; t++) weights.own.operand(operand[at % 2][t], weights.words[at % WINDOW][t]);
        weights.refill(at % 8);
    };
    if (!DIRECT && AHEAD) decode(0);
    u32 slot = 0;
    while (unit < end) {
        const u32 tile = unit / STEPS;
        const u32 steps = min((tile + 1) * STEPS, end) - unit;
#pragma unroll
        for (int i = 0; i < COUNT * N / 2; i++) (&sums[0][0])[i] = 0;
        for (u32 step = steps; step > 0; step--) {
#pragma unroll
            for (int s = 0; s < 8 / DEEP; s++) {
                asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2) : "memory");
                __syncthreads();
                fetch((slot + STAGES - 1) % STAGES);
                const u32 own = first_stage + slot * STAGE + own_row;
#pragma unroll
                for (int k = 0; k < DEEP; k++) {
                    const int at = s * DEEP + k;
                    if (!DIRECT) decode(at + AHEAD);
#pragma unroll
                    for (int j = 0; j < N / 16; j++) {
                        u32 b[4];
                        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                            : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"((own ^ k * 32) + j * 16 * LINE) : "memory");
#pragma unroll
                        for (int t = 0; t < COUNT; t++) {
                            const u32* a = DIRECT ? weights.words[at % WINDOW][t] : operand[at % 2][t];
                            multiply_add(sums[t] + 8 * j, a, b[0], b[1]);
                            multiply_add(sums[t] + 8 * j + 4, a, b[2], b[3]);
                        }
                    }
                    if (DIRECT) weights.refill(at);
                }
                slot = (slot + 1) % STAGES;
            }
        }
        unit += steps;

        const Tile of(tile, again(info.rows));
        float* to = of.part(partial, blockIdx.x) + warp * COUNT * 16 + lane / 4;
#pragma unroll
        for (int t = 0; t < COUNT; t++) of.leave(to + t * 16, sums[t]);
        of.finish<WARPS, TOGETHER>(partial, counters, svh, bias, out, warp, [] { __syncthreads(); });
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

#endif
