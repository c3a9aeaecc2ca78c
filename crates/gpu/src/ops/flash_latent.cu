// Attention of prompts on NVIDIA's tensor cores where values are a prefix of the keys, as absorbed latent attention has them: 16 rows of the batch and one head
// a block, over 32 keys at a time with an online softmax.
//
// Defined before this text: HEADS, KEY and VALUE (columns of a head: multiples of 64), BRAIN (the cache is bf16, else f16), BLOCK_SIZE (tokens of a block of
// the cache), SCALE, and what `flash.cuh` names.
//
// A row of keys is too wide for the registers of a warp. Each of four has a quarter of the columns: it multiplies its part of the queries with its part of the
// keys, all add up what the four have, and it sums its part of the values. Queries and probabilities are two halves each, as in `flash.cu`.

#define WARPS 4
#define KEYS 32
#define LINE (KEY * 2)
// Sixteen columns of keys, and eight of values, of a warp.
#define DEEP (KEY / 16 / WARPS)
#define WIDE (VALUE / 8 / WARPS)

extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) attend(
    const float* q, const char* keys, const u32* meta, float* __restrict__ out, const __grid_constant__ Info info)
{
    __shared__ __align__(128) unsigned char memory[KEYS * LINE];
    __shared__ float4 parts[WARPS][KEYS / 8][32];
    wait_for_last();
    let_next_start();
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4;
    const u32 first_row = blockIdx.x * 16, head = blockIdx.y, last_row = min(first_row + 16, info.rows) - 1;
    const u32 keys_at = shared_address(memory), deep = warp * DEEP;
    const Seen seen(meta, first_row, last_row);

    u32 query[DEEP][2][4];
    read_queries<DEEP>(query, q, HEADS * KEY, head * KEY + deep * 16, seen, last_row, SCALE);

    float sums[WIDE][4];
#pragma unroll
    for (int i = 0; i < WIDE * 4; i++) (&sums[0][0])[i] = 0;
    Softmax softmax;

    u32 start = first_row;
    while (start <= last_row) {
        const u32 own = meta[start * 4 + 3], stop = end_of_sequence(meta, start, last_row);
        const u32 least = meta[start * 4 + 1], end = meta[stop * 4 + 1] + 1;
        const u32 begin = WINDOW > 0 && least + 1 > WINDOW ? (least + 1 - WINDOW) / KEYS * KEYS : 0;
        const u32* table = meta + info.rows * 4 + own * info.more;
        for (u32 first = begin; first < end; first += KEYS) {
            // Rows of positions, zeros past the end.
            for (u32 i = threadIdx.x; i < KEYS * (KEY / 8); i += 32 * WARPS) {
                const u32 row = i / (KEY / 8), chunk = i % (KEY / 8), p = first + row;
                const bool there = p < end;
                const u32 block = there ? table[p / BLOCK_SIZE] : 0;
                const char* at = keys + ((u64)block * BLOCK_SIZE + (there ? p % BLOCK_SIZE : 0)) * LINE;
                copy_later(keys_at + place(row, chunk, LINE), at + chunk * 16, there ? 16 : 0);
            }
            end_copies();
            wait_for_copies<0>();
            __syncthreads();

            float scores[KEYS / 8][4];
            multiply_keys<KEYS / 8, DEEP, LINE>(scores, query, keys_at, deep * 2);
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) parts[warp][n][lane] = make_float4(scores[n][0], scores[n][1], scores[n][2], scores[n][3]);
            __syncthreads();
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                float4 sum = parts[0][n][lane];
#pragma unroll
                for (int w = 1; w < WARPS; w++) {
                    const float4 s = parts[w][n][lane];
                    sum.x += s.x, sum.y += s.y, sum.z += s.z, sum.w += s.w;
                }
                scores[n][0] = sum.x, scores[n][1] = sum.y, scores[n][2] = sum.z, scores[n][3] = sum.w;
            }

            float faded[2];
            softmax.take<KEYS / 8>(scores, first, own, seen, faded);
#pragma unroll
            for (int n = 0; n < WIDE; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) sums[n][i] *= faded[i / 2];
#pragma unroll
            for (int k = 0; k < KEYS / 16; k++) add_values<WIDE, LINE>(sums, scores + 2 * k, keys_at, k * 16, warp * WIDE);
            // The keys have been read, and the parts.
            __syncthreads();
        }
        start = stop + 1;
    }

#pragma unroll
    for (int h = 0; h < 2; h++) {
        const float total = softmax.whole(h);
        if (seen.row[h] > last_row) continue;
        float* to = out + ((u64)seen.row[h] * HEADS + head) * VALUE + warp * WIDE * 8 + quad * 2;
#pragma unroll
        for (int n = 0; n < WIDE; n++) *(float2*)(to + n * 8) = make_float2(sums[n][2 * h] / total, sums[n][2 * h + 1] / total);
    }
}
