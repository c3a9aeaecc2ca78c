// Rows times a trellis-coded matrix on NVIDIA's tensor cores.
//
// Defined before this text, besides what `codes.cuh` names: MATRICES over the same inputs (up to three), N_TILES_0 … and OUTPUTS_0 … of
// each, SETS (of four rows), INLINE (one row, rotated here), ENTRIES (each row has a matrix of its own; SHARE of them read one row of
// inputs), BIAS, RANGES (parts of the matrix), NT (tiles side by side that a warp takes), RESIDENT (blocks of a multiprocessor).
//
// The eight weights of a lane are, two by two, its four registers of the first operand of m16n8k16: one instruction takes a
// tile. The other operand holds four rows, each as f16 and what these leave. A matrix is cut evenly into ranges, in the order
// of its blocks of 128 columns; every warp writes the sums of its range, and `finish` adds and rotates them.

#define BLOCKS ((N_TILES_0 + N_TILES_1 + N_TILES_2) / 8)
#define UNITS ((u64)BLOCKS * K_TILES)
#define ACROSS (8 / NT)
#define WARPS 8
#define STAGES (TWICE_BITS <= 8 ? 4 : TWICE_BITS <= 12 ? 3 : 2)
#define ROWS (4 * SETS)
#define LINE (NT * WORDS)

// Of three values, the one of the matrix that a block of 128 columns of all of them is in.
#define OF(block, a, b, c) (MATRICES == 1 || (block) < N_TILES_0 / 8 ? (a) : MATRICES == 2 || (block) < (N_TILES_0 + N_TILES_1) / 8 ? (b) : (c))
#define FIRST(block) OF(block, 0u, N_TILES_0 / 8, (N_TILES_0 + N_TILES_1) / 8)

__device__ __forceinline__ void multiply_add(float* c, const u32* w, const u32* x) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(x[0]), "r"(x[1]));
}

// Puts four rotated values of a lane where the operand reads them: words [part][k tile][quad][half], a pair each.
__device__ __forceinline__ void place(const float* v, u32* high, u32* low) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (int p = 0; p < 2; p++) {
        const u32 at = (lane / 4 * 4 + lane % 2 * 2 + p) * 2 + lane / 2 % 2;
        split(v[2 * p], v[2 * p + 1], high[at], low[at]);
    }
}

#define ROTATED (COLUMNS / 2)
// Inputs of the next step are read ahead where there are registers for them.
#define AHEAD (SETS <= 4)

extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) multiply(
    const uint4* __restrict__ tiles_0, const uint4* __restrict__ tiles_1, const uint4* __restrict__ tiles_2, const u32* __restrict__ x,
    const float* __restrict__ suh_0, const float* __restrict__ suh_1, const float* __restrict__ suh_2, const u32* __restrict__ ids,
    const u32* __restrict__ slots, float* __restrict__ partial, const __grid_constant__ Info info)
{
    __shared__ __align__(16) u32 memory[WARPS * STAGES * LINE];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 quad = lane % 4, group = lane / 4;
    const u32 every = blockIdx.x * WARPS + warp;
    const u32 range = every / ACROSS, across = every % ACROSS;
    if (range >= RANGES) return;
#if ENTRIES
    const u32 first_row = blockIdx.y, rows = 1, slot = slots[ids[blockIdx.y]];
    if (slot == ~0u) return;
    tiles_0 += (u64)slot * K_TILES * N_TILES_0 * WORDS / 4;
    suh_0 += (u64)slot * COLUMNS;
#else
    const u32 first_row = blockIdx.y * ROWS, rows = min(info.rows - first_row, (u32)ROWS);
#endif
    partial += (u64)blockIdx.y * (BLOCKS + RANGES) * ROWS * 128;
    const u32 first_bit = lane * 4 * TWICE_BITS + TWICE_BITS / 2 + 128 * TWICE_BITS - 16;
    const u32 shift = first_bit % 32;
    u32 place_of[FETCHED];
#pragma unroll
    for (int i = 0; i < FETCHED; i++) place_of[i] = (first_bit / 32 + i) % WORDS;
    const u32* line = memory + warp * STAGES * LINE;
    const u32 ring = (u32)__cvta_generic_to_shared(line) + lane * 16;
#if MUL1
    const u32 mask = 0x1eee1eee, flip = 0xc931c931;
#else
    u32 mask = 0x8fff8fff, flip = 0x3b603b60;
    // In registers, or one instruction becomes two.
    asm volatile("" : "+r"(mask), "+r"(flip));
#endif
#if INLINE
    __shared__ __align__(16) u32 inputs_of[WARPS][128];
    const float* row = (const float*)x + (u64)(first_row / SHARE) * INPUTS;
    u32* own = inputs_of[warp];
#endif

    u32 unit = UNITS * range / RANGES;
    const u32 end = UNITS * (range + 1) / RANGES;
    while (unit < end) {
        const u32 block = unit / K_TILES;
        const u32 from = unit - block * K_TILES, to = min(end - block * K_TILES, (u32)K_TILES);
        unit = block * K_TILES + to;
        float sums[SETS][NT][4];
#pragma unroll
        for (int i = 0; i < SETS * NT * 4; i++) (&sums[0][0][0])[i] = 0;

        const u32 wide = OF(block, N_TILES_0, N_TILES_1, N_TILES_2);
        const uint4* next = OF(block, tiles_0, tiles_1, tiles_2) + ((u64)from * wide + (block - FIRST(block)) * 8 + across * NT) * (WORDS / 4) + lane;
        u32 left = to - from, put = ring;
        auto fetch = [&]() {
            if (left > 0) {
#pragma unroll
                for (int i = 0; i < (LINE / 4 + 31) / 32; i++)
                    if (LINE / 4 % 32 == 0 || lane + i * 32 < LINE / 4)
                        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(put + i * 512), "l"(next + i * 32));
                next += wide * (WORDS / 4);
                left--;
                put = put == ring + (STAGES - 1) * LINE * 4 ? ring : put + LINE * 4;
            }
            asm volatile("cp.async.commit_group;");
        };
        const u32* words = line;
#pragma unroll
        for (int i = 0; i < STAGES; i++) fetch();
#if INLINE
        const float* suh = OF(block, suh_0, suh_1, suh_2);
        float4 ahead = scaled(row, suh, from / 8 * 128 + lane * 4);
#else
        u32 raw[SETS][2];
        const u32* operand = x + ((u64)(OF(block, 0, 1, 2) * info.rows + first_row + group / 2) * 2 + group % 2) * ROTATED + quad * 2;
        auto inputs = [&](u32 kt) {
#pragma unroll
            for (int s = 0; s < SETS; s++) {
                const u32 r = group / 2 + s * 4;
                const bool there = r < rows && kt < to;
                const uint2 v = there ? *(const uint2*)(operand + s * 8 * ROTATED + kt * 8) : make_uint2(0, 0);
                raw[s][0] = v.x; raw[s][1] = v.y;
            }
        };
        if (AHEAD) inputs(from);
#endif
        for (u32 kt = from; kt < to; kt++) {
            u32 b[SETS][2];
#if INLINE
            if (kt == from || kt % 8 == 0) {
                float v[4] = {ahead.x, ahead.y, ahead.z, ahead.w};
                rotate(v);
                __syncwarp();
                place(v, own, own + 64);
                __syncwarp();
                if ((kt / 8 + 1) * 8 < to) ahead = scaled(row, suh, (kt / 8 + 1) * 128 + lane * 4);
            }
            {
                const u32* at = own + (group * 32 + kt % 8 * 4 + quad) * 2;
                uint2 v = group < 2 ? *(const uint2*)at : make_uint2(0, 0);
                b[0][0] = v.x; b[0][1] = v.y;
            }
#else
            if (!AHEAD) inputs(kt);
#pragma unroll
            for (int s = 0; s < SETS; s++)
#pragma unroll
                for (int i = 0; i < 2; i++) b[s][i] = raw[s][i];
            if (AHEAD) inputs(kt + 1);
#endif
            asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1));
            __syncwarp();
#pragma unroll
            for (int t = 0; t < NT; t++) {
                u32 w[FETCHED], s[8];
#pragma unroll
                for (int i = 0; i < FETCHED; i++) w[i] = words[t * WORDS + place_of[i]];
                states(w, shift, s);
                u32 a[4];
                a[0] = weights(s[0], s[1], mask, flip);
                a[1] = weights(s[4], s[5], mask, flip);
                a[2] = weights(s[2], s[3], mask, flip);
                a[3] = weights(s[6], s[7], mask, flip);
#pragma unroll
                for (int set = 0; set < SETS; set++) multiply_add(sums[set][t], a, b[set]);
            }
            __syncwarp();
            fetch();
            words = words == line + (STAGES - 1) * LINE ? line : words + LINE;
        }
        asm volatile("cp.async.wait_all;");
        float* to_block = partial + ((u64)block + range) * ROWS * 128;
