// Normalization of one token by one block.
#pragma once

#include "device.cuh"

namespace stg::cuda {

// How a block shares one token's groups. It follows from channels and dtype alone, and so does a sum's order.
struct Shares {
    int threads, items;  // groups of a thread that stay in registers; 0: more than that, read again for every pass
};

template <typename T>
Shares shares_of(int64_t channels)
{
    constexpr int kThreads = 512;
    const int64_t groups = (channels + kWidth<T> - 1) / kWidth<T>;
    const int items = groups <= kThreads ? 1 : groups <= 4 * kThreads ? 4 : 0;
    return {items == 0 ? kThreads : round_up((groups + items - 1) / items, kWarp), items};
}

// The groups of this thread: reader(start, values) gives one. With ITEMS 0 it is called for every pass again.
template <int WIDTH, int ITEMS, typename Reader>
class Groups {
public:
    __device__ Groups(int64_t channels, const Reader& reader) : channels_(channels), reader_(reader)
    {
#pragma unroll
        for (int item = 0; item < ITEMS; ++item)
            if (start_of(item) < channels_) reader_(start_of(item), values_[item]);
    }

    template <typename Function>
    __device__ void each(const Function& function)
    {
        if constexpr (ITEMS > 0) {
#pragma unroll
            for (int item = 0; item < ITEMS; ++item)
                if (start_of(item) < channels_) function(start_of(item), values_[item]);
        } else {
            for (int64_t item = 0; start_of(item) < channels_; ++item) {
                float values[WIDTH];
                reader_(start_of(item), values);
                function(start_of(item), values);
            }
        }
    }

private:
    __device__ int64_t start_of(int64_t item) const { return (item * blockDim.x + threadIdx.x) * WIDTH; }

    float values_[ITEMS > 0 ? ITEMS : 1][WIDTH];
    const int64_t channels_;
    const Reader& reader_;
};

// Writes norm(x) * (1 + scale) + shift of one token.
template <typename T, typename Params, typename TokenGroups>
__device__ void normalize(const Params& p, int64_t row, int64_t token, bool aligned, TokenGroups& groups, T* out)
{
    constexpr int kW = kWidth<T>;
    const int64_t channels = p.channels;
    float mean = 0.f;
    if (p.subtract_mean) {
        float sum = 0.f;
        groups.each([&](int64_t, const float (&x)[kW]) {
#pragma unroll
            for (int i = 0; i < kW; ++i) sum += x[i];
        });
        mean = block_sum(sum) / float(channels);
    }
    float squares = 0.f;
    groups.each([&](int64_t start, const float (&x)[kW]) {
#pragma unroll
        for (int i = 0; i < kW; ++i) {
            const float centred = start + i < channels ? x[i] - mean : 0.f;
            squares += centred * centred;
        }
    });
    const float inverse = 1.f / sqrtf(block_sum(squares) / float(channels) + p.eps);

    const int64_t entry = table_row(p.row_map, row);
    const Line<T> weight(p.weight, 0), bias(p.bias, 0);
    const Line<T> scale = line_of<T>(p.scale, entry, token), shift = line_of<T>(p.shift, entry, token);
    groups.each([&](int64_t start, const float (&x)[kW]) {
        const int64_t count = channels - start;
        float y[kW], table[kW];
        weight.load(start, count, aligned, 1.f, table);
#pragma unroll
        for (int i = 0; i < kW; ++i) y[i] = (x[i] - mean) * inverse * table[i];
        bias.load(start, count, aligned, 0.f, table);
#pragma unroll
        for (int i = 0; i < kW; ++i) y[i] += table[i];
        scale.load(start, count, aligned, 0.f, table);
#pragma unroll
        for (int i = 0; i < kW; ++i) y[i] *= 1.f + table[i];
        shift.load(start, count, aligned, 0.f, table);
#pragma unroll
        for (int i = 0; i < kW; ++i) y[i] += table[i];
        store(y, count, aligned, out + start);
    });
}

}  // namespace stg::cuda
