// What both products of many rows share, `wgmma.cu` and `mma.cu`, after the text of their weights: rows in the order of the second operand, how the
// work is cut, sums of blocks added up.
//
// Defined before this text, besides what `trellis.cuh` and `plain.cuh` say: WGMMA (which of the two), N (columns of the second operand), PARTS (2: a
// row is halves and what these leave, two columns; 1: halves alone), OUTPUTS (from a row of results to the next), WIDTH (outputs of the matrix),
// BIAS, GROUPED (rows are entries of a routing, sorted by their experts, whose matrices are a stack; SHARE of them read one row of inputs; a
// launch is told how many tiles of them there may be), HEADS (that many rows follow each other, of which each has a matrix of its own, side by side;
// 0 where all rows meet one), and BRAIN (halves are bf16).
//
// A lane's eight weights of a tile are its part of the first operand, in registers; the second lies in shared memory. Depth, outputs and tiles of
// rows together are cut evenly over the blocks of a launch. A tile of outputs that several blocks share is added up, in order, and finished by the
// one that comes last.

#define OUTS 256
#define BLOCKS ((N_TILES + 15) / 16)
// Steps of 128 inputs, eight tiles.
#define STEPS (K_TILES / 8)
#define ROWS (N / PARTS)
// Tiles of a stage, bytes of a column of it, and stages: those of one step or of two.
#define DEEP (N > 64 ? 2 : 4)
#define LINE (DEEP * 32)
#define STAGE (N * LINE)
#define STAGES 4
// Parts of a tile of outputs that are read at once.
#define AT_ONCE 2

// A value that the compiler does not know: what follows from it is computed again, not held in registers meanwhile.
__device__ __forceinline__ u32 again(u32 v) {
    hide(v);
    return v;
}

// Byte of a stage where column `n` has input `k`: sixteen bytes change places with others by the column's number.
__device__ __forceinline__ u32 place(u32 n, u32 k) {
    const u32 mixed = DEEP == 4 ? n % 8 : n / 2 % 4;
    return n * LINE + ((k / 8) ^ mixed) * 16 + k % 8 * 2;
}

// From a k tile's tiles of outputs to the next one's.
#define STRIDE (HEADS ? HEADS * N_TILES : N_TILES)

// Which rows a tile of rows has, and which matrix: of entries their order, expert, first and rows of every tile, and where experts lie in a stack.
struct Routing {
    const u32 *order, *table, *slots;
    // Rows, or tiles that there may be.
    u32 all;

    __device__ __forceinline__ u32 tiles_of_head() const { return (all + ROWS - 1) / ROWS; }
    __device__ __forceinline__ u32 rows(u32 tile) const {
        return GROUPED ? table[3 * tile + 2] : min(all - (HEADS ? tile % tiles_of_head() : tile) * ROWS, (u32)ROWS);
    }
    // What `row` is told of a tile's first row, and the row that is as many further on.
    __device__ __forceinline__ u32 first(u32 tile) const { return GROUPED ? table[3 * tile + 1] : (HEADS ? tile % tiles_of_head() : tile) * ROWS; }
    __device__ __forceinline__ u32 row(u32 tile, u32 place) const { return GROUPED ? order[place] : HEADS ? place * HEADS + tile / tiles_of_head() : place; }
    __device__ __forceinline__ u32 slot(u32 tile) const { return GROUPED ? slots[table[3 * tile]] : HEADS ? tile / tiles_of_head() : 0; }

    // Tiles of rows; those of a routing are counted by all threads of a block.
    __device__ __forceinline__ u32 tiles() const {
        if (!GROUPED) return tiles_of_head() * (HEADS ? HEADS : 1);
        u32 count = 0;
        for (u32 first = 0; first < all; first += blockDim.x) {
            const u32 tile = first + threadIdx.x;
            count += __syncthreads_count(tile < all && table[3 * tile + 2] > 0);
        }
        return count;
    }
};

