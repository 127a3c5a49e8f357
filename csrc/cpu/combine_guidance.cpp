#include <type_traits>

#include "../moments.h"
#include "parallel.h"

using namespace stg;
using namespace stg::cpu;

namespace {

using Moments = GuidanceMoments<double>;

constexpr int64_t kTile = 2048;  // part of the result's bits: the tree of merges follows from it alone

struct Tile {
    int64_t video, start, count;
};

struct Workspace {
    Moments* moments;         // [videos, tiles]
    Correction* corrections;  // [videos]
    size_t size;
};

int64_t tiles_of(const stg_combine_guidance_params& p) { return (p.elements + kTile - 1) / kTile; }

Tile tile_of(const stg_combine_guidance_params& p, int64_t index)
{
    const int64_t tiles = tiles_of(p), start = index % tiles * kTile;
    return {index / tiles, start, p.elements - start < kTile ? p.elements - start : kTile};
}

Workspace workspace_of(const stg_combine_guidance_params& p)
{
    if (is_empty(p) || !(p.rescale || p.cfg_star)) return {nullptr, nullptr, 0};
    const size_t alignment = alignof(Moments), videos = size_t(p.videos), tiles = size_t(tiles_of(p));
    const uintptr_t start = (reinterpret_cast<uintptr_t>(p.workspace) + alignment - 1) / alignment * alignment;
    Moments* moments = reinterpret_cast<Moments*>(start);
    return {moments, reinterpret_cast<Correction*>(moments + videos * tiles),
            alignment - 1 + videos * (tiles * sizeof(Moments) + sizeof(Correction))};
}

template <typename T>
STG_INLINE inline const T* branch_of(const stg_combine_guidance_params& p, int64_t branch, const Tile& tile)
{
    return static_cast<const T*>(p.rows) + (branch * p.videos + tile.video) * p.elements + tile.start;
}

// v without rescale: on differences, which lose nothing where the branches are nearly equal.
template <typename T>
STG_INLINE inline void guide(const stg_combine_guidance_params& p, const Tile& tile, ScaledUncond scaled, float* v)
{
    const T* cond = branch_of<T>(p, p.has_uncond, tile);
    if (p.has_uncond) {
        const T* uncond = branch_of<T>(p, 0, tile);
        const float g = p.scales[0];
#pragma omp simd
        for (int64_t i = 0; i < tile.count; ++i) {
            const float u = scaled.near * to_float(uncond[i]);
            v[i] = u + g * (to_float(cond[i]) - u);
        }
        if (p.cfg_star)
#pragma omp simd
            for (int64_t i = 0; i < tile.count; ++i) v[i] += scaled.beta * to_float(uncond[i]);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < tile.count; ++i) v[i] = to_float(cond[i]);
    }
    for (int64_t skip = 0; skip < p.skips; ++skip) {
        const T* skipped = branch_of<T>(p, p.has_uncond + 1 + skip, tile);
        const float scale = p.scales[2 + skip];
#pragma omp simd
        for (int64_t i = 0; i < tile.count; ++i) v[i] += scale * (to_float(cond[i]) - to_float(skipped[i]));
    }
}

// The values themselves, or widened into `buffer`.
template <typename T>
STG_INLINE inline const float* floats_of(const T* values, int64_t count, float* buffer)
{
    if constexpr (std::is_same_v<T, float>) return values;
    widen(values, count, buffer);
    return buffer;
}

template <typename T>
STG_INLINE inline Moments moments_of(const stg_combine_guidance_params& p, const Tile& tile)
{
    alignas(64) float v[kTile], widened_c[kTile], widened_u[kTile];
    const int64_t n = tile.count;
    const float* c = floats_of(branch_of<T>(p, p.has_uncond, tile), n, widened_c);
    const float* u = p.cfg_star ? floats_of(branch_of<T>(p, 0, tile), n, widened_u) : c;
    Moments of{};
    of.count = double(n);

    of.alpha = 1;
    if (p.cfg_star) {
        of.dot_cu = sum(n, [&](int64_t i) STG_INLINE { return c[i] * u[i]; });
        of.dot_uu = sum(n, [&](int64_t i) STG_INLINE { return u[i] * u[i]; });
        of.alpha = cfg_star_alpha(of.dot_cu, of.dot_uu);
    }
    if (!p.rescale) return of;
    guide<T>(p, tile, scaled_uncond(of.alpha, double(p.scales[0])), v);
    const float* values[3] = {c, v, u};
    float means[3] = {};
    for (int i = 0; i < 2 + p.cfg_star; ++i)
        means[i] = sum(n, [&](int64_t k) STG_INLINE { return values[i][k]; }) / float(n);
    of.mean_c = means[0], of.mean_v = means[1], of.mean_u = means[2];
    const struct {
        int a, b;
        double* out;
    } products[] = {{0, 0, &of.m2_c}, {1, 1, &of.m2_v}, {2, 2, &of.m2_u}, {1, 2, &of.m2_vu}};
    for (int k = 0; k < (p.cfg_star ? 4 : 2); ++k) {
        const float *a = values[products[k].a], *b = values[products[k].b];
        const float mean_a = means[products[k].a], mean_b = means[products[k].b];
        *products[k].out = sum(n, [&](int64_t i) STG_INLINE { return (a[i] - mean_a) * (b[i] - mean_b); });
    }
    return of;
}

