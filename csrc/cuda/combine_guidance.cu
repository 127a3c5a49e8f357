#include <type_traits>

#include "../moments.h"
#include "device.cuh"

using namespace stg;
using namespace stg::cuda;

namespace {

using Params = stg_combine_guidance_params;
using Moments = GuidanceMoments<float>;

constexpr int kThreads = 256;
constexpr int64_t kTiles = 512;  // at most, of one video: every block of the second launch merges them anew

// Tiles follow from a video's elements alone: neither another video nor the device changes a video's bits.
struct Tiling {
    int64_t tiles, length;
};

Tiling tiling_of(const Params& p)
{
    constexpr int64_t kSweep = kThreads * kWidth<uint16_t>;
    const int64_t sweeps = (p.elements + kSweep - 1) / kSweep;
    const int64_t length = (sweeps + kTiles - 1) / kTiles * kSweep;
    return {(p.elements + length - 1) / length, length};
}

struct Tile {
    int64_t video, begin, end;

    __device__ Tile(const Params& p, const Tiling& tiling, int64_t index) : video(index / tiling.tiles)
    {
        begin = index % tiling.tiles * tiling.length;
        end = begin + tiling.length < p.elements ? begin + tiling.length : p.elements;
    }
};

template <typename T>
__device__ const T* branch_of(const Params& p, int64_t branch, int64_t video)
{
    return static_cast<const T*>(p.rows) + (branch * p.videos + video) * p.elements;
}

// One group of c, u and v without rescale: on differences, which lose nothing where branches nearly agree.
template <typename T>
struct Group {
    float c[kWidth<T>], u[kWidth<T>], v[kWidth<T>];

