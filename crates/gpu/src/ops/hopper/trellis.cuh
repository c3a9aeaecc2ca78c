// Weights of a trellis for `product.cu`, after `codes.cuh`.

#if TWICE_BITS == 8
// The other word that a lane's states lie in is its neighbour's.
#define SOURCES 1
#else
#define SOURCES FETCHED
#endif
#define HELD SOURCES
#define DIRECT 0

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
        asm volatile("" : "+r"(mask), "+r"(flip));
#endif
    }

    __device__ __forceinline__ void read(u32* to, const u32* const* source, u64 offset) const {
#pragma unroll
        for (int j = 0; j < SOURCES; j++) to[j] = __ldg(source[j] + offset);
    }

    // The operand of a tile, exactly as the format defines its weights.
    __device__ __forceinline__ void operand(u32* to, const u32* held) const {
        u32 s[8];
#if TWICE_BITS == 8
        const u32 w[2] = {__shfl_sync(~0u, held[0], lane + 31), held[0]};
        states(w, shift, s);
#else
        states(held, shift, s);
#endif
        to[0] = weights(s[0], s[1], mask, flip);
        to[1] = weights(s[4], s[5], mask, flip);
        to[2] = weights(s[2], s[3], mask, flip);
        to[3] = weights(s[6], s[7], mask, flip);
    }
};

// Four inputs, rotated by their warp.
__device__ __forceinline__ void inputs(float* v, const float* x, const float* scales, u32 column) {
    const float4 f = scaled(x, scales, column);
    v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
    rotate(v);
}

// Four sums as outputs.
__device__ __forceinline__ void outputs(float* v, const float* scales, u32 column) {
    rotate(v);
    const float4 s = *(const float4*)(scales + column);
    v[0] *= s.x, v[1] *= s.y, v[2] *= s.z, v[3] *= s.w;
}

// Where the operand has the first two of four inputs, and how much further on the others.
__device__ __forceinline__ u32 pair_at(u32 column) { return column; }
#define PAIR_STEP 2
