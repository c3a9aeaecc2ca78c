// Attention of prompts on NVIDIA's tensor cores: 64 rows of the batch and one head a block, 16 rows a warp, over a tile of keys at a time with an online softmax.
//
// Defined before this text: HEADS, KV_HEADS, KEY and VALUE (columns of a head: multiples of 16 up to 128), KEY_BITS and VALUE_BITS (of a
// column in the cache: 16, 8 or 4), BRAIN (16 bits are bf16, else f16), BLOCK_SIZE (tokens of a block of the cache), SCALE, and what
// `flash.cuh` names.
//
// Rows of 8 and 4 bits (cache/rows.rs) are rotated back and become halves on their way to shared memory: there each column has its own precision.
//
// Queries and probabilities are two halves each, a value and what it leaves, so that products with the stored halves are as good as f32.

// Keys at a time: fewer where queries and sums take most registers.
#define KEYS (KEY + VALUE > 192 ? 32 : 64)
// Bytes of a row of keys or values in shared memory.
#define LINE(dim) ((dim) > 64 ? 256 : 128)

// Bytes of a row of the cache: halves, or codes, a word for each group of 32 columns, and four places a word.
#define ROW(dim, bits) ((bits) == 16 ? (dim) * 2 : (dim) * (bits) / 8 + (dim) / 8 + ((dim) / 32 + 3) / 4 * 4)

// Group `group` of a quantized row, rotated back.
template <int DIM, int BITS>
__device__ __forceinline__ void unpack(float* v, const u32* row, u32 group) {
    const u32* heads = row + DIM * BITS / 32;
    const u32 head = heads[group], largest = heads[DIM / 32 + group / 4] >> (group % 4 * 8) & 31;
    const float scale = __uint_as_float(head << 16), apart = __uint_as_float(head & 0xffff0000);
#pragma unroll
    for (int w = 0; w < BITS; w++) {
        const u32 word = row[group * BITS + w];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (BITS == 8) v[w * 4 + i] = (int)(word << (24 - 8 * i)) >> 24;
            else v[w * 4 + i] = (int)(word >> (8 * i) & 15) - 8, v[(w * 4 + i + 16) % 32] = (int)(word >> (8 * i + 4) & 15) - 8;
        }
    }
#pragma unroll
    for (int half = 1; half < 32; half *= 2)
#pragma unroll
        for (int pair = 0; pair < 16; pair++) {
            const int low = pair / half * 2 * half + pair % half;
            const float a = v[low], b = v[low + half];
            v[low] = a + b, v[low + half] = a - b;
        }
#pragma unroll
    for (int i = 0; i < 32; i++) v[i] = v[i] * (scale * 0.1767767f) + (i == largest ? apart : 0.0f);
}

// Keys or values of positions `first ..` to shared memory, zeros past `end`.
template <int DIM, int BITS>
__device__ __forceinline__ void fetch(u32 to, const char* from, const u32* table, u32 first, u32 end, u32 kv_head) {
    // Columns that a thread takes at a time: 16 bytes, or a group.
    constexpr u32 STEP = BITS == 16 ? 8 : 32;
    for (u32 i = threadIdx.x; i < KEYS * (DIM / STEP); i += 128) {
        const u32 row = i / (DIM / STEP), chunk = i % (DIM / STEP), p = first + row;
        const bool there = p < end;
        const u32 block = there ? table[p / BLOCK_SIZE] : 0;
        const char* at = from + (((u64)block * BLOCK_SIZE + (there ? p % BLOCK_SIZE : 0)) * KV_HEADS + kv_head) * ROW(DIM, BITS);
        if constexpr (BITS == 16) {
            copy_later(to + place(row, chunk, LINE(DIM)), at + chunk * 16, there ? 16 : 0);
        } else {
            float v[32] = {};
            if (there) unpack<DIM, BITS>(v, (const u32*)at, chunk);
#pragma unroll
            for (int c = 0; c < 4; c++) {
                u32 pair[4];
#pragma unroll
                for (int j = 0; j < 4; j++) pair[j] = to_f16(v[c * 8 + 2 * j + 1], v[c * 8 + 2 * j]);
                store_shared(to + place(row, chunk * 4 + c, LINE(DIM)), pair);
            }
        }
    }
    end_copies();
}

extern "C" __global__ void __launch_bounds__(128, 1) attend(
    const float* q, const char* keys, const char* values, const u32* meta,
    float* __restrict__ out, const __grid_constant__ Info info)
{
    __shared__ __align__(128) unsigned char key_memory[KEYS * LINE(KEY)];
    __shared__ __align__(128) unsigned char value_memory[KEYS * LINE(VALUE)];
    wait_for_last();
    let_next_start();
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4;
    const u32 first_row = blockIdx.x * 64, head = blockIdx.y, kv_head = head / (HEADS / KV_HEADS);
    const u32 last_row = min(first_row + 64, info.rows) - 1;
    const u32 key_at = shared_address(key_memory), value_at = shared_address(value_memory);

    const Seen seen(meta, first_row + warp * 16, last_row);
    u32 query[KEY / 16][2][4];
    read_queries<KEY / 16>(query, q, HEADS * KEY, head * KEY, seen, last_row, SCALE);

    float sums[VALUE / 8][4];
#pragma unroll
    for (int i = 0; i < VALUE / 8 * 4; i++) (&sums[0][0])[i] = 0;
    Softmax softmax;

    u32 start = first_row;
    while (start <= last_row) {
        const u32 own = meta[start * 4 + 3], stop = end_of_sequence(meta, start, last_row);
        const u32 least = meta[start * 4 + 1], end = meta[stop * 4 + 1] + 1;
        const u32 begin = WINDOW > 0 && least + 1 > WINDOW ? (least + 1 - WINDOW) / KEYS * KEYS : 0;
        const u32* table = meta + info.rows * 4 + own * info.more;
        fetch<KEY, KEY_BITS>(key_at, keys, table, begin, end, kv_head);
        for (u32 first = begin; first < end; first += KEYS) {
            fetch<VALUE, VALUE_BITS>(value_at, values, table, first, end, kv_head);
            wait_for_copies<1>();
            __syncthreads();
            float scores[KEYS / 8][4];
            multiply_keys<KEYS / 8, KEY / 16, LINE(KEY)>(scores, query, key_at, 0);
            __syncthreads();
            if (first + KEYS < end) fetch<KEY, KEY_BITS>(key_at, keys, table, first + KEYS, end, kv_head);
            else end_copies();

            float faded[2];
            softmax.take<KEYS / 8>(scores, first, own, seen, faded);
#pragma unroll
            for (int n = 0; n < VALUE / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) sums[n][i] *= faded[i / 2];
            wait_for_copies<1>();
            __syncthreads();
#pragma unroll
            for (int k = 0; k < KEYS / 16; k++) add_values<VALUE / 8, LINE(VALUE)>(sums, scores + 2 * k, value_at, k * 16, 0);
            __syncthreads();
        }
        wait_for_copies<0>();
        start = stop + 1;
    }

#pragma unroll
    for (int h = 0; h < 2; h++) {
        const float total = softmax.whole(h);
        if (seen.row[h] > last_row) continue;
        float* to = out + ((u64)seen.row[h] * HEADS + head) * VALUE + quad * 2;
#pragma unroll
        for (int n = 0; n < VALUE / 8; n++)
            *(float2*)(to + n * 8) = make_float2(sums[n][2 * h] / total, sums[n][2 * h + 1] / total);
    }
}
