// What rescale and CFG-star need to know of a video, collected in tiles: arithmetic for both flavours.
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define STG_HOST_DEVICE __host__ __device__
#else
#define STG_HOST_DEVICE
#endif

namespace stg {

// Of cond c, uncond u and v = u + g (c - u) + sum_i s_i (c - p_i): counts, means, sums of squared deviations from them,
// of products of deviations, and of plain products.
template <typename Real>
struct GuidanceMoments {
    Real count, mean_c, m2_c, mean_v, m2_v, mean_u, m2_u, m2_vu, dot_cu, dot_uu;
};

// Chan, Golub, LeVeque (1979): no sums of squares that cancel. In place, so that a tree of merges needs no memory.
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
    a.dot_cu += b.dot_cu;
    a.dot_uu += b.dot_uu;
    a.count = count;
}

// CFG-star multiplies u by alpha = <c, u> / (|u|^2 + 1e-8), which adds beta u to v, beta = (alpha - 1) (1 - g).
template <typename Real>
STG_HOST_DEVICE inline Real cfg_star_beta(const GuidanceMoments<Real>& of, Real g)
{
    return (of.dot_cu / (of.dot_uu + Real(1e-8)) - 1) * (1 - g);
}

template <typename Real>
STG_HOST_DEVICE inline void add_beta_u(GuidanceMoments<Real>& of, Real beta)
{
    const Real m2 = of.m2_v + 2 * beta * of.m2_vu + beta * beta * of.m2_u;
    of.m2_v = m2 < 0 ? 0 : m2;
    of.mean_v += beta * of.mean_u;
}

// r std(c) / std(v) + 1 - r; the N - 1 of both cancel. A single value has no deviation: NaN, as in torch.
template <typename Real>
STG_HOST_DEVICE inline Real rescale_factor(const GuidanceMoments<Real>& of, Real r)
{
    return r * sqrt(of.m2_c / of.m2_v) + (1 - r);
}

// v becomes (v + beta u) * factor.
struct Correction {
    float beta, factor;
};

}  // namespace stg