    __device__ Group(const Params& p, int64_t video, int64_t start, int64_t count, bool aligned,
                     ScaledUncond scaled)
    {
        constexpr int kW = kWidth<T>;
        load(branch_of<T>(p, p.has_uncond, video) + start, count, aligned, c);
        if (p.has_uncond) {
            load(branch_of<T>(p, 0, video) + start, count, aligned, u);
            const float g = p.scales[0];
#pragma unroll
            for (int i = 0; i < kW; ++i) {
                const float near = scaled.near * u[i];
                v[i] = near + g * (c[i] - near);
            }
            if (p.cfg_star)
#pragma unroll
                for (int i = 0; i < kW; ++i) v[i] += scaled.beta * u[i];
        } else {
#pragma unroll
            for (int i = 0; i < kW; ++i) v[i] = c[i];
        }
        for (int64_t skip = 0; skip < p.skips; ++skip) {
            float skipped[kW];
            load(branch_of<T>(p, p.has_uncond + 1 + skip, video) + start, count, aligned, skipped);
            const float scale = p.scales[2 + skip];
#pragma unroll
            for (int i = 0; i < kW; ++i) v[i] += scale * (c[i] - skipped[i]);
        }
    }
};

template <typename T>
__device__ Moments moments_of(const Group<T>& group, int64_t count, bool cfg_star)
{
    constexpr int kW = kWidth<T>;
    const int n = count < kW ? int(count) : kW;
    Moments of{};
    of.count = float(n);
#pragma unroll
    for (int i = 0; i < kW; ++i) {  // what is behind the end is 0
        of.mean_c += group.c[i];
        of.mean_v += group.v[i];
        if (cfg_star) of.mean_u += group.u[i];
    }
    of.mean_c /= of.count, of.mean_v /= of.count, of.mean_u /= of.count;
#pragma unroll
    for (int i = 0; i < kW; ++i)
        if (i < n) {
            const float c = group.c[i] - of.mean_c, v = group.v[i] - of.mean_v;
            of.m2_c += c * c;
            of.m2_v += v * v;
            if (cfg_star) {
                const float u = group.u[i] - of.mean_u;
                of.m2_u += u * u;
                of.m2_vu += v * u;
            }
        }
    return of;
}

__device__ float shuffle_down(float value, int step) { return __shfl_down_sync(0xffffffffu, value, step); }

__device__ void warp_merge(Moments& of)
{
    for (int step = kWarp / 2; step > 0; step /= 2)
        merge(of, Moments{shuffle_down(of.count, step), shuffle_down(of.mean_c, step), shuffle_down(of.m2_c, step),
                          shuffle_down(of.mean_v, step), shuffle_down(of.m2_v, step), shuffle_down(of.mean_u, step),
                          shuffle_down(of.m2_u, step), shuffle_down(of.m2_vu, step), 0.f, 0.f, 0.f});
}

// In every thread of the block.
__device__ Moments block_merge(Moments of)
{
    __shared__ Moments partial[kThreads / kWarp];
    const int lane = int(threadIdx.x) % kWarp;
    warp_merge(of);
    if (lane == 0) partial[threadIdx.x / kWarp] = of;
    __syncthreads();
    of = lane < kThreads / kWarp ? partial[lane] : Moments{};
    __syncthreads();
    warp_merge(of);
    if (threadIdx.x == 0) partial[0] = of;
    __syncthreads();
    of = partial[0];
    __syncthreads();  // the next merge writes partial
    return of;
}

// <c, u> and |u|^2 of a tile.
template <typename T>
__device__ float2 dots_of(const Params& p, const Tile& tile, bool aligned)
{
    constexpr int kW = kWidth<T>;
    float2 dots{};
    for (int64_t start = tile.begin + int64_t(threadIdx.x) * kW; start < tile.end; start += kThreads * kW) {
        float c[kW], u[kW];
        load(branch_of<T>(p, 1, tile.video) + start, tile.end - start, aligned, c);
        load(branch_of<T>(p, 0, tile.video) + start, tile.end - start, aligned, u);
#pragma unroll
        for (int i = 0; i < kW; ++i) {
            dots.x += c[i] * u[i];
            dots.y += u[i] * u[i];
        }
    }
    return {block_sum(dots.x), block_sum(dots.y)};
}

template <typename T, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, 1)
    moments_kernel(const __grid_constant__ Params p, Tiling tiling, Moments* __restrict__ moments)
{
    for (int64_t index = blockIdx.x; index < p.videos * tiling.tiles; index += gridDim.x) {
        const Tile tile(p, tiling, index);
        float2 dots{};
        float alpha = 1.f;
        if (p.cfg_star) {
            dots = dots_of<T>(p, tile, ALIGNED);
            alpha = cfg_star_alpha(dots.x, dots.y);
        }
        const ScaledUncond scaled = scaled_uncond(alpha, p.scales[0]);
        Moments of{};
        for (int64_t start = tile.begin + int64_t(threadIdx.x) * kWidth<T>; start < tile.end;
             start += kThreads * kWidth<T>) {
            const Group<T> group(p, tile.video, start, tile.end - start, ALIGNED, scaled);
            merge(of, moments_of(group, tile.end - start, p.cfg_star));
        }
        of = block_merge(of);
        of.alpha = alpha, of.dot_cu = dots.x, of.dot_uu = dots.y;
        if (threadIdx.x == 0) moments[index] = of;
    }
}

__device__ Moments video_moments(const Params& p, const Tiling& tiling, const Moments* moments, int64_t video)
{
    moments += video * tiling.tiles;
    float alpha = 1.f;
    if (p.cfg_star) {
        float2 dots{};
        for (int64_t tile = threadIdx.x; tile < tiling.tiles; tile += kThreads)
            dots.x += moments[tile].dot_cu, dots.y += moments[tile].dot_uu;
        const float dot_cu = block_sum(dots.x), dot_uu = block_sum(dots.y);
        alpha = cfg_star_alpha(dot_cu, dot_uu);
    }
    Moments of{};
    for (int64_t tile = threadIdx.x; tile < tiling.tiles; tile += kThreads) {
        Moments part = moments[tile];
        if (p.cfg_star) set_alpha(part, alpha, p.scales[0]);
        merge(of, part);
    }
    of = block_merge(of);
    of.alpha = alpha;
    return of;
}

