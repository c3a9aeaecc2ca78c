// What the texts of trellis-coded products share: weights from states, states from words, rotations.
//
// Defined before this text: K_TILES (tiles of 16 inputs), INPUTS (of them, those there are), TWICE_BITS, MUL1, MULTIPLIER, ADDEND.

#define WORDS (4 * TWICE_BITS)
#define SPAN (8 * TWICE_BITS / 2 - TWICE_BITS / 2 + 16)
#define ALIGNED ((SPAN + 31) / 32)
#define COLUMNS (K_TILES * 16)

__device__ constexpr int fetched() {
    int most = 0;
    for (int lane = 0; lane < 32; lane++) {
        int first = lane * 4 * TWICE_BITS + TWICE_BITS / 2 + 128 * TWICE_BITS - 16;
        int n = (first % 32 + SPAN + 31) / 32;
        most = n > most ? n : most;
    }
    return most;
}
#define FETCHED (fetched())

// The weights of two states, exactly as the format defines them.
__device__ __forceinline__ u32 weights(u32 one, u32 two, u32 mask, u32 flip) {
    const u32 a = one * (u32)MULTIPLIER + (u32)ADDEND, b = two * (u32)MULTIPLIER + (u32)ADDEND;
#if MUL1
    // The sum of the bytes on top of the f16 1024, whose unit is 1.
    const u32 s = __dp4a(a, 0x01010101u, 0x6400u), t = __dp4a(b, 0x01010101u, 0x6400u);
    return multiply_add_f16(__byte_perm(s, t, 0x5410), mask, flip);
#else
    return sums_of_f16(and_xor(a, mask, flip), and_xor(b, mask, flip));
#endif
}

// The eight states of a lane, from the words that hold them.
__device__ __forceinline__ void states(const u32* w, u32 shift, u32* s) {
#if TWICE_BITS == 8
    u32 f = __byte_perm(w[1], w[0], 0x5432), g = w[1];
    u32 f4 = f >> 4, g4 = g >> 4;
    s[0] = __byte_perm(f4, 0, 0x4421);
    s[1] = __byte_perm(f, 0, 0x4421);
    s[2] = f4 & 0xffff;
    s[3] = g >> 16;
    s[4] = __byte_perm(g4, 0, 0x4421);
    s[5] = __byte_perm(g, 0, 0x4421);
    s[6] = g4 & 0xffff;
    s[7] = g & 0xffff;
#else
    u32 bits[ALIGNED + 1];
#pragma unroll
    for (int i = 0; i < ALIGNED; i++)
        bits[i] = __funnelshift_l(i + 1 < FETCHED ? w[i + 1] : 0, w[i], shift);
    bits[ALIGNED] = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const int offset = (j + 1) * TWICE_BITS / 2 - TWICE_BITS / 2, q = offset / 32, r = offset % 32;
        s[j] = r == 0 ? bits[q] >> 16 : r <= 16 ? (bits[q] >> (16 - r)) & 0xffff
                                                : __funnelshift_l(bits[q + 1], bits[q], r) >> 16;
    }
#endif
}

#if MUL1
// The eight states times the multiplier. With four bits the first's is left of the fifth's in a word, so that its product, taken off the word's, leaves the
// fifth's: a mask less for the unit that shifts and masks, and one more instruction for the one that multiplies.
__device__ __forceinline__ void products(const u32* w, u32 shift, u32* p) {
#if TWICE_BITS == 8
    // In a register, or it is an instruction of the first unit.
    u32 left = 0xffff0000u;
    hide(left);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 pair = i == 3 ? w[1] : __funnelshift_r(w[1], w[0], 12 - 4 * i);
        p[i] = (pair >> 16) * (u32)MULTIPLIER;
        p[i + 4] = i == 0 ? p[i] * left + pair * (u32)MULTIPLIER : (pair & 0xffff) * (u32)MULTIPLIER;
    }
#else
    states(w, shift, p);
