// What all texts in CUDA C++ share: names of words, what a launch tells, and values as halves. BRAIN says that halves are bf16.

typedef unsigned int u32;
typedef unsigned long long u64;

// What is told with a launch: rows, and one more number where a text wants it.
struct Info { u32 rows, more; };

#if BRAIN
#define HALVES "bf16"
#else
#define HALVES "f16"
#endif

// Two values as halves, and what these leave.
__device__ __forceinline__ void split(float v0, float v1, u32& high, u32& low) {
    float f0, f1;
#if BRAIN
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(high) : "f"(v1), "f"(v0));
    f0 = __uint_as_float(high << 16), f1 = __uint_as_float(high & 0xffff0000);
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(low) : "f"(v1 - f1), "f"(v0 - f0));
#else
    // Two terms hold up to twice the range of one.
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(high) : "f"(fminf(fmaxf(v1, -65504.0f), 65504.0f)), "f"(fminf(fmaxf(v0, -65504.0f), 65504.0f)));
    asm("{ .reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }" : "=f"(f0), "=f"(f1) : "r"(high));
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(low) : "f"(v1 - f1), "f"(v0 - f0));
#endif
}
