// Rows times a trellis-coded matrix on NVIDIA's tensor cores.
//
// Defined before this text, besides what `codes.cuh` names: MATRICES over the same inputs (up to three), N_TILES_0 … and OUTPUTS_0 … of
// each, SETS (of four rows), INLINE (one row, rotated here), ENTRIES (each row has matrices of its own; SHARE of them read one row of
// inputs; a launch is told the first), GROUPED (entries lie by their matrices, up to ROWS of which are a tile), BIAS, RANGES (parts of the matrices),
// NT (tiles side by side that a warp takes), BESIDE (blocks of 128 outputs side by side, a band, that a block of threads takes), TOUCHED and GROUPS (bands,
// and runs of 128 inputs in them, that its ranges lie in, at most), RESIDENT (blocks of a multiprocessor).
//
// MUL1: the four bytes of a state's product are four inputs of one output, so the bytes of a lane's eight weights are the first operands of two
// products of bytes, m16n8k32, whose sums are exact. A row is bytes too, high and low ones of 16 bits, each byte four times.
// Others: the eight weights of a lane are, two by two, its four registers of the first operand of m16n8k16; a row is halves and what these leave.
//
// Matrices are cut evenly into ranges, in the order of their bands, two tiles of inputs at a time. The sums of ranges are added in their order: for one row
// within a block of threads, then by the last that has a part of them; for more by `finish`.

#define BLOCKS ((N_TILES_0 + N_TILES_1 + N_TILES_2) / 8)
#define PAIRS (K_TILES / 2)
// Bands of BESIDE blocks of columns, of which the last may lack some.
#define BANDS ((BLOCKS + BESIDE - 1) / BESIDE)
#if BANDS * PAIRS * RANGES < 4000000000
#define UNITS ((u32)BANDS * PAIRS)
#else
#define UNITS ((u64)BANDS * PAIRS)
#endif
#define ACROSS (8 / NT)
#define WARPS 8
// Groups of 128 inputs that a warp rotates, of those that its block of threads needs.
#define TURNS ((GROUPS + WARPS - 1) / WARPS)
// Ranges of a block of threads.
#define SHARES (WARPS / ACROSS / BESIDE)
#define ROWS (4 * SETS)
// Whether a range is long.
#define LARGE (!ENTRIES && UNITS / RANGES >= 4)
// Tiles of a pair that are asked for at once. Where many follow, half of them wait: the inputs shall not lie behind them in the queue of memory.
#define AT_FIRST (INLINE && LARGE ? NT : 2 * NT)

// Of three values, the one of the matrix that a block of 128 columns of all of them is in.
#define OF(block, a, b, c) (MATRICES == 1 || (block) < N_TILES_0 / 8 ? (a) : MATRICES == 2 || (block) < (N_TILES_0 + N_TILES_1) / 8 ? (b) : (c))
#define FIRST(block) OF(block, 0u, N_TILES_0 / 8, (N_TILES_0 + N_TILES_1) / 8)

// The range that a pair of tiles is in.
__device__ __forceinline__ u32 range_of(u32 unit) { return ((decltype(UNITS))(unit + 1) * RANGES - 1) / UNITS; }

// Words of a k tile that a lane reads, and all; in shared memory bytes are words.
#define READ (!MUL1 ? 2 : INLINE ? 4 : 1)
#define PER_TILE (8 * READ)
// From a k tile to the next. In shared memory lanes that write eight of them shall not meet in a bank.
#define SPACING (INLINE ? PER_TILE + 4 : PER_TILE)
// Pairs of tiles whose prepared inputs share a scale; in shared memory all of a band do.
#define SEGMENT 4

#if MUL1
typedef int Sum;
// Words of a prepared row: bytes, the sums of every 32 inputs, what every 128 were divided by.
#define ROW (K_TILES * 8 + K_TILES / 2 + K_TILES / 8)
// What a weight is: a sum of bytes less 510, times STEP, and OFFSET.
#define STEP 0.00676727294921875
#define OFFSET (1534 * STEP - 10.3828125)

