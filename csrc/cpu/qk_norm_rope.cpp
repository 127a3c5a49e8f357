#include "norm.h"

using namespace stg;
using namespace stg::cpu;

namespace {

// q or k, with what belongs to it.
struct Side {
    const stg_tensor &x, &weight, &bias;
    void* out;
};

// One token of one side; `size` is a head's, where all heads are one where that makes no difference.
template <typename T>
struct Token {
    const T* x;
    T* out;
    Line<T> weight, bias;
    const float *cos, *sin;
    int64_t cos_stride, sin_stride, size;
    bool per_head, interleaved;
};

constexpr int64_t kHeads = 8;  // the most heads in one chunk

template <typename T>
STG_INLINE inline void normed(const Token<T>& token, int64_t start, int64_t count, Moments moments, float* out)
{
    alignas(64) float buffers[2][kChunk];
    const int64_t weight_start = token.per_head ? start % token.size : start;
    const float* w = token.weight.floats(weight_start, count, buffers[0], kOnes);
    const float* b = token.bias.floats(weight_start, count, buffers[1], kZeros);
    const T* in = token.x + start;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = (to_float(in[i]) - moments.mean) * moments.inverse * w[i] + b[i];
}

STG_INLINE inline void rotate(const float* values, int64_t pairs, const float* cos, const float* sin, bool interleaved,
                              float* turned)
{
    if (interleaved) {
#pragma omp simd
        for (int64_t i = 0; i < pairs; ++i) {
            turned[2 * i] = values[2 * i] * cos[i] - values[2 * i + 1] * sin[i];
            turned[2 * i + 1] = values[2 * i + 1] * cos[i] + values[2 * i] * sin[i];
        }
    } else {
#pragma omp simd
        for (int64_t i = 0; i < pairs; ++i) {
            turned[i] = values[i] * cos[i] - values[pairs + i] * sin[i];
            turned[pairs + i] = values[pairs + i] * cos[i] + values[i] * sin[i];
        }
    }
}

// `count` values of each of `heads` heads, from value `start` of a head on: all of them if there are several heads.
// Half-split pairs of a head that does not fit in one chunk come in two pieces.
template <typename T>
STG_INLINE inline void write_chunk(const Token<T>& token, int64_t head, int64_t heads, int64_t start, int64_t count,
                                   const Moments* moments)
{
    alignas(64) float values[kChunk], turned[kChunk];
    const bool rope = token.cos != nullptr;
    const bool split = rope && !token.interleaved && count < token.size;
    const int64_t first = head * token.size + (split ? start / 2 : start);
    const int64_t pieces = split ? 2 : token.per_head ? heads : 1;
    const int64_t length = heads * count / pieces, step = split ? token.size / 2 : token.size;
    for (int64_t i = 0; i < pieces; ++i)
        normed(token, first + i * step, length, moments[split ? 0 : i], values + i * length);
    for (int64_t h = 0; rope && h < heads; ++h)
        rotate(values + h * count, count / 2, token.cos + (head + h) * token.cos_stride + start / 2,
               token.sin + (head + h) * token.sin_stride + start / 2, token.interleaved, turned + h * count);
    for (int64_t i = 0; i < pieces; ++i) {
        const float* result = (rope ? turned : values) + i * length;
        T* to = token.out + first + i * step;
#pragma omp simd
        for (int64_t j = 0; j < length; ++j) to[j] = from_float<T>(result[j]);
    }
}

template <typename T>
STG_INLINE inline void write_token(const stg_qk_norm_rope_params& p, const Side& side, int64_t row, int64_t index)
{
    const int64_t channels = p.heads * p.head_size;
    const int64_t entry = table_row(p.row_map, row);
    const bool rope = p.cos.data != nullptr;
    const bool adjacent = p.cos.strides[2] == p.head_size / 2 && p.sin.strides[2] == p.head_size / 2;
    const int64_t size = !p.per_head && (!rope || (p.interleaved && adjacent)) ? channels : p.head_size;
    const Token<T> token{token_of<T>(side.x, row, index),
                         static_cast<T*>(side.out) + (row * p.tokens + index) * channels,
                         Line<T>(side.weight, 0),
                         Line<T>(side.bias, 0),
                         rope ? token_of<float>(p.cos, entry, index) : nullptr,
                         rope ? token_of<float>(p.sin, entry, index) : nullptr,
                         p.cos.strides[2],
                         p.sin.strides[2],
                         size,
                         p.per_head,
                         p.interleaved};
    const int64_t together = std::clamp<int64_t>(kChunk / size, 1, kHeads);
    Moments moments[kHeads];
    for (int64_t head = 0; head < channels / size; head += together) {
        const int64_t heads = std::min(together, channels / size - head);
        for (int64_t h = 0; h < (p.per_head ? heads : head == 0); ++h)
            moments[h] = moments_of(token.x + (head + h) * size, p.per_head ? size : channels, p.eps, p.subtract_mean);
        for (int64_t start = 0; start < size; start += kChunk)
            write_chunk(token, head, heads, start, std::min(kChunk, size - start), moments);
    }
}

}  // namespace

stg_status stg_cpu_qk_norm_rope(const stg_qk_norm_rope_params* params, const stg_cpu_pool* pool)
{
    if (const stg_status status = check(params)) return status;
    if (const stg_status status = check(pool)) return status;
    const auto& p = *params;
    if (is_empty(p)) return STG_OK;
    const Side sides[2] = {{p.q, p.q_weight, p.q_bias, p.q_out}, {p.k, p.k_weight, p.k_bias, p.k_out}};
    with_dtype(p.q.dtype, [&](auto type) {
        using T = decltype(type);
        const auto both = [&](int64_t row, int64_t token, int64_t)
                              STG_INLINE {  // one after the other: they share cos, sin
                                  for (const Side& side : sides) write_token<T>(p, side, row, token);
                              };
        for_each_token(pool, p.rows, p.tokens, 2 * p.heads * p.head_size, 1, both);
    });
    return STG_OK;
}