#pragma unroll
        for (int set = 0; set < SETS; set++) {
            const u32 r = set * 4 + quad;
            if (r < rows)
#pragma unroll
                for (int t = 0; t < NT; t++) {
                    float* at = to_block + r * 128 + (across * NT + t) * 16 + group;
                    const float* c = sums[set][t];
                    at[0] = c[0] + c[1];
                    at[8] = c[2] + c[3];
                }
        }
        __syncwarp();
    }
}

// Adds the parts of 128 columns of a row, rotates and scales them. A warp adds the parts of every eighth range; these lie in
// order, so that the sum depends on the matrix alone.
#define SHARES (RANGES / BLOCKS + 2)

extern "C" __global__ void __launch_bounds__(256) finish(
    const float* __restrict__ partial, const float* __restrict__ svh_0, const float* __restrict__ svh_1, const float* __restrict__ svh_2,
    const float* __restrict__ bias_0, const float* __restrict__ bias_1, const float* __restrict__ bias_2, const u32* __restrict__ ids,
    const u32* __restrict__ slots, float* __restrict__ out_0, float* __restrict__ out_1, float* __restrict__ out_2)
{
    __shared__ float4 sums[8][32];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, block = blockIdx.x, row = blockIdx.y;
    const float *svh = OF(block, svh_0, svh_1, svh_2), *bias = OF(block, bias_0, bias_1, bias_2);
    float* out = OF(block, out_0, out_1, out_2);
    const u32 outputs = OF(block, OUTPUTS_0, OUTPUTS_1, OUTPUTS_2);
#if ENTRIES
    const u32 slot = slots[ids[row]];
    if (slot == ~0u) return;
    svh += (u64)slot * (N_TILES_0 * 16);
    bias += (u64)slot * outputs;
    partial += (u64)row * (BLOCKS + RANGES) * ROWS * 128;
#else
    partial += (u64)(row / ROWS) * (BLOCKS + RANGES) * ROWS * 128 + row % ROWS * 128;
#endif
    const u32 column = (block - FIRST(block)) * 128 + lane * 4;
    const float4 scale = *(const float4*)(svh + column);
    const u32 lead = ((u64)block * K_TILES * RANGES + RANGES - 1) / UNITS, tail = ((u64)(block + 1) * K_TILES * RANGES - 1) / UNITS;
    float4 part[(SHARES + 7) / 8];
#pragma unroll
    for (int i = 0; i < (SHARES + 7) / 8; i++) {
        const u32 range = lead + warp + i * 8;
        part[i] = range <= tail ? *(const float4*)(partial + ((u64)block + range) * ROWS * 128 + lane * 4) : make_float4(0, 0, 0, 0);
    }
    float4 sum = part[0];
#pragma unroll
    for (int i = 1; i < (SHARES + 7) / 8; i++)
        sum.x += part[i].x, sum.y += part[i].y, sum.z += part[i].z, sum.w += part[i].w;
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0) return;
    float v[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float4 s = sums[i][lane];
        v[0] += s.x; v[1] += s.y; v[2] += s.z; v[3] += s.w;
    }
    rotate(v);
    const float scales[4] = {scale.x, scale.y, scale.z, scale.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (column + i < outputs) {
            float y = v[i] * scales[i];
#if BIAS
            y += bias[column + i];
#endif
            out[(u64)row * outputs + column + i] = y;
        }
}

// x times suh, rotated, in the order of the operand: a warp per 128 columns of a row, for one matrix after the other.
extern "C" __global__ void __launch_bounds__(32) prepare(
    const float* __restrict__ x, const float* __restrict__ suh_0, const float* __restrict__ suh_1, const float* __restrict__ suh_2,
    u32* __restrict__ rotated, const __grid_constant__ Info info)
{
    const u32 block = blockIdx.x, row = blockIdx.y, matrix = row / info.rows;
    const float* suh = matrix == 0 ? suh_0 : matrix == 1 ? suh_1 : suh_2;
    float4 f = scaled(x + (u64)(row % info.rows) * INPUTS, suh, block * 128 + threadIdx.x * 4);
    float v[4] = {f.x, f.y, f.z, f.w};
    rotate(v);
    u32* high = rotated + (u64)row * 2 * ROTATED + block * (32 * 2);
    place(v, high, high + ROTATED);
}