// The largest of a warp's rotated values, as the bits of a float. Values that are no numbers are the largest.
__device__ __forceinline__ u32 largest(const float* v) {
    const float most = fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3])));
    return __reduce_max_sync(~0u, v[0] + v[1] + v[2] + v[3] == v[0] + v[1] + v[2] + v[3] ? __float_as_uint(most) : 0x7fffffff);
}

// Puts four rotated values of a lane, of 16 bits when divided by the largest, where the operand reads them: [k tile][high, low][quad] of inputs 2 q, 2 q + 1 and
// those 8 further on, bytes, or words of four times the byte. Tells the lane the sum of its 32 inputs.
__device__ __forceinline__ int place(const float* v, float most, u32* to) {
    const u32 lane = threadIdx.x % 32;
    const float factor = most > 0 ? __fdividef(32639.0f, most) : 0.0f;
    const u32 half = lane / 2 % 2;
    to += lane / 4 * SPACING + lane % 2 * 2 * READ;
    int sum = 0;
#pragma unroll
    for (int p = 0; p < 2; p++) {
        const int a = __float2int_rn(v[2 * p] * factor), b = __float2int_rn(v[2 * p + 1] * factor);
        sum += a + b;
#if INLINE
        uint2* words = (uint2*)(to + p * READ) + half;
        words[0] = make_uint2(__byte_perm(a + 128, 0, 0x1111), __byte_perm(b + 128, 0, 0x1111));
        words[8] = make_uint2(__byte_perm(a, 0, 0x0000), __byte_perm(b, 0, 0x0000));
#else
        unsigned short* bytes = (unsigned short*)(to + p) + half;
        bytes[0] = (a + 128 >> 8 & 0xff) | (b + 128 & 0xff00);
        bytes[8] = (a & 0xff) | (b & 0xff) << 8;
#endif
    }
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    return sum;
}

// The sum of products of weights and inputs, of what the products of bytes and the sum of inputs `n` are; both are exact.
__device__ __forceinline__ float total(const Sum* c, int n, float scale) {
#if INLINE
    const long long sum = (long long)c[0] * 256 + c[1] - 510ll * n;
#else
    // The difference fits, whatever overflows before.
    const int sum = (u32)c[0] * 256 + (u32)c[1] - 510u * (u32)n;
#endif
    return scale * ((float)sum * (float)STEP + (float)n * (float)OFFSET);
}
#else
typedef float Sum;
#define ROW COLUMNS

// Puts four rotated values of a lane where the operand reads them: words [k tile][halves, what these leave][quad][half], a pair each.
__device__ __forceinline__ void place(const float* v, u32* to) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (int p = 0; p < 2; p++) {
        u32* at = to + lane / 4 * SPACING + (lane % 2 * 2 + p) * READ + lane / 2 % 2;
        split(v[2 * p], v[2 * p + 1], at[0], at[8]);
    }
}
#endif
#if INLINE
// Sums that one block of threads leaves for another, which waits for them: every word is EMPTY until it is there, and when it was read. Blocks of
// threads start in order, so those that are waited for have.
#define EMPTY 0xffffffffu

__device__ __forceinline__ void put(float* to, float4 v) {
    u32 w[4] = {__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)};
#pragma unroll
    for (int i = 0; i < 4; i++) w[i] = w[i] == EMPTY ? 0x7fffffffu : w[i];
    put_words(to, w);
}

__device__ __forceinline__ bool get(float4& v, const float* from) {
    u32 w[4];
    get_words(w, from);
    v = make_float4(__uint_as_float(w[0]), __uint_as_float(w[1]), __uint_as_float(w[2]), __uint_as_float(w[3]));
    return w[0] != EMPTY && w[1] != EMPTY && w[2] != EMPTY && w[3] != EMPTY;
}

__device__ __forceinline__ void clear(float* p) { *(uint4*)p = make_uint4(EMPTY, EMPTY, EMPTY, EMPTY); }
#endif

