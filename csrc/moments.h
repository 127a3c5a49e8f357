// What rescale and CFG-star need to know of a video, collected in tiles: arithmetic for both flavours.
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define STG_HOST_DEVICE __host__ __device__
#else
#define STG_HOST_DEVICE
#endif

namespace stg {

// Of cond c, uncond u and v = a u + g (c - a u) + sum_i s_i (c - p_i), a being alpha: counts, means, sums of squared
// deviations from them and of products of deviations; <c, u> and |u|^2. CFG-star's alpha is known when all of a video
// has been read. Until then each tile takes its own, with which a u is no larger than c: nothing cancels.
template <typename Real>
struct GuidanceMoments {
    Real count, mean_c, m2_c, mean_v, m2_v, mean_u, m2_u, m2_vu, alpha, dot_cu, dot_uu;
};

template <typename Real>
STG_HOST_DEVICE inline Real cfg_star_alpha(Real dot_cu, Real dot_uu)
{
    return dot_cu / (dot_uu + Real(1e-8));
}

// a u + g (c - a u) as n + g (c - n) + beta u with n = near u, which is exact: a u alone would be rounded and that error
// multiplied by g - 1. Without CFG-star near is 1 and beta 0.
struct ScaledUncond {
    float near, beta;
};

template <typename Real>
STG_HOST_DEVICE inline ScaledUncond scaled_uncond(Real alpha, Real g)
{
    const Real near = alpha > Real(0.5) ? 1 : 0;
    return {float(near), float((alpha - near) * (1 - g))};
}

// v as another alpha makes it: (1 - g) (alpha - of.alpha) u is added.
template <typename Real>
STG_HOST_DEVICE inline void set_alpha(GuidanceMoments<Real>& of, Real alpha, Real g)
{
    const Real beta = (1 - g) * (alpha - of.alpha);
    const Real m2 = of.m2_v + 2 * beta * of.m2_vu + beta * beta * of.m2_u;
    of.m2_v = m2 < 0 ? 0 : m2;
    of.m2_vu += beta * of.m2_u;
    of.mean_v += beta * of.mean_u;
    of.alpha = alpha;
}

// Chan, Golub, LeVeque (1979): no sums of squares that cancel. In place, so that a tree of merges needs no memory.
// Of c, u, v; both have one alpha.
template <typename Real>
STG_HOST_DEVICE inline void merge(GuidanceMoments<Real>& a, const GuidanceMoments<Real>& b)
{
    if (b.count == 0) return;
    const Real count = a.count + b.count;
    const Real weight = b.count / count;
    const Real spread = a.count * weight;
    const Real c = b.mean_c - a.mean_c, v = b.mean_v - a.mean_v, u = b.mean_u - a.mean_u;
    a.m2_c += b.m2_c + c * c * spread;
    a.m2_v += b.m2_v + v * v * spread;
    a.m2_u += b.m2_u + u * u * spread;
    a.m2_vu += b.m2_vu + v * u * spread;
    a.mean_c += c * weight;
    a.mean_v += v * weight;
    a.mean_u += u * weight;
    a.count = count;
}

// r std(c) / std(v) + 1 - r; the N - 1 of both cancel. A single value has no deviation: NaN, as in torch.
template <typename Real>
STG_HOST_DEVICE inline Real rescale_factor(const GuidanceMoments<Real>& of, Real r)
{
    return r * sqrt(of.m2_c / of.m2_v) + (1 - r);
}

struct Correction {
    ScaledUncond uncond;
    float factor;  // of v
};

}  // namespace stg
