// What both kernels for attention of prompts share, after `halves.cuh`: where rows of keys lie in shared memory, which rows of the batch see which of them,
// products of queries with keys, an online softmax, and products of its shares with values.
//
// Defined before this text: WINDOW (0: none), CAPPED, CAP.

// Where 16 bytes of a row lie: they change places by the row's number, so that eight rows meet no bank twice.
__device__ __forceinline__ u32 place(u32 row, u32 chunk, u32 line) { return row * line + ((chunk ^ (row & 7)) * 16); }

// The last row from `start` to `last` that is of the same sequence: rows of one follow each other, and so do their positions.
__device__ __forceinline__ u32 end_of_sequence(const u32* meta, u32 start, u32 last) {
    u32 stop = start;
    for (u32 low = start, high = last; low <= high;) {
        const u32 middle = (low + high) / 2;
        if (meta[middle * 4 + 3] == meta[start * 4 + 3]) stop = middle, low = middle + 1;
        else high = middle - 1;
    }
    return stop;
}

// A lane's two rows of sixteen.
struct Seen {
    u32 row[2], position[2], sequence[2];

    __device__ __forceinline__ Seen(const u32* meta, u32 first_row, u32 last_row) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            row[h] = first_row + threadIdx.x % 32 / 4 + 8 * h;
            const bool there = row[h] <= last_row;
            position[h] = there ? meta[row[h] * 4 + 1] : 0;
            sequence[h] = there ? meta[row[h] * 4 + 3] : ~0u;
        }
    }
};

// Sixteen rows' queries times `scale`, in two halves each: DEEP times sixteen columns, from `column` on, of `row_length` in a row.
template <int DEEP>
__device__ __forceinline__ void read_queries(u32 (*query)[2][4], const float* q, u32 row_length, u32 column, const Seen& seen, u32 last_row, float scale) {
#pragma unroll
    for (int k = 0; k < DEEP; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 row = seen.row[i % 2];
            float2 v = make_float2(0, 0);
            if (row <= last_row) v = *(const float2*)(q + (u64)row * row_length + column + k * 16 + threadIdx.x % 4 * 2 + i / 2 * 8);
            split(v.x * scale, v.y * scale, query[k][0][i], query[k][1][i]);
        }
}

// Products of such queries with COUNT times eight keys, whose rows of LENGTH bytes have those columns from sixteen bytes `chunk` on.
template <int COUNT, int DEEP, int LENGTH>
__device__ __forceinline__ void multiply_keys(float (*scores)[4], const u32 (*query)[2][4], u32 keys_at, u32 chunk) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < COUNT / 2; n++) {
#pragma unroll
        for (int i = 0; i < 8; i++) scores[2 * n + i / 4][i % 4] = 0;
#pragma unroll
        for (int k = 0; k < DEEP; k++) {
            u32 b[4];
            load_matrices(b, keys_at + place(n * 16 + lane % 8 + lane / 16 * 8, chunk + k * 2 + lane / 8 % 2, LENGTH));
#pragma unroll
            for (int part = 0; part < 2; part++) {
                multiply_add(scores[2 * n], query[k][part], b[0], b[1]);
                multiply_add(scores[2 * n + 1], query[k][part], b[2], b[3]);
            }
        }
    }
}

// Of a lane's two rows: the highest score so far, and the sum of the lane's exponentials.
struct Softmax {
    float highest[2] = {-1e30f, -1e30f}, total[2] = {0, 0};

    // Makes exponentials of scores of COUNT times eight keys, `first` and those after it, of sequence `own`. What was summed before fades.
    template <int COUNT>
    __device__ __forceinline__ void take(float (*scores)[4], u32 first, u32 own, const Seen& seen, float* faded) {
        const u32 quad = threadIdx.x % 4;
        float top[2] = {highest[0], highest[1]};
#pragma unroll
        for (int n = 0; n < COUNT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const u32 h = i / 2, p = first + n * 8 + quad * 2 + i % 2;
                float s = scores[n][i];
                if (CAPPED) s = CAP * tanhf(s / CAP);
                const bool is_seen = seen.sequence[h] == own && p <= seen.position[h] && (WINDOW == 0 || seen.position[h] - p < WINDOW);
                s = is_seen ? s : __int_as_float(0xff800000);
                scores[n][i] = s;
                top[h] = fmaxf(top[h], s);
            }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
            top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2));
            faded[h] = __expf(highest[h] - top[h]);
            highest[h] = top[h];
            total[h] *= faded[h];
        }
#pragma unroll
        for (int n = 0; n < COUNT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                scores[n][i] = __expf(scores[n][i] - highest[i / 2]);
                total[i / 2] += scores[n][i];
            }
    }

    // The sum over all lanes of a row.
    __device__ __forceinline__ float whole(int h) const {
        float sum = total[h];
        sum += __shfl_xor_sync(~0u, sum, 1);
        return sum + __shfl_xor_sync(~0u, sum, 2);
    }
};

// Adds sixteen keys' values, each times its share of `scores`: WIDE times eight columns, from sixteen bytes `chunk` of rows of LENGTH bytes on. `row` is
// the first key's.
template <int WIDE, int LENGTH>
__device__ __forceinline__ void add_values(float (*sums)[4], const float (*scores)[4], u32 values_at, u32 row, u32 chunk) {
    const u32 lane = threadIdx.x % 32;
    u32 weight[2][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float* s = scores[i / 2] + i % 2 * 2;
        split(s[0], s[1], weight[0][i], weight[1][i]);
    }
#pragma unroll
    for (int n = 0; n < WIDE / 2; n++) {
        u32 b[4];
        load_matrices_turned(b, values_at + place(row + lane % 16, chunk + n * 2 + lane / 16, LENGTH));
#pragma unroll
        for (int part = 0; part < 2; part++) {
            multiply_add(sums[2 * n], weight[part], b[0], b[1]);
            multiply_add(sums[2 * n + 1], weight[part], b[2], b[3]);
        }
    }
}
