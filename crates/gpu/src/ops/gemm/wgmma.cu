// Many rows times a matrix by products of warpgroups (wgmma), which only sm_90a has: after `warpgroups.cuh`, with 64, 96 or 128 columns.
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

extern "C" __global__ void __launch_bounds__(32 * (CONSUMERS + 4), 1) multiply(
    const u32* tiles, const u32* x, const float* __restrict__ svh, const float* __restrict__ bias, const u32* order, const u32* table, const u32* slots,
    float* partial, u32* counters, float* __restrict__ out, const __grid_constant__ Info info)
{
    __shared__ __align__(1024) unsigned char memory[STAGES * STAGE];
    __shared__ __align__(8) u64 barriers[2 * STAGES];
    const u32 lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const Routing routing = {order, table, slots, info.rows};
    if (GROUPED) wait_for_last();
    const u32 row_tiles = routing.tiles(), end = first_unit(row_tiles, blockIdx.x + 1);
    u32 unit = first_unit(row_tiles, blockIdx.x);
    if (GROUPED && unit == end) return;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2 * STAGES; i++) make_barrier(shared_address(barriers + i), i < STAGES ? 1 : CONSUMERS);
        barriers_are_made();
    }
    __syncthreads();
    const u32 full = shared_address(barriers), empty = full + 8 * STAGES;

    if (warp >= CONSUMERS) {
        give_registers();
        if (warp > CONSUMERS) return;
        wait_for_last();
        let_next_start();
        u32 stage = 0, parity = 1;
        for (; unit < end; unit++) {
            const u32 tile = unit / STEPS, step = unit - tile * STEPS, row_tile = tile % row_tiles;
#pragma unroll
            for (int i = 0; i < 8 / DEEP; i++) {
                // Who multiplies with the first stage gives the last one back before there was anything in it.
                wait(empty + 8 * stage, stage == STAGES - 1 ? parity ^ 1 : parity);
                if (lane == 0) {
                    const char* from = (const char*)x + ((u64)row_tile * (K_TILES / DEEP) + step * (8 / DEEP) + i) * STAGE;
                    expect<STAGE>(full + 8 * stage);
                    fetch<STAGE>(shared_address(memory + stage * STAGE), from, full + 8 * stage);
                }
                __syncwarp();
                stage++;
                if (stage == STAGES) stage = 0, parity ^= 1;
            }
        }
        return;
    }

    take_registers();
    // Halves were written by a launch before; codes of a trellis were there.
    if (DIRECT) wait_for_last();
    Weights<1, WINDOW> weights(tiles, routing, warp, row_tiles, unit, end);
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
                begin_products();
#pragma unroll
                for (int i = 0; i < GROUP; i++) multiply_add_all(sums, DIRECT ? weights.words[(g * GROUP + i) % WINDOW][0] : operand[g % 2] + 4 * i, columns + i * 2);
                end_products();
                wait_for_products<1>();
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
        wait_for_products<0>();
#pragma unroll
        for (int i = 0; i < N / 2; i++) is_whole(sums[i]);
        unit += steps;

        const Tile of(routing, tile, again(row_tiles));
        of.leave(of.part(partial, blockIdx.x) + warp * 16 + lane / 4, sums);
        of.finish<CONSUMERS, TOGETHER>(partial, counters, svh, bias, out, warp, meet);
    }
}

#endif