// Every block works it out anew, which spares a third launch.
__device__ Correction correction_of(const Params& p, const Tiling& tiling, const Moments* moments, int64_t video)
{
    const bool whole_batch = p.rescale && p.over_batch;
    Correction correction{{1.f, 0.f}, 1.f};
    Moments batch{};
    for (int64_t other = whole_batch ? 0 : video; other < (whole_batch ? p.videos : video + 1); ++other) {
        const Moments of = video_moments(p, tiling, moments, other);
        if (other == video) correction.uncond = scaled_uncond(of.alpha, p.scales[0]);
        merge(batch, of);
    }
    if (p.rescale) correction.factor = rescale_factor(batch, p.scales[1]);
    return correction;
}

template <typename T, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, 1)
    write_kernel(const __grid_constant__ Params p, Tiling tiling, const Moments* __restrict__ moments)
{
    constexpr int kW = kWidth<T>;
    for (int64_t index = blockIdx.x; index < p.videos * tiling.tiles; index += gridDim.x) {
        const Tile tile(p, tiling, index);
        const Correction correction =
            moments == nullptr ? Correction{{1.f, 0.f}, 1.f} : correction_of(p, tiling, moments, tile.video);
        for (int64_t start = tile.begin + int64_t(threadIdx.x) * kW; start < tile.end; start += kThreads * kW) {
            const int64_t count = tile.end - start, offset = tile.video * p.elements + start;
            Group<T> group(p, tile.video, start, count, ALIGNED, correction.uncond);
#pragma unroll
            for (int i = 0; i < kW; ++i) group.v[i] *= correction.factor;
            const auto finish = [&](auto* out) {
                using Out = std::remove_pointer_t<decltype(out)>;
                if (p.latents != nullptr) {
                    float latents[kW];
                    load(static_cast<const Out*>(p.latents) + offset, count, ALIGNED, latents);
#pragma unroll
                    for (int i = 0; i < kW; ++i) group.v[i] = latents[i] + *p.dt * group.v[i];
                }
                store(group.v, count, ALIGNED, out + offset);
            };
            if (p.out_dtype == STG_BFLOAT16)
                finish(static_cast<Bfloat16*>(p.out));
            else if (p.out_dtype == STG_FLOAT16)
                finish(static_cast<Float16*>(p.out));
            else
                finish(static_cast<float*>(p.out));
        }
    }
}

size_t workspace_size(const Params& p)
{
    if (is_empty(p) || !(p.rescale || p.cfg_star)) return 0;
    return alignof(Moments) - 1 + size_t(p.videos) * size_t(tiling_of(p).tiles) * sizeof(Moments);
}

Moments* workspace_of(const Params& p)
{
    const uintptr_t alignment = alignof(Moments);
    return reinterpret_cast<Moments*>((reinterpret_cast<uintptr_t>(p.workspace) + alignment - 1) / alignment *
                                      alignment);
}

}  // namespace

stg_status stg_cuda_combine_guidance_workspace(const stg_combine_guidance_params* params, size_t* size)
{
    if (const stg_status status = check_sizes(params)) return status;
    if (size == nullptr) return fail(STG_INVALID_ARGUMENT, "size is NULL; it must point to a size_t");
    *size = workspace_size(*params);
    return STG_OK;
}

stg_status stg_cuda_combine_guidance(const stg_combine_guidance_params* params, void* stream)
{
    if (const stg_status status = check_sizes(params)) return status;
    const auto& p = *params;
    const size_t needed = workspace_size(p);
    if (const stg_status status = check(params, needed)) return status;
    if (is_empty(p)) return STG_OK;
    const Tiling tiling = tiling_of(p);
    Moments* moments = needed > 0 ? workspace_of(p) : nullptr;
    const dim3 grid = token_grid(p.videos * tiling.tiles, 1);
    return with_dtype(p.dtype, [&](auto type) {
        using T = decltype(type);
        const bool aligned =
            p.elements % kWidth<T> == 0 && is_aligned(p.rows) && is_aligned(p.out) && is_aligned(p.latents);
        if (moments != nullptr) {
            const auto kernel = aligned ? moments_kernel<T, true> : moments_kernel<T, false>;
            if (const stg_status status = launch(kernel, grid, kThreads, stream, p, tiling, moments)) return status;
        }
        const auto kernel = aligned ? write_kernel<T, true> : write_kernel<T, false>;
        return launch(kernel, grid, kThreads, stream, p, tiling, static_cast<const Moments*>(moments));
    });
}