// Rotates, scales and writes four sums of a lane, of a row of its matrix.
__device__ __forceinline__ void write(float4 sum, float4 scale, const float* bias, u32 column, u32 outputs, float* out) {
    float v[4] = {sum.x, sum.y, sum.z, sum.w};
    rotate(v);
    const float scales[4] = {scale.x, scale.y, scale.z, scale.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (column + i < outputs) {
            float y = v[i] * scales[i];
#if BIAS
            y += bias[column + i];
#endif
            out[column + i] = y;
        }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) multiply(
    const u32* __restrict__ tiles_0, const u32* __restrict__ tiles_1, const u32* __restrict__ tiles_2, const u32* x, const float* up,
    const float* __restrict__ suh_0, const float* __restrict__ suh_1, const float* __restrict__ suh_2,
    const float* __restrict__ svh_0, const float* __restrict__ svh_1, const float* __restrict__ svh_2,
    const float* __restrict__ bias_0, const float* __restrict__ bias_1, const float* __restrict__ bias_2,
    const u32* ids, const u32* order, const u32* __restrict__ slots, float* partial, float* __restrict__ out_0, float* __restrict__ out_1,
    float* __restrict__ out_2, const __grid_constant__ Info info)
{
    const u32 lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const u32 quad = lane % 4, group = lane / 4;
    const u32 range = blockIdx.x * SHARES + warp / ACROSS % SHARES, across = warp % ACROSS, beside = warp / ACROSS / SHARES;
    // The block of columns of a unit; a warp whose band lacks it takes the last.
    auto block_of = [&](u32 unit) { return min(unit / PAIRS * BESIDE + beside, (u32)BLOCKS - 1); };
#if ENTRIES
    wait_for_last();
    let_next_start();
#if GROUPED
    const u32 rows = ids[blockIdx.y * 3 + 2], slot = slots[ids[blockIdx.y * 3]];
    if (rows == 0) return;
    order += ids[blockIdx.y * 3 + 1];
#else
    const u32 slot = slots[ids[info.rows + blockIdx.y]];
#endif
    if (slot == ~0u) return;
    tiles_0 += (u64)slot * K_TILES * N_TILES_0 * WORDS, tiles_1 += (u64)slot * K_TILES * N_TILES_1 * WORDS, tiles_2 += (u64)slot * K_TILES * N_TILES_2 * WORDS;
    suh_0 += (u64)slot * COLUMNS, suh_1 += (u64)slot * COLUMNS, suh_2 += (u64)slot * COLUMNS;
#endif
    u32 unit = range < RANGES ? UNITS * range / RANGES : 0;
    const u32 end = range < RANGES ? UNITS * (range + 1) / RANGES : 0;
#if INLINE
    __shared__ __align__(16) float sums_of[TOUCHED][WARPS / ACROSS][128];
    __shared__ __align__(16) u32 inputs_of[GROUPS][8 * SPACING];
#if MUL1
    __shared__ int counts_of[GROUPS * 4];
    __shared__ u32 largest_of[TOUCHED];
#endif
    const u32 first_range = blockIdx.x * SHARES, last_range = min(first_range + SHARES, (u32)RANGES) - 1;
    const u32 first_unit = UNITS * first_range / RANGES, past = UNITS * (last_range + 1) / RANGES;
    const u32 first_band = first_unit / PAIRS, first_group = first_unit / 4;
    const float* row = (const float*)x + (u64)((info.rows + blockIdx.y) / SHARE) * INPUTS;
    up += (u64)((info.rows + blockIdx.y) / SHARE) * INPUTS;
#else
#if GROUPED
    auto row_of = [&](u32 block, u32 i) { return OF(block, 0, 1, 2) * info.rows + order[min(i, rows - 1)]; };
#else
    const u32 first_row = blockIdx.y * ROWS, rows = min(info.rows - first_row, (u32)ROWS);
    auto row_of = [&](u32 block, u32 i) { return OF(block, 0, 1, 2) * info.rows + first_row + min(i, rows - 1); };
#endif
    partial += (u64)blockIdx.y * (BLOCKS + RANGES) * ROWS * 128;
    if (unit == end) {
        wait_for_last();
        return;
    }
#endif

    const Lane own(lane);
    // Weights are read ahead, over the ends of blocks too.
    const u32* source[SOURCES];
    u32 words[2 * NT][SOURCES], next = unit, wide = 0, left = 0;
    auto seek = [&]() {
        const u32 block = block_of(next), pair = next % PAIRS;
        wide = OF(block, N_TILES_0, N_TILES_1, N_TILES_2);
        const u32* from = OF(block, tiles_0, tiles_1, tiles_2) + ((u64)pair * 2 * wide + (block - FIRST(block)) * 8 + across * NT) * WORDS;
#pragma unroll
        for (int j = 0; j < SOURCES; j++) source[j] = from + own.place_of[j];
        left = PAIRS - pair;
    };
    auto read = [&](int i) { own.read(words[i], source, ((u64)(i / NT) * (MATRICES == 1 ? N_TILES_0 : wide) + i % NT) * WORDS); };
    auto ask_first = [&]() {
        if (unit < end) {
            seek();
#pragma unroll
            for (int i = 0; i < AT_FIRST; i++) read(i);
        }
    };
#if !ENTRIES
    ask_first();
#endif
#if INLINE
    // Inputs of all ranges of the block of threads.
    float turned[TURNS][4];
    // A warp's groups; past the last, the last again.
    auto turn = [&](int i) { return min(first_group + warp + i * WARPS, (past - 1) / 4); };
#if !ENTRIES
    float4 signs[TURNS];
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        const u32 g = turn(i), band = g / (PAIRS / 4), block = band * BESIDE;
        signs[i] = *(const float4*)(OF(block, suh_0, suh_1, suh_2) + (g - band * (PAIRS / 4)) * 128 + lane * 4);
    }
#if MUL1
    if (threadIdx.x < TOUCHED) largest_of[threadIdx.x] = 0;
#endif
    wait_for_last();
    if (!LARGE) let_next_start();
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        const u32 g = turn(i), band = g / (PAIRS / 4);
        const float4 f = scaled(row, up, signs[i], (g - band * (PAIRS / 4)) * 128 + lane * 4);
        turned[i][0] = f.x, turned[i][1] = f.y, turned[i][2] = f.z, turned[i][3] = f.w;
    }
