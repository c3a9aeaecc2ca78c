// Weights as halves for `common.cuh`, in the order of the first operand (`mod.rs` lays them out): 16 bytes a lane and tile.
//
// Defined before this text: K_TILES, N_TILES, INPUTS (of them, those there are), BRAIN (halves are bf16).

#define WORDS 128
#define SOURCES 1
#define HELD 4
#define DIRECT 1

struct Lane {
    u32 place_of[1];

    __device__ __forceinline__ explicit Lane(u32 lane) { place_of[0] = lane * 4; }

    __device__ __forceinline__ void read(u32* to, const u32* const* source, u64 offset) const {
        const uint4 v = *(const uint4*)(source[0] + offset);
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }

    __device__ __forceinline__ void operand(u32*, const u32*) const {}
};

__device__ __forceinline__ void inputs(float* v, const float* x, const float*, const float*, u32 column) {
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = column + i < INPUTS ? x[column + i] : 0;
}

__device__ __forceinline__ void outputs(float*, const float*, u32) {}

// A lane's eight weights of a row are four inputs of one tile and four of the next.
__device__ __forceinline__ u32 pair_at(u32 column) { return column / 32 * 32 + column % 8 / 4 * 16 + column % 32 / 8 * 2; }
#define PAIR_STEP 8
