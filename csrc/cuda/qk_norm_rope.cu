#include "device.cuh"

using namespace stg;
using namespace stg::cuda;

namespace {

// What a thread works on at once: `kWidth` pairs of one head, in two groups that are neighbours if pairs are or if
// there is no rope, else half a head apart.
template <typename T>
struct Unit {
    static constexpr int kPairs = kWidth<T>;

    int64_t head, pair;           // the first pair
    int64_t first, second;        // where the groups begin in the token
    int64_t in_first, in_second;  // values of them that exist

    __device__ Unit(const stg_qk_norm_rope_params& p, int64_t head, int64_t index) : head(head), pair(index * kPairs)
    {
        const int64_t begin = head * p.head_size;
        if (p.interleaved || p.cos.data == nullptr) {
            first = begin + 2 * pair;
            second = first + kPairs;
            in_first = p.head_size - 2 * pair;
            in_second = in_first - kPairs;
        } else {
            first = begin + pair;
            second = first + p.head_size / 2;
            in_first = in_second = p.head_size / 2 - pair;
        }
    }
};

// q or k, with what belongs to it.
struct Side {
    stg_tensor x, weight, bias;
    void* out;
};

__device__ Side side_of(const stg_qk_norm_rope_params& p, int index)
{
    return index == 0 ? Side{p.q, p.q_weight, p.q_bias, p.q_out} : Side{p.k, p.k_weight, p.k_bias, p.k_out};
}

template <typename T>
struct Values {
    float first[kWidth<T>], second[kWidth<T>];
};

template <typename T>
__device__ void read(const T* x, const Unit<T>& unit, bool aligned, Values<T>& values)
{
    load(x + unit.first, unit.in_first, aligned, values.first);
    load(x + unit.second, unit.in_second, aligned, values.second);
}

template <typename T>
__device__ float sum_of(const Unit<T>& unit, const Values<T>& values, float mean, bool squares)
{
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) {
        const float a = i < unit.in_first ? values.first[i] - mean : 0.f;
        const float b = i < unit.in_second ? values.second[i] - mean : 0.f;
        sum += squares ? a * a + b * b : a + b;
    }
    return sum;
}

template <typename T>
__device__ void affine(const Line<T>& weight, const Line<T>& bias, int64_t start, int64_t count, bool aligned,
                       float mean, float inverse, float (&values)[kWidth<T>])
{
    float table[kWidth<T>];
    weight.load(start, count, aligned, 1.f, table);
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) values[i] = (values[i] - mean) * inverse * table[i];
    bias.load(start, count, aligned, 0.f, table);
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) values[i] += table[i];
}

__device__ inline void turn(float& a, float& b, float cos, float sin)
{
    const float turned = a * cos - b * sin;
    b = b * cos + a * sin;
    a = turned;
}