#else
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        const u32 g = turn(i), band = g / (PAIRS / 4), block = band * BESIDE, column = (g - band * (PAIRS / 4)) * 128 + lane * 4;
        const float4 f = scaled(row, up, *(const float4*)(OF(block, suh_0, suh_1, suh_2) + column), column);
        turned[i][0] = f.x, turned[i][1] = f.y, turned[i][2] = f.z, turned[i][3] = f.w;
    }
#if MUL1
    if (threadIdx.x < TOUCHED) largest_of[threadIdx.x] = 0;
#endif
    ask_first();
#endif
#else
#if ENTRIES
    ask_first();
#else
    wait_for_last();
    if (!LARGE) let_next_start();
#endif
#endif
#if INLINE
#if MUL1
    __syncthreads();
#endif
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        rotate(turned[i]);
#if MUL1
        const u32 most = largest(turned[i]);
        if (lane == 0) atomicMax(largest_of + turn(i) / (PAIRS / 4) - first_band, most);
#else
        place(turned[i], inputs_of[turn(i) - first_group]);
#endif
    }
    __syncthreads();
#if MUL1
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        const u32 g = turn(i);
        const int count = place(turned[i], __uint_as_float(largest_of[g / (PAIRS / 4) - first_band]), inputs_of[g - first_group]);
        if (lane % 8 == 0) counts_of[(g - first_group) * 4 + lane / 8] = count;
    }
    __syncthreads();
#endif
    if (unit < end)
#pragma unroll
        for (int i = AT_FIRST; i < 2 * NT; i++) read(i);
