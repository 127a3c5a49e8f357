// Values in groups of 128 bits, sums over a block, launches.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../check.h"

namespace stg::cuda {

struct Bfloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

__device__ inline float to_float(float value) { return value; }

__device__ inline float to_float(Bfloat16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }

// PTX instead of cuda_fp16.h and cuda_bf16.h: they take longer to compile than the kernels.
__device__ inline float to_float(Float16 value)
{
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

__device__ inline void from_float(float value, float& result) { result = value; }

__device__ inline void from_float(float value, Bfloat16& result)
{
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
}

__device__ inline void from_float(float value, Float16& result)
{
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
}

// Calls function(T()) with the type of the values; returns what it returns.
template <typename Function>
stg_status with_dtype(stg_dtype dtype, Function function)
{
    switch (dtype) {
        case STG_BFLOAT16: return function(Bfloat16());
        case STG_FLOAT16: return function(Float16());
        default: return function(float());
    }
}

// A group is what a thread reads at once. Values belong to the same group and thread whether or not they are aligned,
// so alignment does not change a sum's order.
constexpr int kBytes = 16;

template <typename T>
constexpr int kWidth = kBytes / int(sizeof(T));

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    T values[N];
};

template <typename T, int N>
constexpr int kPack = int(sizeof(T)) * N <= kBytes ? N : kBytes / int(sizeof(T));

// out[i] = in[i] for i < count, 0 behind; `aligned` says that all N are there and on a 16 byte boundary.
template <typename T, int N>
__device__ void load(const T* in, int64_t count, bool aligned, float (&out)[N])
{
    if (aligned) {
        constexpr int P = kPack<T, N>;
#pragma unroll
        for (int i = 0; i < N; i += P) {
            const Pack<T, P> pack = *reinterpret_cast<const Pack<T, P>*>(in + i);
#pragma unroll
            for (int j = 0; j < P; ++j) out[i + j] = to_float(pack.values[j]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = i < count ? to_float(in[i]) : 0.f;
    }
}

template <typename T, int N>
__device__ void store(const float (&in)[N], int64_t count, bool aligned, T* out)
{
    if (aligned) {
        constexpr int P = kPack<T, N>;
#pragma unroll
        for (int i = 0; i < N; i += P) {
            Pack<T, P> pack;
#pragma unroll
            for (int j = 0; j < P; ++j) from_float(in[i + j], pack.values[j]);
            *reinterpret_cast<Pack<T, P>*>(out + i) = pack;
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (i < count) from_float(in[i], out[i]);
    }
}

// A line of an optional tensor that has x's dtype T or float32.
template <typename T>
struct Line {
    const void* data;
    bool wide;
    int64_t offset;

    __device__ Line(const stg_tensor& tensor, int64_t offset)
        : data(tensor.data), wide(tensor.dtype == STG_FLOAT32), offset(offset)
    {}

    template <int N>
    __device__ void load(int64_t start, int64_t count, bool aligned, float absent, float (&out)[N]) const
    {
        if (data == nullptr) {
#pragma unroll
            for (int i = 0; i < N; ++i) out[i] = absent;
        } else if (wide) {
            cuda::load(static_cast<const float*>(data) + offset + start, count, aligned, out);
        } else {
            cuda::load(static_cast<const T*>(data) + offset + start, count, aligned, out);
        }
    }
};

template <typename T>
__device__ Line<T> line_of(const stg_tensor& table, int64_t row, int64_t token)
{
    return Line<T>(table, row * table.strides[0] + token * table.strides[1]);
}

template <typename T>
__device__ const T* token_of(const stg_tensor& tensor, int64_t row, int64_t token)
{
    return static_cast<const T*>(tensor.data) + row * tensor.strides[0] + token * tensor.strides[1];
}

__device__ inline int64_t table_row(const int64_t* row_map, int64_t row)
{
    return row_map == nullptr ? row : row_map[row];
}

// The sum over `lanes` neighbours, a power of two, in each of them.
__device__ inline float lanes_sum(float value, int lanes)
{
    for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
}

constexpr int kWarp = 32;

// The sum over the block, whole warps, in every thread of it.
__device__ inline float block_sum(float value)
{
    __shared__ float partial[kWarp];
    value = lanes_sum(value, kWarp);
    const int warps = int(blockDim.x) / kWarp, lane = int(threadIdx.x) % kWarp;
    if (lane == 0) partial[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = lanes_sum(lane < warps ? partial[lane] : 0.f, kWarp);
    __syncthreads();  // the next sum writes partial
    return value;
}

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % kBytes == 0; }

// All lines of an optional tensor begin on a 16 byte boundary.
inline bool is_aligned(const stg_tensor& tensor)
{
    if (tensor.data == nullptr) return true;
    const int64_t width = kBytes / (tensor.dtype == STG_FLOAT32 ? 4 : 2);
    return is_aligned(tensor.data) && tensor.strides[0] % width == 0 && tensor.strides[1] % width == 0 &&
           tensor.strides[2] % width == 0;
}

inline int round_up(int64_t value, int64_t multiple) { return int((value + multiple - 1) / multiple * multiple); }

// One block per token of a row; both loop where the grid ends before the tensor does.
inline dim3 token_grid(int64_t tokens, int64_t rows, int64_t sides = 1)
{
    constexpr int64_t kMaxX = 0x7fffffff, kMaxY = 65535;
    return dim3(unsigned(tokens < kMaxX ? tokens : kMaxX), unsigned(rows < kMaxY ? rows : kMaxY), unsigned(sides));
}

template <typename... Params>
stg_status launch(void (*kernel)(Params...), dim3 grid, int threads, void* stream, Params... params)
{
    void* arguments[] = {&params...};
    const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(unsigned(threads)),
                                               arguments, 0, static_cast<cudaStream_t>(stream));
    if (error == cudaSuccess) return STG_OK;
    cudaGetLastError();  // so that the caller's next check does not find it
    return fail(STG_CUDA_ERROR, "%s: %s", cudaGetErrorName(error), cudaGetErrorString(error));
}

}  // namespace stg::cuda
