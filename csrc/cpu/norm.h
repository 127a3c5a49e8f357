// What a normalization does to one line of values.
#pragma once

#include <cmath>

#include "parallel.h"

namespace stg::cpu {

struct Moments {
    float mean;
    float inverse;  // 1 / sqrt(mean((x - mean)^2) + eps)
};

template <typename T>
STG_INLINE inline Moments moments_of(const T* x, int64_t count, float eps, bool subtract_mean)
{
    float mean = 0.f;
    if (subtract_mean) mean = sum(count, [&](int64_t i) STG_INLINE { return to_float(x[i]); }) / float(count);
    const float squares = sum(count, [&](int64_t i) STG_INLINE {
        const float centred = to_float(x[i]) - mean;
        return centred * centred;
    });
    return {mean, 1.f / std::sqrt(squares / float(count) + eps)};
}

// Channels whose tables are kept widened from one token to the next that shares them: two lines fill level 1 cache.
constexpr int64_t kKept = 4096;

// The most tokens in a row that share their tables.
inline int64_t shared_by(int64_t tokens, std::initializer_list<stg_tensor> tables)
{
    for (const stg_tensor& table : tables)
        if (table.data != nullptr && table.strides[1] != 0) return 1;
    return tokens;
}

// norm(x) * (1 + scale) + shift = (x - mean) * inverse * slope + intercept for tokens that share their tables.
template <typename T>
class Norm {
public:
    STG_INLINE Norm(int64_t channels, float eps, bool subtract_mean, Line<T> weight, Line<T> bias, Line<T> scale,
                    Line<T> shift)
        : channels_(channels),
          eps_(eps),
          subtract_mean_(subtract_mean),
          weight_(weight),
          bias_(bias),
          scale_(scale),
          shift_(shift)
    {}

    STG_INLINE void apply(const T* x, T* out)
    {
        const Moments moments = moments_of(x, channels_, eps_, subtract_mean_);
        for (int64_t start = 0; start < channels_; start += kKept) {
            const int64_t count = std::min(kKept, channels_ - start);
            if (!kept_) widen_tables(start, count);
            const T* in = x + start;
            T* to = out + start;
#pragma omp simd
            for (int64_t i = 0; i < count; ++i)
                to[i] = from_float<T>((to_float(in[i]) - moments.mean) * moments.inverse * slope_[i] + intercept_[i]);
        }
        kept_ = channels_ <= kKept;
    }

private:
    STG_INLINE void widen_tables(int64_t start, int64_t count)
    {
        alignas(64) float buffers[4][kChunk];
        for (int64_t chunk = 0; chunk < count; chunk += kChunk) {
            const int64_t length = std::min(kChunk, count - chunk);
            const float* w = weight_.floats(start + chunk, length, buffers[0], kOnes);
            const float* b = bias_.floats(start + chunk, length, buffers[1], kZeros);
            const float* s = scale_.floats(start + chunk, length, buffers[2], kZeros);
            const float* h = shift_.floats(start + chunk, length, buffers[3], kZeros);
            float *slope = slope_ + chunk, *intercept = intercept_ + chunk;
#pragma omp simd
            for (int64_t i = 0; i < length; ++i) {
                slope[i] = w[i] * (1.f + s[i]);
                intercept[i] = b[i] * (1.f + s[i]) + h[i];
            }
        }
    }

    alignas(64) float slope_[kKept], intercept_[kKept];
    const int64_t channels_;
    const float eps_;
    const bool subtract_mean_;
    const Line<T> weight_, bias_, scale_, shift_;
    bool kept_ = false;
};

// Which row of its tables row r reads.
inline int64_t table_row(const int64_t* row_map, int64_t row) { return row_map == nullptr ? row : row_map[row]; }

template <typename T>
STG_INLINE inline Line<T> line_of(const stg_tensor& table, int64_t row, int64_t token)
{
    return Line<T>(table, row * table.strides[0] + token * table.strides[1]);
}

// The norm of two ops: `Params` has channels, scale, shift, weight, bias, row_map, eps and subtract_mean.
template <typename T, typename Params>
STG_INLINE inline Norm<T> norm_of(const Params& p, int64_t row, int64_t token)
{
    const int64_t entry = table_row(p.row_map, row);
    return Norm<T>(p.channels, p.eps, p.subtract_mean, Line<T>(p.weight, 0), Line<T>(p.bias, 0),
                   line_of<T>(p.scale, entry, token), line_of<T>(p.shift, entry, token));
}

template <typename T>
STG_INLINE inline const T* token_of(const stg_tensor& tensor, int64_t row, int64_t token)
{
    return static_cast<const T*>(tensor.data) + row * tensor.strides[0] + token * tensor.strides[1];
}

}  // namespace stg::cpu