#pragma unroll
    for (int i = 0; i < 8; i++) p[i] *= (u32)MULTIPLIER;
#endif
}
#endif

#if TWICE_BITS == 8
// The other word that a lane's states lie in is its neighbour's.
#define SOURCES 1
#else
#define SOURCES FETCHED
#endif

// What a lane knows of its part of a tile.
struct Lane {
    u32 place_of[SOURCES], lane, shift, mask, flip;

    __device__ __forceinline__ explicit Lane(u32 lane) : lane(lane) {
        const u32 first_bit = lane * 4 * TWICE_BITS + TWICE_BITS / 2 + 128 * TWICE_BITS - 16;
        shift = first_bit % 32;
#pragma unroll
        for (int i = 0; i < SOURCES; i++) place_of[i] = TWICE_BITS == 8 ? lane : (first_bit / 32 + i) % WORDS;
#if MUL1
        mask = 0x1eee1eee, flip = 0xc931c931;
#else
        mask = 0x8fff8fff, flip = 0x3b603b60;
        // In registers, or one instruction becomes two.
        hide(mask), hide(flip);
#endif
    }

    __device__ __forceinline__ void read(u32* to, const u32* const* source, u64 offset) const {
#pragma unroll
        for (int j = 0; j < SOURCES; j++) to[j] = __ldg(source[j] + offset);
    }

    // The words that hold the lane's states, of which it has read all or its own.
    __device__ __forceinline__ void words_of(u32* w, const u32* held) const {
#if TWICE_BITS == 8
        w[0] = __shfl_sync(~0u, held[0], lane + 31), w[1] = held[0];
#else
#pragma unroll
        for (int i = 0; i < FETCHED; i++) w[i] = held[i];
#endif
    }

    __device__ __forceinline__ void states_of(u32* s, const u32* held) const {
        u32 w[FETCHED];
        words_of(w, held);
        states(w, shift, s);
    }

#if MUL1
    __device__ __forceinline__ void products_of(u32* p, const u32* held) const {
        u32 w[FETCHED];
        words_of(w, held);
        products(w, shift, p);
    }
#endif

    // The operand of a product of halves, exactly as the format defines the weights.
    __device__ __forceinline__ void operand(u32* to, const u32* held) const {
        u32 s[8];
        states_of(s, held);
        to[0] = weights(s[0], s[1], mask, flip);
        to[1] = weights(s[4], s[5], mask, flip);
        to[2] = weights(s[2], s[3], mask, flip);
        to[3] = weights(s[6], s[7], mask, flip);
    }
};

// Rotates four values a lane of the warp's 128.
__device__ __forceinline__ void rotate(float* v) {
    const float scale = 0.08838834764831845f;
    // Not contracted with the sums: the same wherever it is inlined.
    float a = __fmul_rn(v[0], scale), b = __fmul_rn(v[1], scale), c = __fmul_rn(v[2], scale), d = __fmul_rn(v[3], scale);
    float ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
    v[0] = ab + cd; v[1] = a_b + c_d; v[2] = ab - cd; v[3] = a_b - c_d;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const float sign = threadIdx.x & distance ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = __fmaf_rn(sign, v[i], __shfl_xor_sync(~0u, v[i], distance));
    }
}

// Four inputs of the lane times what suh has for them.
__device__ __forceinline__ float4 scaled(const float* x, const float* up, float4 s, u32 column) {
    float4 v = make_float4(0, 0, 0, 0);
    if (INPUTS % 4 == 0) {
        if (column < INPUTS) v = inputs(x, up, column);
    } else {
        if (column < INPUTS) v.x = input(x, up, column);
        if (column + 1 < INPUTS) v.y = input(x, up, column + 1);
        if (column + 2 < INPUTS) v.z = input(x, up, column + 2);
        if (column + 3 < INPUTS) v.w = input(x, up, column + 3);
    }
    return make_float4(v.x * s.x, v.y * s.y, v.z * s.z, v.w * s.w);
}
