// Instructions that only sm_90a has, after `common.cuh`: barriers in shared memory, copies that say there when they are done, and products of four warps
// together. Addresses are those of shared memory. In place of this text `runtime/emulated/cuda` has the same functions for a processor.

#if WGMMA

__device__ __forceinline__ void make_barrier(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals));
}

// Before others use what was made.
__device__ __forceinline__ void barriers_are_made() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
    asm volatile("{\n.reg .pred p;\nagain: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra done;\nbra again;\ndone:\n}"
        :: "r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory"); }

// Arrives, and has the barrier wait for as many bytes.
template <int BYTES>
__device__ __forceinline__ void expect(u32 barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "n"(BYTES) : "memory");
}

template <int BYTES>
__device__ __forceinline__ void fetch(u32 to, const void* from, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        :: "r"(to), "l"(from), "n"(BYTES), "r"(barrier) : "memory");
}

// A barrier of the sixteen warps that multiply.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, 512;" ::: "memory"); }

// Registers of those who fetch, for those who multiply.
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 24;"); }
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 112;"); }

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most LEFT groups are on their way.
template <int LEFT>
__device__ __forceinline__ void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory"); }

// A sum that products have been added to, once they were waited for.
__device__ __forceinline__ void is_whole(float& sum) { asm volatile("" : "+f"(sum) :: "memory"); }

#if BRAIN
#define HALVES "bf16"
#else
#define HALVES "f16"
#endif
#define R4(a, b, c, d) "%" #a ",%" #b ",%" #c ",%" #d
#define F4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define F16(i) F4(i), F4(i + 4), F4(i + 8), F4(i + 12)
#define R16 R4(0, 1, 2, 3) "," R4(4, 5, 6, 7) "," R4(8, 9, 10, 11) "," R4(12, 13, 14, 15)
#define R32 R16 "," R4(16, 17, 18, 19) "," R4(20, 21, 22, 23) "," R4(24, 25, 26, 27) "," R4(28, 29, 30, 31)
#define R48 R32 "," R4(32, 33, 34, 35) "," R4(36, 37, 38, 39) "," R4(40, 41, 42, 43) "," R4(44, 45, 46, 47)
#define R64 R48 "," R4(48, 49, 50, 51) "," R4(52, 53, 54, 55) "," R4(56, 57, 58, 59) "," R4(60, 61, 62, 63)
#define PRODUCT(n, sums, a0, a1, a2, a3, d, u) "{\n.reg .pred p;\n.reg .b64 d;\nsetp.eq.u32 p, 0, 0;\nmov.b64 d, {" d ", " u "};\n" \
    "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." HALVES "." HALVES " {" sums "}, {" a0 "," a1 "," a2 "," a3 "}, d, p, 1, 1, 0;\n}"

// The warpgroup's 64 outputs times N columns, over sixteen inputs.
__device__ __forceinline__ void multiply_add_all(float* c, const u32* w, u32 columns) {
#define OPERANDS "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(columns), "n"(((8 * LINE >> 4) | (DEEP == 4 ? 1u : 2u) << 30))
#if N == 64
    asm volatile(PRODUCT(64, R32, "%32", "%33", "%34", "%35", "%36", "%37") : F16(0), F16(16) : OPERANDS);
#elif N == 96
    asm volatile(PRODUCT(96, R48, "%48", "%49", "%50", "%51", "%52", "%53") : F16(0), F16(16), F16(32) : OPERANDS);
#else
    asm volatile(PRODUCT(128, R64, "%64", "%65", "%66", "%67", "%68", "%69") : F16(0), F16(16), F16(32), F16(48) : OPERANDS);
#endif
}

// How the products find a stage, of columns of LINE bytes, sixteen of which change places with others by the column's number: the lower word, in
// which sixteen bytes are one. The upper word is a constant.
__device__ __forceinline__ u32 columns_at(u32 address) { return 1u << 16 | (address & 0x3ffff) >> 4; }

#endif