#endif

    while (unit < end) {
        const u32 band = unit / PAIRS, block = block_of(unit);
        u32 pair = unit - band * PAIRS;
        const u32 to = min(end - band * PAIRS, (u32)PAIRS);
        unit = band * PAIRS + to;
#if INLINE
        const u32* operand = inputs_of[0] + (band * PAIRS + pair - first_group * 4) * (2 * SPACING) + (group % 2 * 4 + quad) * READ;
#else
        // The next tile's inputs of every set, and where they are.
        u32 raw[SETS][READ], operand[SETS];
#pragma unroll
        for (int s = 0; s < SETS; s++)
            operand[s] = row_of(block, s * 4 + group / 2) * ROW + pair * 2 * PER_TILE + (group % 2 * 4 + quad) * READ;
        auto inputs = [&](bool there) {
#pragma unroll
            for (int s = 0; s < SETS; s++) {
#pragma unroll
                for (int i = 0; i < READ; i++)
                    if (there) raw[s][i] = x[operand[s] + i];
                operand[s] += PER_TILE;
            }
        };
        inputs(true);
#endif
        float totals[SETS][NT][2] = {};
        while (pair < to) {
            const u32 stop = INLINE ? to : min(pair / SEGMENT * SEGMENT + SEGMENT, to);
            Sum sums[SETS][NT][4] = {};
#if MUL1
            // Of the row whose sums the lane has.
            int counts[SETS] = {};
            float scales[SETS];
#if INLINE
            for (u32 i = pair + lane; i < to; i += 32) counts[0] += counts_of[band * PAIRS + i - first_group * 4];
            counts[0] = __reduce_add_sync(~0u, counts[0]);
            scales[0] = __uint_as_float(largest_of[band - first_band]) * (1.0f / 32639.0f);
#else
#pragma unroll
            for (int s = 0; s < SETS; s++) {
                const u32* from = x + (u64)row_of(block, s * 4 + quad) * ROW + K_TILES * 8;
#pragma unroll
                for (u32 i = 0; i < SEGMENT; i++) counts[s] += pair + i < stop ? (int)from[pair + i] : 0;
                scales[s] = __uint_as_float(from[K_TILES / 2 + pair / SEGMENT]);
            }
#endif
#endif
            for (; pair < stop; pair++) {
                // Past the end the last tiles are read again.
                if (++next < end) {
                    left--;
                    if (left == 0) {
                        seek();
                    } else {
#pragma unroll
                        for (int j = 0; j < SOURCES; j++) source[j] += (u64)2 * (MATRICES == 1 ? N_TILES_0 : wide) * WORDS;
                    }
                }
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    u32 b[SETS][4];
#pragma unroll
                    for (int s = 0; s < SETS; s++) {
#if INLINE
                        const u32* from = operand + k * SPACING;
#else
                        const u32* from = raw[s];
#endif
#if MUL1 && INLINE
                        const uint4 w = *(const uint4*)from;
                        b[s][0] = w.x, b[s][1] = w.y, b[s][2] = w.z, b[s][3] = w.w;
#elif MUL1
                        const u32 w = from[0];
                        b[s][0] = __byte_perm(w, 0, 0x0000), b[s][1] = __byte_perm(w, 0, 0x1111);
                        b[s][2] = __byte_perm(w, 0, 0x2222), b[s][3] = __byte_perm(w, 0, 0x3333);
#else
                        b[s][0] = from[0], b[s][1] = from[1];
#endif
                    }
#if !INLINE
                    inputs(k == 0 || pair + 1 < to);
#endif
#pragma unroll
                    for (int t = 0; t < NT; t++) {
#if MUL1
                        u32 s[8];
                        own.products_of(s, words[k * NT + t]);
                        read(k * NT + t);
#pragma unroll
                        for (int set = 0; set < SETS; set++) {
                            mma_bytes(sums[set][t], s[0], s[4], s[1], s[5], b[set][0], b[set][1]);
                            mma_bytes(sums[set][t], s[2], s[6], s[3], s[7], b[set][2], b[set][3]);
                        }
#else
                        u32 a[4];
                        own.operand(a, words[k * NT + t]);
                        read(k * NT + t);
#pragma unroll
                        for (int set = 0; set < SETS; set++) multiply_add(sums[set][t], a, b[set][0], b[set][1]);
#endif
                    }
                }
#if INLINE
                operand += 2 * SPACING;
#endif
            }
#pragma unroll
            for (int s = 0; s < SETS; s++)
#pragma unroll
                for (int t = 0; t < NT; t++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const Sum* c = sums[s][t] + 2 * h;
#if MUL1
                        totals[s][t][h] += total(c, counts[s], scales[s]);
#else
                        totals[s][t][h] += c[0] + c[1];
#endif
                    }
        }
