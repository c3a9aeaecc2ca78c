// Few rows times matrices in row formats whose weights are small integers with scales, on NVIDIA GPUs.
//
// Defined before this text, besides what `halves.cuh` names: MATRICES over the same inputs (up to three), and for each OUTPUTS_0 …, CODES_0 … (bits
// of the plane of codes), HIGH_0 … (bits of the plane above it), SCALES_0 … (below) and SPAN_0 … (groups of 32 that share a scale, or the zero);
// GROUPS (of 32 inputs), M (rows of a tile), R (outputs that a warp takes together), INLINE (rows are prepared here), ENTRIES, GROUPED and SHARE as
// `exl3/trellis.cu` has them, BIAS, WARPS (of a block), RESIDENT (blocks of a multiprocessor).
//
// A lane takes 32 inputs, every 32nd such group: weights as bytes, inputs as 16 bits with a scale for the group, in a byte each. Their products are
// added up exactly (dp4a) and scaled once. So a row's sums are the same in any company.

#define CHUNKS ((GROUPS + 31) / 32)
// Words of four of a prepared row: of every 32 groups 4 units of 8 inputs, by lanes, after those of all their scales and sums.
#define ROW (CHUNKS * 160)

// How scales are: one f16 and a zero that the format knows; d and m; an f32 of 24 bits and a zero of 8 for SPAN groups; those of Q2_K, Q3_K, Q4_K and Q6_K.
enum { HALF, PAIR, GROUP, K2, K3, K4, K6 };

struct Raw { u32 codes[8], high[2], scale, over; };

// Eight inputs as [high bytes of the even, of the odd, low bytes of the even, of the odd]; the first of four lanes writes the scale of their
// group, and the sums of its halves. All lanes take part.
__device__ __forceinline__ void prepare_unit(const float* row, const float* up, u32 unit, uint4* to) {
    const bool there = unit < GROUPS * 4;
    const float4 none = make_float4(0, 0, 0, 0);
    const float4 a = there ? inputs(row, up, unit * 8) : none, b = there ? inputs(row, up, unit * 8 + 4) : none;
    const float v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    // Values that are no numbers are the largest.
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) largest = max(largest, __float_as_uint(v[i]) & 0x7fffffff);
    largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
    const float most = __uint_as_float(largest), factor = most > 0 ? __fdividef(32767.0f, most) : 0.0f;
    int q[8], sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) q[i] = max(-32767, min(32767, __float2int_rn(v[i] * factor))), sum += q[i];
    u32 bytes[4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 low = __byte_perm(q[i], q[i + 2], 0x5410), high = __byte_perm(q[i + 4], q[i + 6], 0x5410);
        bytes[i] = __byte_perm(low, high, 0x7531), bytes[i + 2] = __byte_perm(low, high, 0x6420);
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    const int other = __shfl_xor_sync(~0u, sum, 2);
    const u32 group = unit / 4;
    if (!there) return;
    to[group / 32 * 128 + unit % 4 * 32 + group % 32] = make_uint4(bytes[0], bytes[1], bytes[2], bytes[3]);
    if (unit % 4 == 0) to[CHUNKS * 128 + group] = make_uint4(__float_as_uint(most * (1.0f / 32767.0f)), sum, other, 0);
}
#define UNITS (CHUNKS * 128)

#if !INLINE
extern "C" __global__ void prepare(const float* x, const float* up, uint4* __restrict__ to, const __grid_constant__ Info info) {
    const u64 from = (u64)blockIdx.y * GROUPS * 32;
    wait_for_last();
    let_next_start();
    prepare_unit(x + from, up + from, blockIdx.x * blockDim.x + threadIdx.x, to + (u64)blockIdx.y * ROW);
}
#endif

template <int CODES, int HIGH, int SCALES, int SPAN>
struct Matrix {
    const u32 *codes, *high, *scales, *over;