template <typename T>
__device__ void rotate(const stg_qk_norm_rope_params& p, const Unit<T>& unit, int64_t row, int64_t token, bool aligned,
                       Values<T>& values)
{
    constexpr int kPairs = Unit<T>::kPairs;
    const int64_t entry = table_row(p.row_map, row), pairs = p.head_size / 2 - unit.pair;
    float cos[kPairs], sin[kPairs];
    load(token_of<float>(p.cos, entry, token) + unit.head * p.cos.strides[2] + unit.pair, pairs, aligned, cos);
    load(token_of<float>(p.sin, entry, token) + unit.head * p.sin.strides[2] + unit.pair, pairs, aligned, sin);
    if (p.interleaved) {
#pragma unroll
        for (int i = 0; i < kPairs; i += 2) {
            turn(values.first[i], values.first[i + 1], cos[i / 2], sin[i / 2]);
            turn(values.second[i], values.second[i + 1], cos[(kPairs + i) / 2], sin[(kPairs + i) / 2]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) turn(values.first[i], values.second[i], cos[i], sin[i]);
    }
}

template <typename T>
__device__ void write(const stg_qk_norm_rope_params& p, const Side& side, const Unit<T>& unit, int64_t row,
                      int64_t token, bool aligned, float mean, float inverse, Values<T>& values)
{
    const Line<T> weight(side.weight, 0), bias(side.bias, 0);
    const int64_t begin = p.per_head ? unit.head * p.head_size : 0;
    affine(weight, bias, unit.first - begin, unit.in_first, aligned, mean, inverse, values.first);
    affine(weight, bias, unit.second - begin, unit.in_second, aligned, mean, inverse, values.second);
    if (p.cos.data != nullptr) rotate(p, unit, row, token, aligned, values);
    T* out = static_cast<T*>(side.out) + (row * p.tokens + token) * p.heads * p.head_size;
    store(values.first, unit.in_first, aligned, out + unit.first);
    store(values.second, unit.in_second, aligned, out + unit.second);
}

// How a block shares a token: `lanes` threads, a power of two or the whole block, work on what has one norm. A thread
// keeps its unit in registers, if it has no more than one.
struct Shares {
    int threads, lanes;
    bool one;
};

template <typename T>
int64_t units_of(const stg_qk_norm_rope_params& p)
{
    return (p.head_size + 2 * kWidth<T> - 1) / (2 * kWidth<T>);
}

template <typename T>
Shares shares_of(const stg_qk_norm_rope_params& p)
{
    if (p.per_head) {
        int lanes = 1;
        while (lanes < kWarp && lanes < units_of<T>(p)) lanes *= 2;
        const int64_t threads = p.heads * lanes;
        return {round_up(threads < 256 ? threads : 256, kWarp), lanes, units_of<T>(p) <= lanes};
    }
    constexpr int kThreads = 512;
    const int64_t units = p.heads * units_of<T>(p);
    const int threads = units > kThreads ? kThreads : round_up(units, kWarp);
    return {threads, threads, units <= kThreads};
}

// One norm by `lanes` threads, all of the warp's: those without work bring zeros. Heads [head, head + heads).
template <typename T, bool ONE, bool PER_HEAD>
__device__ void work(const stg_qk_norm_rope_params& p, const Side& side, int64_t row, int64_t token, int64_t head,
                     int64_t heads, int lanes, bool aligned)
{
    const T* x = token_of<T>(side.x, row, token);
    const int64_t units_per_head = (p.head_size + 2 * kWidth<T> - 1) / (2 * kWidth<T>), units = heads * units_per_head;
    const int lane = int(threadIdx.x) % lanes;
    const auto unit_at = [&](int64_t index) {
        return Unit<T>(p, PER_HEAD ? head : head + index / units_per_head, PER_HEAD ? index : index % units_per_head);
    };
    Values<T> values;
    if (ONE && lane < units) read(x, unit_at(lane), aligned, values);
    const auto each = [&](const auto& function) {
        if constexpr (ONE) {
            if (lane < units) function(unit_at(lane), values);
        } else {
            for (int64_t index = lane; index < units; index += lanes) {
                read(x, unit_at(index), aligned, values);
                function(unit_at(index), values);
            }
        }
    };
    const auto mean_of = [&](float mean, bool squares) {
        float sum = 0.f;
        each([&](const Unit<T>& unit, const Values<T>& values) { sum += sum_of(unit, values, mean, squares); });
        return (PER_HEAD ? lanes_sum(sum, lanes) : block_sum(sum)) / float((PER_HEAD ? 1 : p.heads) * p.head_size);
    };
    const float mean = p.subtract_mean ? mean_of(0.f, false) : 0.f;
    const float inverse = 1.f / sqrtf(mean_of(mean, true) + p.eps);
    each([&](const Unit<T>& unit, Values<T>& values) {
        write(p, side, unit, row, token, aligned, mean, inverse, values);
    });
}

template <typename T, bool ONE, bool PER_HEAD>
__global__ void __launch_bounds__(PER_HEAD ? 256 : 512, 1)
    qk_norm_rope_kernel(const __grid_constant__ stg_qk_norm_rope_params p, int lanes, bool may_align)
{
    const bool aligned = ONE || may_align;
    const Side side = side_of(p, int(blockIdx.z));
    for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y)
        for (int64_t token = blockIdx.x; token < p.tokens; token += gridDim.x)
            if constexpr (PER_HEAD) {
                const int heads = int(blockDim.x) / lanes;
                for (int64_t begin = 0; begin < p.heads; begin += heads) {
                    const int64_t head = begin + int(threadIdx.x) / lanes;
                    work<T, ONE, true>(p, side, row, token, head, head < p.heads ? 1 : 0, lanes, aligned);
                }
            } else {
                work<T, ONE, false>(p, side, row, token, 0, p.heads, lanes, aligned);
            }
}

}  // namespace

stg_status stg_cuda_qk_norm_rope(const stg_qk_norm_rope_params* params, void* stream)
{
    if (const stg_status status = check(params)) return status;
    const auto& p = *params;
    if (is_empty(p)) return STG_OK;
    return with_dtype(p.q.dtype, [&](auto type) {
        using T = decltype(type);
        const bool aligned = p.head_size % (2 * kWidth<T>) == 0 && is_aligned(p.q) && is_aligned(p.k) &&
                             is_aligned(p.q_weight) && is_aligned(p.k_weight) && is_aligned(p.q_bias) &&
                             is_aligned(p.k_bias) && is_aligned(p.cos) && is_aligned(p.sin) && is_aligned(p.q_out) &&
                             is_aligned(p.k_out);
        const Shares shares = shares_of<T>(p);
        const dim3 grid = token_grid(p.tokens, p.rows, 2);
        const bool one = aligned && shares.one;
        const auto kernel = p.per_head ? one ? qk_norm_rope_kernel<T, true, true> : qk_norm_rope_kernel<T, false, true>
                            : one      ? qk_norm_rope_kernel<T, true, false>
                                       : qk_norm_rope_kernel<T, false, false>;
        return launch(kernel, grid, shares.threads, stream, p, shares.lanes, aligned);
    });
}