#pragma unroll
        for (int s = 0; s < SETS; s++)
#pragma unroll
            for (int t = 0; t < NT; t++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const float sum = totals[s][t][h];
                    const u32 column = (across * NT + t) * 16 + group + 8 * h;
#if INLINE
                    // All four hold it.
                    if (t % 4 == quad) sums_of[band - first_band][warp / ACROSS][column] = sum;
#else
                    if (s * 4 + quad < rows) partial[(((u64)block + range) * ROWS + s * 4 + quad) * 128 + column] = sum;
#endif
                }
    }

    if (LARGE) let_next_start();
#if INLINE
    __syncthreads();
#if ENTRIES
    svh_0 += (u64)slot * N_TILES_0 * 16, svh_1 += (u64)slot * N_TILES_1 * 16, svh_2 += (u64)slot * N_TILES_2 * 16;
    bias_0 += (u64)slot * OUTPUTS_0, bias_1 += (u64)slot * OUTPUTS_1, bias_2 += (u64)slot * OUTPUTS_2;
#endif
    const u32 last_band = (past - 1) / PAIRS;
    partial += (u64)blockIdx.y * (BANDS + gridDim.x) * BESIDE * 128 + lane * 4;
    for (u32 i = warp; i < (last_band - first_band + 1) * BESIDE; i += WARPS) {
        const u32 band = first_band + i / BESIDE, beside = i % BESIDE, block = band * BESIDE + beside;
        if (block >= BLOCKS) break;
        const u32 column = (block - FIRST(block)) * 128 + lane * 4;
        const float4 scale = *(const float4*)(OF(block, svh_0, svh_1, svh_2) + column);
        const u32 lead = range_of(band * PAIRS), tail = range_of((band + 1) * PAIRS - 1);
        float4 sum = make_float4(0, 0, 0, 0);
        for (u32 r = max(lead, first_range); r <= min(tail, last_range); r++) {
            const float4 s = *(const float4*)(&sums_of[band - first_band][beside * SHARES + r - first_range][lane * 4]);
            sum.x += s.x, sum.y += s.y, sum.z += s.z, sum.w += s.w;
        }
        // What a block of threads leaves of the band.
        auto left_by = [&](u32 other) { return partial + (((u64)band + other) * BESIDE + beside) * 128; };
        const u32 lead_of = lead / SHARES, tail_of = tail / SHARES;
        if (blockIdx.x < tail_of) {
            put(left_by(blockIdx.x), sum);
            continue;
        }
        float4 others = make_float4(0, 0, 0, 0);
        for (u32 first = lead_of; first < tail_of; first += 4) {
            float4 s[4];
            bool missing;
            do {
                missing = false;
#pragma unroll
                for (int j = 0; j < 4; j++)
                    if (first + j < tail_of) missing |= !get(s[j], left_by(first + j));
            } while (__any_sync(~0u, missing));
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (first + j < tail_of) {
                    clear(left_by(first + j));
                    others.x += s[j].x, others.y += s[j].y, others.z += s[j].z, others.w += s[j].w;
                }
        }
        if (lead_of < tail_of) sum = make_float4(others.x + sum.x, others.y + sum.y, others.z + sum.z, others.w + sum.w);
        const u32 outputs = OF(block, OUTPUTS_0, OUTPUTS_1, OUTPUTS_2);
        write(sum, scale, OF(block, bias_0, bias_1, bias_2), column, outputs, OF(block, out_0, out_1, out_2) + (u64)blockIdx.y * outputs);
    }
#endif
}

#if !INLINE
// Adds the parts of 128 columns of a row, rotates and scales them. A warp adds the parts of every eighth range; these lie in
// order, so that the sum depends on the matrix alone.
#define SUMMED (RANGES / BLOCKS + 2)

