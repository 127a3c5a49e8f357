#include "norm.cuh"

using namespace stg;
using namespace stg::cuda;

namespace {

// Groups of x + gate * y of one token, written to out on the way and read as they are there: rounded.
template <typename T, typename Params>
class Residual {
public:
    __device__ Residual(const Params& p, int64_t row, int64_t token, bool aligned)
        : x_(token_of<T>(p.x, row, token)),
          y_(token_of<T>(p.y, row, token)),
          gate_(line_of<T>(p.gate, table_row(p.row_map, row), token)),
          out_(static_cast<T*>(p.out) + (row * p.tokens + token) * p.channels),
          channels_(p.channels),
          aligned_(aligned),
          passes_through_(p.pass_through != nullptr && p.pass_through[row])
    {}

    __device__ void operator()(int64_t start, float (&values)[kWidth<T>]) const
    {
        const int64_t count = channels_ - start;
        if (passes_through_) {
            copy(start, count);
            load(x_ + start, count, aligned_, values);
            return;
        }
        float y[kWidth<T>], gate[kWidth<T>];
        load(x_ + start, count, aligned_, values);
        load(y_ + start, count, aligned_, y);
        gate_.load(start, count, aligned_, 1.f, gate);
#pragma unroll
        for (int i = 0; i < kWidth<T>; ++i) {
            T rounded;
            from_float(values[i] + gate[i] * y[i], rounded);
            values[i] = to_float(rounded);
        }
        store(values, count, aligned_, out_ + start);
    }

private:
    // Not through float: the bits of a NaN stay.
    __device__ void copy(int64_t start, int64_t count) const
    {
        if (aligned_) {
            using Group = Pack<T, kWidth<T>>;
            *reinterpret_cast<Group*>(out_ + start) = *reinterpret_cast<const Group*>(x_ + start);
        } else {
            for (int i = 0; i < kWidth<T> && i < count; ++i) out_[start + i] = x_[start + i];
        }
    }

    const T *x_, *y_;
    const Line<T> gate_;
    T* out_;
    const int64_t channels_;
    const bool aligned_, passes_through_;
};

template <typename T, bool ALIGNED>
__global__ void __launch_bounds__(512, 1) residual_gate_kernel(const __grid_constant__ stg_residual_gate_params p)
{
    for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y)
        for (int64_t token = blockIdx.x; token < p.tokens; token += gridDim.x) {
            const Residual<T, stg_residual_gate_params> residual(p, row, token, ALIGNED);
            float values[kWidth<T>];
            for (int64_t start = int64_t(threadIdx.x) * kWidth<T>; start < p.channels; start += blockDim.x * kWidth<T>)
                residual(start, values);
        }
}

template <typename T, int ITEMS>
__global__ void __launch_bounds__(512, 1)
    residual_gate_norm_modulate_kernel(const __grid_constant__ stg_residual_gate_norm_modulate_params p, bool may_align)
{
    const bool aligned = ITEMS > 0 || may_align;
    for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y)
        for (int64_t token = blockIdx.x; token < p.tokens; token += gridDim.x) {
            const Residual<T, stg_residual_gate_norm_modulate_params> residual(p, row, token, aligned);
            Groups<kWidth<T>, ITEMS, decltype(residual)> groups(p.channels, residual);
            T* norm_out = static_cast<T*>(p.norm_out) + (row * p.tokens + token) * p.channels;
            normalize(p, row, token, aligned, groups, norm_out);
        }
}

template <typename Params>
bool lines_are_aligned(const Params& p)
{
    return is_aligned(p.x) && is_aligned(p.y) && is_aligned(p.gate) && is_aligned(p.out);
}

}  // namespace

stg_status stg_cuda_residual_gate(const stg_residual_gate_params* params, void* stream)
{
    if (const stg_status status = check(params)) return status;
    const auto& p = *params;
    if (is_empty(p)) return STG_OK;
    return with_dtype(p.x.dtype, [&](auto type) {
        using T = decltype(type);
        const int64_t groups = (p.channels + kWidth<T> - 1) / kWidth<T>;
        const int threads = round_up(groups < 256 ? groups : 256, kWarp);
        const bool aligned = p.channels % kWidth<T> == 0 && lines_are_aligned(p);
        const auto kernel = aligned ? residual_gate_kernel<T, true> : residual_gate_kernel<T, false>;
        return launch(kernel, token_grid(p.tokens, p.rows), threads, stream, p);
    });
}

stg_status stg_cuda_residual_gate_norm_modulate(const stg_residual_gate_norm_modulate_params* params, void* stream)
{
    if (const stg_status status = check(params)) return status;
    const auto& p = *params;
    if (is_empty(p)) return STG_OK;
    return with_dtype(p.x.dtype, [&](auto type) {
        using T = decltype(type);
        const bool aligned = p.channels % kWidth<T> == 0 && lines_are_aligned(p) && is_aligned(p.scale) &&
                             is_aligned(p.shift) && is_aligned(p.weight) && is_aligned(p.bias) &&
                             is_aligned(p.norm_out);
        const Shares shares = shares_of<T>(p.channels);
        const dim3 grid = token_grid(p.tokens, p.rows);
        switch (aligned ? shares.items : 0) {
            case 1: return launch(residual_gate_norm_modulate_kernel<T, 1>, grid, shares.threads, stream, p, true);
            case 4: return launch(residual_gate_norm_modulate_kernel<T, 4>, grid, shares.threads, stream, p, true);
            default: return launch(residual_gate_norm_modulate_kernel<T, 0>, grid, shares.threads, stream, p, aligned);
        }
    });
}