// Steps of all tiles of outputs, of so many tiles of rows, and the first of a block's part of them.
__device__ __forceinline__ u32 units(u32 row_tiles) { return BLOCKS * row_tiles * STEPS; }
// Blocks of threads that have something to do; of a routing there may be less of it than was thought possible.
__device__ __forceinline__ u32 ranges(u32 row_tiles) { return GROUPED ? max(1u, min(gridDim.x, units(row_tiles))) : gridDim.x; }
__device__ __forceinline__ u32 first_unit(u32 row_tiles, u32 range) {
    return (u64)units(row_tiles) * min(range, ranges(row_tiles)) / ranges(row_tiles);
}

// Weights of COUNT tiles side by side, `from` of the sixteen of a block on, of WINDOW steps of sixteen inputs: read ahead over the ends of tiles of
// outputs, and past the last, the last again.
template <int COUNT, int WINDOW>
struct Weights {
    const Lane own;
    const u32* tiles;
    const Routing routing;
    const u32* source[SOURCES];
    u32 words[WINDOW][COUNT][HELD], from, row_tiles, next, end, left;

    __device__ __forceinline__ Weights(const u32* tiles, Routing routing, u32 from, u32 row_tiles, u32 first, u32 end)
        : own(threadIdx.x % 32), tiles(tiles), routing(routing), from(from), row_tiles(row_tiles), next(first), end(end)
    {
        seek();
#pragma unroll
        for (int i = 0; i < WINDOW; i++) read(i);
    }

    __device__ __forceinline__ void seek() {
        left = ~0u;
        if (next < end) {
            const u32 tile = next / STEPS, step = next - tile * STEPS;
            const u32 block = tile / again(row_tiles), column = min(block * 16 + from, (u32)N_TILES - COUNT);
            const u32* at = tiles + ((u64)step * 8 * STRIDE + column) * WORDS;
            if (GROUPED || HEADS) {
                // Of an expert in another stack the first one's, for nothing.
                const u32 slot = routing.slot(tile - block * row_tiles);
                at += slot == ~0u ? 0 : (u64)slot * (HEADS ? 1 : K_TILES) * N_TILES * WORDS;
            }
            const Lane lane(again(threadIdx.x % 32));
#pragma unroll
            for (int j = 0; j < SOURCES; j++) source[j] = at + lane.place_of[j];
            left = min((u32)STEPS - step, end - next);
            next += left;
        }
    }

    __device__ __forceinline__ void read(int i) {
#pragma unroll
        for (int t = 0; t < COUNT; t++) own.read(words[i % WINDOW][t], source, ((u64)i * STRIDE + t) * WORDS);
    }

    __device__ __forceinline__ void advance() {
        left--;
        if (left == 0) {
            seek();
            if (left != ~0u) return;
        } else if (left < ~0u - 1) {
#pragma unroll
            for (int j = 0; j < SOURCES; j++) source[j] += (u64)8 * STRIDE * WORDS;
        }
    }

    // Reads what comes WINDOW tiles after the one that is done with.
    __device__ __forceinline__ void refill(int at) {
        if (at == 8 - WINDOW) advance();
        read((at + 8 + WINDOW) % 8);
    }
};

// A tile of outputs of ROWS rows, and the blocks that have a part in it.
struct Tile {
    u32 block, row_tile, rows, lead, tail;
    const Routing routing;

    __device__ __forceinline__ Tile(Routing routing, u32 tile, u32 row_tiles) : routing(routing) {
        const u32 ranges = ::ranges(row_tiles);
        block = tile / row_tiles, row_tile = tile % row_tiles;
        rows = routing.rows(row_tile);
        lead = ((u64)tile * STEPS * ranges + ranges - 1) / units(row_tiles);
        tail = (((u64)(tile + 1) * STEPS - 1) * ranges + ranges - 1) / units(row_tiles);
    }

    // Parts of a tile that other blocks began, of one that others end, and of one's own.
    __device__ __forceinline__ float* part(float* partial, u32 of) const {
        return partial + ((u64)of * 3 + (of > lead ? 0 : lead < tail ? 1 : 2)) * ROWS * OUTS;
    }

    // Puts the sums of a warp's sixteen outputs where the lane's first of them is.
    __device__ __forceinline__ void leave(float* to, const float* sums) const {
        const u32 quad = threadIdx.x % 4;
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
    }