void merge_tree(Moments* moments, int64_t count)
{
    for (int64_t step = 1; step < count; step *= 2)
        for (int64_t i = 0; i + step < count; i += 2 * step) merge(moments[i], moments[i + step]);
}

void correct(const stg_combine_guidance_params& p, const Workspace& workspace)
{
    const int64_t tiles = tiles_of(p);
    const double g = p.scales[0], r = p.scales[1];
    for (int64_t video = 0; video < p.videos; ++video) {
        Moments* const of = workspace.moments + video * tiles;
        double alpha = 1, dot_cu = 0, dot_uu = 0;
        if (p.cfg_star) {
            for (int64_t i = 0; i < tiles; ++i) dot_cu += of[i].dot_cu, dot_uu += of[i].dot_uu;
            alpha = cfg_star_alpha(dot_cu, dot_uu);
            for (int64_t i = 0; i < tiles; ++i) set_alpha(of[i], alpha, g);
        }
        merge_tree(of, tiles);
        workspace.corrections[video] = {scaled_uncond(alpha, g), p.rescale ? float(rescale_factor(*of, r)) : 1.f};
        if (video > 0 && p.over_batch) merge(workspace.moments[0], *of);
    }
    if (!p.rescale || !p.over_batch) return;
    for (int64_t video = 0; video < p.videos; ++video)
        workspace.corrections[video].factor = float(rescale_factor(workspace.moments[0], r));
}

template <typename Out>
STG_INLINE inline void store(const stg_combine_guidance_params& p, const Tile& tile, const float* v, float factor)
{
    const int64_t offset = tile.video * p.elements + tile.start;
    Out* out = static_cast<Out*>(p.out) + offset;
    if (p.latents == nullptr) {
#pragma omp simd
        for (int64_t i = 0; i < tile.count; ++i) out[i] = from_float<Out>(v[i] * factor);
        return;
    }
    const Out* latents = static_cast<const Out*>(p.latents) + offset;
    const float dt = *p.dt;
#pragma omp simd
    for (int64_t i = 0; i < tile.count; ++i) out[i] = from_float<Out>(to_float(latents[i]) + dt * (v[i] * factor));
}

template <typename T>
STG_INLINE inline void write(const stg_combine_guidance_params& p, const Tile& tile, Correction correction)
{
    alignas(64) float v[kTile];
    guide<T>(p, tile, correction.uncond, v);
    with_dtype(p.out_dtype, [&](auto type) STG_INLINE { store<decltype(type)>(p, tile, v, correction.factor); });
}

}  // namespace

stg_status stg_cpu_combine_guidance_workspace(const stg_combine_guidance_params* params, size_t* size)
{
    if (const stg_status status = check_sizes(params)) return status;
    if (size == nullptr) return fail(STG_INVALID_ARGUMENT, "size is NULL; it must point to a size_t");
    *size = workspace_of(*params).size;
    return STG_OK;
}

stg_status stg_cpu_combine_guidance(const stg_combine_guidance_params* params, const stg_cpu_pool* pool)
{
    if (const stg_status status = check_sizes(params)) return status;
    const auto& p = *params;
    const Workspace workspace = workspace_of(p);
    if (const stg_status status = check(params, workspace.size)) return status;
    if (const stg_status status = check(pool)) return status;
    if (is_empty(p)) return STG_OK;
    const int64_t tiles = tiles_of(p);
    with_dtype(p.dtype, [&](auto type) {
        using T = decltype(type);
        if (workspace.size > 0) {
            const auto collect = [&](int64_t begin, int64_t end) STG_INLINE {
                for (int64_t i = begin; i < end; ++i) workspace.moments[i] = moments_of<T>(p, tile_of(p, i));
            };
            parallel_for(pool, p.videos * tiles, kGrain / kTile, collect);
            correct(p, workspace);
        }
        const auto combine = [&](int64_t begin, int64_t end) STG_INLINE {
            for (int64_t i = begin; i < end; ++i) {
                const Tile tile = tile_of(p, i);
                write<T>(p, tile, workspace.size > 0 ? workspace.corrections[tile.video] : Correction{{1.f, 0.f}, 1.f});
            }
        };
        parallel_for(pool, p.videos * tiles, kGrain / kTile, combine);
    });
    return STG_OK;
}
