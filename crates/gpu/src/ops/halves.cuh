// What all texts in CUDA C++ share, after `ptx.cuh`: what a launch tells, and values as halves. BRAIN says that halves are bf16; ACTIVATION, that
// inputs are those of a gate, to be multiplied with others: by SiLU (1), GELU with tanh (2) or GELU (3).

// What is told with a launch: rows, and one more number where a text wants it.
struct Info { u32 rows, more; };

// A launch may start before those before it have ended (programmatic dependent launch). What they wrote is there, and what they read may be written,
// after `wait_for_last`, which some thread of every block of threads calls; what was there when the model was loaded may be read before. Arrays of the
// first kind are not `__restrict__`: those are read through a cache that does not know what others write.
__device__ __forceinline__ void wait_for_last() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Once all blocks of threads called this, or ended, the next launch's come where there is room. After the wait where the work is short,
// after the loop where it is long, before the wait in launches that only prepare rows or add up: all were measured to be faster (bench/gpu.md).
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Two values as halves, and what these leave.
__device__ __forceinline__ void split(float v0, float v1, u32& high, u32& low) {
    float f0, f1;
#if BRAIN
    high = to_bf16(v1, v0);
    f0 = __uint_as_float(high << 16), f1 = __uint_as_float(high & 0xffff0000);
    low = to_bf16(v1 - f1, v0 - f0);
#else
    // Two terms hold up to twice the range of one.
    high = to_f16(fminf(fmaxf(v1, -65504.0f), 65504.0f), fminf(fmaxf(v0, -65504.0f), 65504.0f));
    from_f16(high, f0, f1);
    low = to_f16(v1 - f1, v0 - f0);
#endif
}

// 16 by 16 halves times 16 by 8.
__device__ __forceinline__ void multiply_add(float* c, const u32* a, u32 b0, u32 b1) {
#if BRAIN
    mma_bf16(c, a[0], a[1], a[2], a[3], b0, b1);
#else
    mma_f16(c, a[0], a[1], a[2], a[3], b0, b1);
#endif
}

#if ACTIVATION
__device__ __forceinline__ float activated(float x) {
#if ACTIVATION == 1
    // exp of a large number is infinite, and so its reciprocal 0.
    return x / (1 + expf(-fmaxf(x, -80.0f)));
#elif ACTIVATION == 2
    return 0.5f * x * (1 + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
#else
    return 0.5f * x * (1 + erff(x * 0.70710678f));
#endif
}
#endif

// Four inputs, which begin at `column` of a row.
__device__ __forceinline__ float4 inputs(const float* x, const float* up, u32 column) {
    float4 v = *(const float4*)(x + column);
#if ACTIVATION
    const float4 u = *(const float4*)(up + column);
    v = make_float4(activated(v.x) * u.x, activated(v.y) * u.y, activated(v.z) * u.z, activated(v.w) * u.w);
#endif
    return v;
}

// One of them.
__device__ __forceinline__ float input(const float* x, const float* up, u32 column) {
#if ACTIVATION
    return activated(x[column]) * up[column];
#else
    return x[column];
#endif
}