    // Adds up the parts and writes outputs, where this block is the last of those that have one. WARPS warps, which `meet`, take TOGETHER runs of 128
    // outputs at once.
    template <int WARPS, int TOGETHER, class Meet>
    __device__ __forceinline__ void finish(float* partial, u32* counters, const float* svh, const float* bias, float* out, u32 warp, Meet meet) const {
        __shared__ u32 is_last;
        const u32 lane = threadIdx.x % 32;
        if (lead < tail) {
            __threadfence();
            meet();
            if (threadIdx.x == 0) {
                is_last = atomicAdd(counters + lead, 1) == tail - lead;
                if (is_last) counters[lead] = 0;
            }
            meet();
            if (!is_last) return;
            __threadfence();
        } else {
            meet();
        }
        const u32 slot = routing.slot(row_tile), place = routing.first(row_tile);
        const u32 count = slot == ~0u ? 0 : 2 * rows;
        if (GROUPED) svh += (u64)slot * N_TILES * 16, bias += (u64)slot * OUTPUTS;
        for (u32 first = warp; first < count; first += WARPS * TOGETHER) {
            float v[TOGETHER][4] = {};
            // The runs that a warp takes lie equally far apart.
            const float* from = part(partial, lead) + first / 2 * OUTS + first % 2 * 128 + lane * 4;
            auto add = [&](int j, float4 s) { v[j][0] += s.x, v[j][1] += s.y, v[j][2] += s.z, v[j][3] += s.w; };
#pragma unroll
            for (int j = 0; j < TOGETHER; j++)
                if (first + j * WARPS < count) add(j, __ldcg((const float4*)(from + j * (WARPS / 2 * OUTS))));
            from = part(partial, lead + 1) + (from - part(partial, lead));
#pragma unroll 1
            for (u32 of = lead + 1; of <= tail; of += AT_ONCE, from += AT_ONCE * 3 * ROWS * OUTS) {
                float4 s[AT_ONCE][TOGETHER] = {};
#pragma unroll
                for (int p = 0; p < AT_ONCE; p++)
#pragma unroll
                    for (int j = 0; j < TOGETHER; j++)
                        if (of + p <= tail && first + j * WARPS < count) s[p][j] = __ldcg((const float4*)(from + p * (3 * ROWS * OUTS) + j * (WARPS / 2 * OUTS)));
#pragma unroll
                for (int p = 0; p < AT_ONCE; p++)
#pragma unroll
                    for (int j = 0; j < TOGETHER; j++) add(j, s[p][j]);
            }
#pragma unroll
            for (int j = 0; j < TOGETHER; j++) {
                const u32 i = first + j * WARPS, row = i / 2, column = block * OUTS + i % 2 * 128 + lane * 4;
                if (i >= count || column >= N_TILES * 16) continue;
                outputs(v[j], svh, column);
                float* to = out + (u64)routing.row(row_tile, place + row) * OUTPUTS + column;
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
};

// Rows in the order of the second operand: a warp per 128 columns of a row.
extern "C" __global__ void __launch_bounds__(128) prepare(
    const float* x, const float* up, const float* __restrict__ suh, const u32* order, const u32* table, const u32* slots, u32* __restrict__ prepared,
    const __grid_constant__ Info info)
{
    let_next_start();
    wait_for_last();
    const u32 block = blockIdx.y * 4 + threadIdx.x / 32, tile_of = blockIdx.x / ROWS, in_tile = blockIdx.x % ROWS;
    const Routing routing = {order, table, slots, info.rows};
    const u32 slot = routing.slot(tile_of);
    if (block >= K_TILES / 8 || in_tile >= routing.rows(tile_of) || slot == ~0u) return;
    if (GROUPED) suh += (u64)slot * (K_TILES * 16);
    const u64 row = routing.row(tile_of, routing.first(tile_of) + in_tile) / SHARE;
    const u32 column = block * 128 + threadIdx.x % 32 * 4, n = in_tile * PARTS;
    float v[4];
    inputs(v, x + row * INPUTS, up + row * INPUTS, suh, column);
    char* tile = (char*)prepared + (u64)tile_of * (K_TILES / DEEP) * STAGE;
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
