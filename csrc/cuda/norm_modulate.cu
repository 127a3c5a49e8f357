#include "norm.cuh"

using namespace stg;
using namespace stg::cuda;

namespace {

template <typename T, int ITEMS>
__global__ void __launch_bounds__(512, 1)
    norm_modulate_kernel(const __grid_constant__ stg_norm_modulate_params p, bool may_align)
{
    const bool aligned = ITEMS > 0 || may_align;
    for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y)
        for (int64_t token = blockIdx.x; token < p.tokens; token += gridDim.x) {
            const T* x = token_of<T>(p.x, row, token);
            const auto read = [&](int64_t start, float (&values)[kWidth<T>]) {
                load(x + start, p.channels - start, aligned, values);
            };
            Groups<kWidth<T>, ITEMS, decltype(read)> groups(p.channels, read);
            T* out = static_cast<T*>(p.out) + (row * p.tokens + token) * p.channels;
            normalize(p, row, token, aligned, groups, out);
        }
}

}  // namespace

stg_status stg_cuda_norm_modulate(const stg_norm_modulate_params* params, void* stream)
{
    if (const stg_status status = check(params)) return status;
    const auto& p = *params;
    if (is_empty(p)) return STG_OK;
    return with_dtype(p.x.dtype, [&](auto type) {
        using T = decltype(type);
        const bool aligned = p.channels % kWidth<T> == 0 && is_aligned(p.x) && is_aligned(p.scale) &&
                             is_aligned(p.shift) && is_aligned(p.weight) && is_aligned(p.bias) && is_aligned(p.out);
        const Shares shares = shares_of<T>(p.channels);
        const dim3 grid = token_grid(p.tokens, p.rows);
        switch (aligned ? shares.items : 0) {
            case 1: return launch(norm_modulate_kernel<T, 1>, grid, shares.threads, stream, p, true);
            case 4: return launch(norm_modulate_kernel<T, 4>, grid, shares.threads, stream, p, true);
            default: return launch(norm_modulate_kernel<T, 0>, grid, shares.threads, stream, p, aligned);
        }
    });
}
