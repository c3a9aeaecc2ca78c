// Instructions of NVIDIA's GPUs that C++ has no name for, and that all of them from sm_80 on have. Addresses of 32 bits are those of shared memory.
// In place of this text `runtime/emulated/cuda` has the same functions for a processor.

typedef unsigned int u32;
typedef unsigned long long u64;

// A value that the compiler knows nothing of: it stays in a register, and what follows from it is not computed before.
template <class T>
__device__ __forceinline__ void hide(T& v) { asm volatile("" : "+r"(v)); }

// ---- halves, two in a word ----

__device__ __forceinline__ u32 to_f16(float high, float low) {
    u32 out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

__device__ __forceinline__ u32 to_bf16(float high, float low) {
    u32 out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

__device__ __forceinline__ void from_f16(u32 halves, float& low, float& high) {
    asm("{ .reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }" : "=f"(low), "=f"(high) : "r"(halves));
}

// The lower one.
__device__ __forceinline__ float from_f16(u32 halves) {
    float out;
    asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(out) : "r"(halves & 0xffff));
    return out;
}

__device__ __forceinline__ u32 multiply_add_f16(u32 a, u32 b, u32 c) {
    u32 out;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
}

// The sums of two words' halves.
__device__ __forceinline__ u32 sums_of_f16(u32 p, u32 q) {
    u32 out;
    asm("{ .reg .f16 a, b, c, d; mov.b32 {a, b}, %1; mov.b32 {c, d}, %2; add.rn.f16 a, a, b; add.rn.f16 c, c, d; mov.b32 %0, {a, c}; }"
        : "=r"(out) : "r"(p), "r"(q));
    return out;
}

// ---- integers ----

// `a & b ^ c`, in one instruction.
__device__ __forceinline__ u32 and_xor(u32 a, u32 b, u32 c) {
    u32 out;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
}

// Adds the products of four signed bytes of `w` with four of `x`, signed or not.
__device__ __forceinline__ void add_products_of_signed(int& sum, u32 w, u32 x) { asm("dp4a.s32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(w), "r"(x)); }
__device__ __forceinline__ void add_products_of_unsigned(int& sum, u32 w, u32 x) { asm("dp4a.s32.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(w), "r"(x)); }

// ---- matrices of a warp ----

#define MMA(shape, kinds, c, register) \
    asm volatile("mma.sync.aligned." shape ".row.col." kinds " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
        : "+" register(c[0]), "+" register(c[1]), "+" register(c[2]), "+" register(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))

// 16 by 32 bytes without signs times 32 by 8 with them.
__device__ __forceinline__ void mma_bytes(int* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { MMA("m16n8k32", "s32.u8.s8.s32", c, "r"); }
// 16 by 16 halves times 16 by 8.
__device__ __forceinline__ void mma_f16(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { MMA("m16n8k16", "f32.f16.f16.f32", c, "f"); }
__device__ __forceinline__ void mma_bf16(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { MMA("m16n8k16", "f32.bf16.bf16.f32", c, "f"); }

// Four matrices of 8 by 8 halves, of which every lane gives the address of a row, as they are or with rows and columns exchanged.
__device__ __forceinline__ void load_matrices(u32* to, u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}

__device__ __forceinline__ void load_matrices_turned(u32* to, u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}

// ---- memory ----

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void store_shared(u32 to, const u32* words) {
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" :: "r"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]) : "memory");
}

// Sixteen bytes to shared memory, once those of the group are waited for: `bytes` of them, zeros for the others.
__device__ __forceinline__ void copy_later(u32 to, const void* from, u32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_later(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most LEFT groups are on their way.
template <int LEFT>
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory"); }

// Sixteen bytes that nobody writes, and that are not kept near.
__device__ __forceinline__ void stream(u32* to, const uint4* from) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
}

// Sixteen bytes that blocks of threads leave each other.
__device__ __forceinline__ void put_words(void* to, const u32* w) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" :: "l"(to), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");
}

__device__ __forceinline__ void get_words(u32* w, const void* from) {
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(from) : "memory");
}