    __device__ __forceinline__ void read(Raw& raw, u32 group) const {
        if (CODES == 2) {
            const uint2 w = __ldg((const uint2*)codes + group);
            raw.codes[0] = w.x, raw.codes[1] = w.y;
        } else {
#pragma unroll
            for (int i = 0; i < CODES / 4; i++) stream(raw.codes + 4 * i, (const uint4*)codes + (u64)group * (CODES / 4) + i);
        }
        if (HIGH == 1) raw.high[0] = __ldg(high + group);
        if (HIGH == 2) {
            const uint2 w = __ldg((const uint2*)high + group);
            raw.high[0] = w.x, raw.high[1] = w.y;
        }
        if (SCALES == PAIR || SCALES == GROUP) raw.scale = __ldg(scales + group / (SCALES == GROUP ? SPAN : 1));
        else raw.scale = __ldg((const unsigned short*)scales + group);
        if (SCALES == K2 || SCALES == K4) raw.over = __ldg(over + group / 8);
        if (SCALES == K3 || SCALES == K6) raw.over = __ldg((const unsigned short*)over + group / 8);
    }

    // The even and odd weights of unit `u` as bytes, signed.
    __device__ __forceinline__ static void bytes(const Raw& raw, int u, u32* w) {
        if (CODES == 8) {
            const u32 flip = SCALES == GROUP ? 0x80808080 : 0;
            w[0] = __byte_perm(raw.codes[2 * u], raw.codes[2 * u + 1], 0x6420) ^ flip;
            w[1] = __byte_perm(raw.codes[2 * u], raw.codes[2 * u + 1], 0x7531) ^ flip;
        } else if (CODES == 4) {
            w[0] = raw.codes[u] & 0x0f0f0f0f;
            w[1] = raw.codes[u] >> 4 & 0x0f0f0f0f;
        } else {
            pairs<0>(raw.codes[u / 2], u % 2, w);
        }
        if (HIGH == 2) {
            u32 upper[2];
            pairs<4>(raw.high[u / 2], u % 2, upper);
            w[0] |= upper[0], w[1] |= upper[1];
        }
        if (HIGH == 1) {
            // The multiples put every other bit where it belongs; others do not reach there.
            const u32 b = raw.high[0] >> 8 * u, to = CODES;
            w[0] |= ((b & 0x55) * (0x41041u << to) & 0x01010101u << to);
            w[1] |= ((b & 0xaa) * (0x41041u << to >> 1) & 0x01010101u << to);
        }
    }

    // Eight pairs of bits of half a word, at bit `TO` of bytes.
    template <int TO>
    __device__ __forceinline__ static void pairs(u32 word, int half, u32* w) {
        const u32 v = __byte_perm(word, 0, half ? 0x3322 : 0x1100), low = 0x00030003u << TO, high = 0x03000300u << TO;
        w[0] = (v << TO & low) | (TO == 4 ? v & high : v >> 4 & high);
        w[1] = ((TO == 4 ? v << 2 : v >> 2) & low) | (v >> (TO == 4 ? 2 : 6) & high);
    }

    // What a group adds, by its scales: sums of halves `i` of inputs times weights, and `s` of inputs.
    __device__ __forceinline__ static float apply(const Raw& raw, int i0, int i1, int s0, int s1) {
        const float d = from_f16(raw.over), least = from_f16(raw.over >> 16);
        const u32 s = raw.scale;
        switch (SCALES) {
        case HALF: return from_f16(s) * (float)(i0 + i1 - SPAN * (s0 + s1));
        case PAIR: return from_f16(s) * (float)(i0 + i1) + from_f16(s >> 16) * (float)(s0 + s1);
        case GROUP: return __uint_as_float(s & 0xffffff00) * (float)(i0 + i1 - ((int)(s & 255) - (CODES == 8 ? 128 : 0)) * (s0 + s1));
        case K2: return d * ((float)(s & 15) * (float)i0 + (float)(s >> 8 & 15) * (float)i1) - least * ((float)(s >> 4 & 15) * (float)s0 + (float)(s >> 12) * (float)s1);
        case K3: return d * ((float)((int)(s & 255) - 32) * (float)(i0 - 4 * s0) + (float)((int)(s >> 8) - 32) * (float)(i1 - 4 * s1));
        case K4: return d * (float)(s & 255) * (float)(i0 + i1) - least * (float)(s >> 8) * (float)(s0 + s1);
        default: return d * ((float)(signed char)s * (float)(i0 - 32 * s0) + (float)(signed char)(s >> 8) * (float)(i1 - 32 * s1));
        }
    }

