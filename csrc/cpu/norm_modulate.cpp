#include "norm.h"

using namespace stg;
using namespace stg::cpu;

stg_status stg_cpu_norm_modulate(const stg_norm_modulate_params* params, const stg_cpu_pool* pool)
{
    if (const stg_status status = check(params)) return status;
    if (const stg_status status = check(pool)) return status;
    const auto& p = *params;
    if (is_empty(p)) return STG_OK;
    const int64_t together = shared_by(p.tokens, {p.scale, p.shift});
    with_dtype(p.x.dtype, [&](auto type) {
        using T = decltype(type);
        const auto tokens = [&](int64_t row, int64_t token, int64_t count) STG_INLINE {
            const T* x = token_of<T>(p.x, row, token);
            T* out = static_cast<T*>(p.out) + (row * p.tokens + token) * p.channels;
            Norm<T> norm = norm_of<T>(p, row, token);
            for (int64_t t = 0; t < count; ++t) norm.apply(x + t * p.x.strides[1], out + t * p.channels);
        };
        for_each_token(pool, p.rows, p.tokens, p.channels, together, tokens);
    });
    return STG_OK;
}
