// Weights of a trellis for `common.cuh`, after `codes.cuh`.

#define HELD SOURCES
#define DIRECT 0

// Four inputs, rotated by their warp.
__device__ __forceinline__ void inputs(float* v, const float* x, const float* up, const float* scales, u32 column) {
    const float4 f = scaled(x, up, *(const float4*)(scales + column), column);
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