    // Outputs R `first` … R `end` of OUTPUTS, of M rows.
    template <int OUTPUTS, class Row, class Write>
    __device__ __forceinline__ void multiply(u32 base, u32 first, u32 end, Row& row, Write write) const {
        const u32 lane = threadIdx.x % 32;
        // Halves have sums of their own where they have scales.
        constexpr int SUMS = SCALES == K2 || SCALES == K3 || SCALES == K6 ? 2 : 1;
        Raw ahead[R];
        u32 set = first, chunk = 0;
        auto fetch = [&](u32 set, u32 chunk) {
            const u32 group = chunk * 32 + lane;
#pragma unroll
            for (int r = 0; r < R; r++)
                // An output past the last is read as the last, and not written.
                if (GROUPS % 32 == 0 || group < GROUPS) read(ahead[r], base + min(set * R + r, (u32)OUTPUTS - 1) * GROUPS + group);
        };
        if (set < end) fetch(set, 0);
        row.ready();
        while (set < end) {
            float sums[R][M] = {};
            for (chunk = 0; chunk < CHUNKS; chunk++) {
                Raw raw[R];
                u32 w[R][8];
#pragma unroll
                for (int r = 0; r < R; r++) {
                    raw[r] = ahead[r];
#pragma unroll
                    for (int u = 0; u < 4; u++) bytes(raw[r], u, w[r] + 2 * u);
                }
                if (chunk + 1 < CHUNKS) fetch(set, chunk + 1);
                else if (set + 1 < end) fetch(set + 1, 0);
                if (GROUPS % 32 != 0 && chunk * 32 + lane >= GROUPS) continue;
#pragma unroll
                for (int m = 0; m < M; m++) {
                    const uint4* x = row(m) + lane;
                    int high[R][2] = {}, low[R][2] = {};
#pragma unroll
                    for (int u = 0; u < 4; u++) {
                        const uint4 v = x[chunk * 128 + u * 32];
                        const int h = u / 2 % SUMS;
#pragma unroll
                        for (int r = 0; r < R; r++) {
                            add_products_of_signed(high[r][h], w[r][2 * u], v.x), add_products_of_signed(high[r][h], w[r][2 * u + 1], v.y);
                            add_products_of_unsigned(low[r][h], w[r][2 * u], v.z), add_products_of_unsigned(low[r][h], w[r][2 * u + 1], v.w);
                        }
                    }
                    const uint4 s = x[CHUNKS * 128 + chunk * 32];
#pragma unroll
                    for (int r = 0; r < R; r++)
                        sums[r][m] += __uint_as_float(s.x) * apply(raw[r], high[r][0] * 256 + low[r][0], high[r][1] * 256 + low[r][1], s.y, s.z);
                }
            }
#pragma unroll
            for (int r = 0; r < R; r++)
#pragma unroll
                for (int m = 0; m < M; m++) {
                    float sum = sums[r][m];
#pragma unroll
                    for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
                    if (lane == (r * M + m) % 32 && set * R + r < OUTPUTS) write(m, set * R + r, sum);
                }
            set++;
        }
    }
};

#define SETS(outputs) (((outputs) + R - 1) / R)
#define ALL_SETS (SETS(OUTPUTS_0) + SETS(OUTPUTS_1) + SETS(OUTPUTS_2))

extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) multiply(
    const u32* __restrict__ codes_0, const u32* __restrict__ codes_1, const u32* __restrict__ codes_2,
    const u32* __restrict__ high_0, const u32* __restrict__ high_1, const u32* __restrict__ high_2,
    const u32* __restrict__ scales_0, const u32* __restrict__ scales_1, const u32* __restrict__ scales_2,
    const u32* __restrict__ over_0, const u32* __restrict__ over_1, const u32* __restrict__ over_2,
    const float* __restrict__ bias_0, const float* __restrict__ bias_1, const float* __restrict__ bias_2,
    const uint4* x, const float* up, const u32* ids, const u32* order, const u32* __restrict__ slots,
    float* __restrict__ out_0, float* __restrict__ out_1, float* __restrict__ out_2, const __grid_constant__ Info info)
{
#if GROUPED || ENTRIES
    wait_for_last();
    let_next_start();
#endif
#if GROUPED
    const u32 rows = ids[blockIdx.y * 3 + 2], slot = slots[ids[blockIdx.y * 3]];
    if (rows == 0) return;
    order += ids[blockIdx.y * 3 + 1];
    auto out_row = [&](u32 m) { return order[min(m, rows - 1)]; };
#elif ENTRIES
    const u32 rows = 1, slot = slots[ids[blockIdx.y]];
    auto out_row = [&](u32) { return blockIdx.y; };
#else
    const u32 slot = 0, rows = min(info.rows - blockIdx.y * M, (u32)M);
    auto out_row = [&](u32 m) { return blockIdx.y * M + min(m, rows - 1); };
#endif
    if (slot == ~0u) return;
    const u32 warps = gridDim.x * WARPS, warp = blockIdx.x * WARPS + threadIdx.x / 32;
    const u32 first = (u64)ALL_SETS * warp / warps, end = (u64)ALL_SETS * (warp + 1) / warps;
#if INLINE
    __shared__ __align__(16) uint4 prepared[M][ROW];
    struct {
        const float *from[M], *up[M];
        uint4 (*to)[ROW];
        bool done;
        __device__ __forceinline__ void ready() {
            if (done) return;
            done = true;
            wait_for_last();
            let_next_start();
            for (u32 m = 0; m < M; m++)
                for (u32 unit = threadIdx.x; unit < UNITS; unit += 32 * WARPS) prepare_unit(from[m], up[m], unit, to[m]);
            __syncthreads();
        }
        __device__ __forceinline__ const uint4* operator()(u32 m) const { return to[m]; }
    } row;
    row.to = prepared, row.done = false;
#pragma unroll
    for (int m = 0; m < M; m++) {
        const u64 from = (u64)(out_row(m) / SHARE) * GROUPS * 32;
        row.from[m] = (const float*)x + from, row.up[m] = up + from;
    }
#else
    struct {
        const uint4* at[M];
        __device__ __forceinline__ void ready() {
            wait_for_last();
            let_next_start();
        }
        __device__ __forceinline__ const uint4* operator()(u32 m) const { return at[m]; }
    } row;
#pragma unroll
    for (int m = 0; m < M; m++) row.at[m] = x + (u64)(out_row(m) / SHARE) * ROW;
#endif
#define MULTIPLY(i, before) \
    { \
        const float* bias = bias_##i + (u64)slot * OUTPUTS_##i; \
        const u32 from = min(max(first, before) - before, (u32)SETS(OUTPUTS_##i)), to = min(max(end, before) - before, (u32)SETS(OUTPUTS_##i)); \
        const Matrix<CODES_##i, HIGH_##i, SCALES_##i, SPAN_##i> matrix = {codes_##i, high_##i, scales_##i, over_##i}; \
        matrix.template multiply<OUTPUTS_##i>(slot * OUTPUTS_##i * GROUPS, from, to, row, [&](u32 m, u32 n, float sum) { \
            if (m < rows) out_##i[(u64)out_row(m) * OUTPUTS_##i + n] = BIAS ? sum + bias[n] : sum; \
        }); \
    }
    MULTIPLY(0, 0u)
#if MATRICES > 1
    MULTIPLY(1, (u32)SETS(OUTPUTS_0))
#endif
#if MATRICES > 2
    MULTIPLY(2, (u32)(SETS(OUTPUTS_0) + SETS(OUTPUTS_1)))
#endif
}
