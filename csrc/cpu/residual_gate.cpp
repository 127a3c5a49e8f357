#include <cstring>

#include "norm.h"

using namespace stg;
using namespace stg::cpu;

namespace {

// x + gate * y for tokens that share their gate.
template <typename T, typename Params>
class Residual {
public:
    STG_INLINE Residual(const Params& p, int64_t row, int64_t token)
        : p_(p),
          x_(token_of<T>(p.x, row, token)),
          y_(token_of<T>(p.y, row, token)),
          gate_(line_of<T>(p.gate, table_row(p.row_map, row), token)),
          passes_through_(p.pass_through != nullptr && p.pass_through[row])
    {}

    STG_INLINE void apply(int64_t token, T* out)
    {
        const T *x = x_ + token * p_.x.strides[1], *y = y_ + token * p_.y.strides[1];
        if (passes_through_) {
            std::memcpy(out, x, size_t(p_.channels) * sizeof(T));
            return;
        }
        for (int64_t start = 0; start < p_.channels; start += kKept) {
            const int64_t count = std::min(kKept, p_.channels - start);
            if (!kept_) widen_gate(start, count);
            const T *a = x + start, *b = y + start;
            T* to = out + start;
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) to[i] = from_float<T>(to_float(a[i]) + widened_[i] * to_float(b[i]));
        }
        kept_ = p_.channels <= kKept;
    }

private:
    STG_INLINE void widen_gate(int64_t start, int64_t count)
    {
        alignas(64) float buffer[kChunk];
        for (int64_t chunk = 0; chunk < count; chunk += kChunk) {
            const int64_t length = std::min(kChunk, count - chunk);
            widen(gate_.floats(start + chunk, length, buffer, kOnes), length, widened_ + chunk);
        }
    }

    alignas(64) float widened_[kKept];
    const Params& p_;
    const T *x_, *y_;
    const Line<T> gate_;
    const bool passes_through_;
    bool kept_ = false;
};

}  // namespace

stg_status stg_cpu_residual_gate(const stg_residual_gate_params* params, const stg_cpu_pool* pool)
{
    if (const stg_status status = check(params)) return status;
    if (const stg_status status = check(pool)) return status;
    const auto& p = *params;
    if (is_empty(p)) return STG_OK;
    const int64_t together = shared_by(p.tokens, {p.gate});
    with_dtype(p.x.dtype, [&](auto type) {
        using T = decltype(type);
        const auto tokens = [&](int64_t row, int64_t token, int64_t count) STG_INLINE {
            T* out = static_cast<T*>(p.out) + (row * p.tokens + token) * p.channels;
            Residual<T, stg_residual_gate_params> residual(p, row, token);
            for (int64_t t = 0; t < count; ++t) residual.apply(t, out + t * p.channels);
        };
        for_each_token(pool, p.rows, p.tokens, p.channels, together, tokens);
    });
    return STG_OK;
}

stg_status stg_cpu_residual_gate_norm_modulate(const stg_residual_gate_norm_modulate_params* params,
                                               const stg_cpu_pool* pool)
{
    if (const stg_status status = check(params)) return status;
    if (const stg_status status = check(pool)) return status;
    const auto& p = *params;
    if (is_empty(p)) return STG_OK;
    const int64_t together = shared_by(p.tokens, {p.gate, p.scale, p.shift});
    with_dtype(p.x.dtype, [&](auto type) {
        using T = decltype(type);
        const auto tokens = [&](int64_t row, int64_t token, int64_t count) STG_INLINE {
            const int64_t offset = (row * p.tokens + token) * p.channels;
            T *out = static_cast<T*>(p.out) + offset, *norm_out = static_cast<T*>(p.norm_out) + offset;
            Residual<T, stg_residual_gate_norm_modulate_params> residual(p, row, token);
            Norm<T> norm = norm_of<T>(p, row, token);
            for (int64_t t = 0; t < count; ++t, out += p.channels, norm_out += p.channels) {
                residual.apply(t, out);
                norm.apply(out, norm_out);
            }
        };
        for_each_token(pool, p.rows, p.tokens, p.channels, together, tokens);
    });
    return STG_OK;
}