extern "C" __global__ void __launch_bounds__(256) finish(
    const float* partial, const float* __restrict__ svh_0, const float* __restrict__ svh_1, const float* __restrict__ svh_2,
    const float* __restrict__ bias_0, const float* __restrict__ bias_1, const float* __restrict__ bias_2,
    const u32* ids, const u32* order, const u32* __restrict__ slots,
    float* __restrict__ out_0, float* __restrict__ out_1, float* __restrict__ out_2)
{
    __shared__ float4 sums[8][32];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, block = blockIdx.x;
    let_next_start();
    wait_for_last();
#if GROUPED
    ids += blockIdx.y / ROWS * 3;
    const u32 slot = slots[ids[0]];
    if (blockIdx.y % ROWS >= ids[2] || slot == ~0u) return;
    const u32 row = order[ids[1] + blockIdx.y % ROWS];
    svh_0 += (u64)slot * N_TILES_0 * 16, svh_1 += (u64)slot * N_TILES_1 * 16, svh_2 += (u64)slot * N_TILES_2 * 16;
    bias_0 += (u64)slot * OUTPUTS_0, bias_1 += (u64)slot * OUTPUTS_1, bias_2 += (u64)slot * OUTPUTS_2;
#else
    const u32 row = blockIdx.y;
#endif
    partial += (u64)(blockIdx.y / ROWS) * (BLOCKS + RANGES) * ROWS * 128 + blockIdx.y % ROWS * 128 + lane * 4;
    const u32 column = (block - FIRST(block)) * 128 + lane * 4;
    const float4 scale = *(const float4*)(OF(block, svh_0, svh_1, svh_2) + column);
    const u32 lead = range_of(block * PAIRS), tail = range_of((block + 1) * PAIRS - 1);
    float4 part[(SUMMED + 7) / 8];
#pragma unroll
    for (int i = 0; i < (SUMMED + 7) / 8; i++) {
        const u32 range = lead + warp + i * 8;
        part[i] = range <= tail ? *(const float4*)(partial + ((u64)block + range) * ROWS * 128) : make_float4(0, 0, 0, 0);
    }
    float4 sum = part[0];
#pragma unroll
    for (int i = 1; i < (SUMMED + 7) / 8; i++)
        sum.x += part[i].x, sum.y += part[i].y, sum.z += part[i].z, sum.w += part[i].w;
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0) return;
    sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float4 s = sums[i][lane];
        sum.x += s.x, sum.y += s.y, sum.z += s.z, sum.w += s.w;
    }
    const u32 outputs = OF(block, OUTPUTS_0, OUTPUTS_1, OUTPUTS_2);
    write(sum, scale, OF(block, bias_0, bias_1, bias_2), column, outputs, OF(block, out_0, out_1, out_2) + (u64)row * outputs);
}

// x times suh, rotated, in the order of the operand: a warp per 128 columns of a row, for one matrix after the other.
extern "C" __global__ void __launch_bounds__(32) prepare(
    const float* x, const float* up, const float* __restrict__ suh_0, const float* __restrict__ suh_1, const float* __restrict__ suh_2,
    const u32* ids, const u32* __restrict__ slots, u32* __restrict__ rotated, const __grid_constant__ Info info)
{
    const u32 group = blockIdx.x, row = blockIdx.y, matrix = row / info.rows;
    const float* suh = matrix == 0 ? suh_0 : matrix == 1 ? suh_1 : suh_2;
    let_next_start();
    wait_for_last();
#if ENTRIES
    const u32 slot = slots[ids[row % info.rows]];
    if (slot == ~0u) return;
    suh += (u64)slot * COLUMNS;
#endif
    const u64 from = (u64)(row % info.rows / SHARE) * INPUTS;
    const u32 column = group * 128 + threadIdx.x * 4;
    const float4 f = scaled(x + from, up + from, *(const float4*)(suh + column), column);
    float v[4] = {f.x, f.y, f.z, f.w};
    rotate(v);
    rotated += (u64)row * ROW;
#if MUL1
    const float most = __uint_as_float(largest(v));
    const int count = place(v, most, rotated + group * 8 * PER_TILE);
    u32* sums = rotated + K_TILES * 8;
    if (threadIdx.x % 8 == 0) sums[group * 4 + threadIdx.x / 8] = count;
    if (threadIdx.x == 0) sums[K_TILES / 2 + group] = __float_as_uint(most * (1.0f / 32639.0f));
#else
    place(v, rotated + group * 8 * PER_TILE);
#endif
}
#endif
