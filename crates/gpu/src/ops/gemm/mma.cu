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

extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) multiply(
    const u32* tiles, const char* x, const float* __restrict__ svh, const float* __restrict__ bias, const u32* order, const u32* table, const u32* slots,
    float* partial, u32* counters, float* __restrict__ out, const __grid_constant__ Info info)
{
    __shared__ __align__(128) unsigned char memory[STAGES * STAGE];
    wait_for_last();
    let_next_start();
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Routing routing = {order, table, slots, info.rows};
    const u32 row_tiles = routing.tiles(), end = first_unit(row_tiles, blockIdx.x + 1);
    u32 unit = first_unit(row_tiles, blockIdx.x);
    if (GROUPED && unit == end) return;
    const u32 first_stage = shared_address(memory);

    // Stages of inputs follow each other over tiles of rows, and begin again with the next outputs; past the last as well.
    u32 ahead = unit * (8 / DEEP) % (row_tiles * (K_TILES / DEEP));
    auto fetch = [&](u32 slot) {
        const char* from = x + (u64)ahead * STAGE;
#pragma unroll
        for (u32 i = 0; i < STAGE; i += 32 * WARPS * 16) {
            const u32 at = i + threadIdx.x * 16;
            if (STAGE % (32 * WARPS * 16) == 0 || at < STAGE)
                copy_later(first_stage + slot * STAGE + at, from + at);
        }
        end_copies();
        ahead++;
        if (ahead == again(row_tiles) * (K_TILES / DEEP)) ahead = 0;
    };
#pragma unroll
    for (u32 i = 0; i < STAGES - 1; i++) fetch(i);

    Weights<COUNT, WINDOW> weights(tiles, routing, warp * COUNT, row_tiles, unit, end);
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
                wait_for_copies<STAGES - 2>();
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
                        load_matrices(b, (own ^ k * 32) + j * 16 * LINE);
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

        const Tile of(routing, tile, again(row_tiles));
        float* to = of.part(partial, blockIdx.x) + warp * COUNT * 16 + lane / 4;
#pragma unroll
        for (int t = 0; t < COUNT; t++) of.leave(to + t * 16, sums[t]);
        of.finish<WARPS, TOGETHER>(partial, counters, svh, bias, out, warp, [] { __syncthreads(); });
    }
    wait_for_copies<0>();
}

#endif
