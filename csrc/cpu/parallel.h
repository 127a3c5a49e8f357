// Loops over the host's threads, in the processor's widest instruction set; with STG_NO_DISPATCH in the build's.
#pragma once

#include <algorithm>

#include "floats.h"

namespace stg::cpu {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(STG_NO_DISPATCH)

template <typename Body>
__attribute__((target("arch=x86-64-v4"))) void run_v4(const Body& body, int64_t begin, int64_t end)
{
    body(begin, end);
}

template <typename Body>
__attribute__((target("arch=x86-64-v3"))) void run_v3(const Body& body, int64_t begin, int64_t end)
{
    body(begin, end);
}

// 2 is the build's own: setup.py and CMakeLists.txt build for x86-64-v2, without which neither numpy nor torch start.
inline int level()
{
    static const int level = [] {
        const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
        const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
        return v4 ? 4 : v3 ? 3 : 2;
    }();
    return level;
}

template <typename Body>
void run(const Body& body, int64_t begin, int64_t end)
{
    switch (level()) {
        case 4: return run_v4(body, begin, end);
        case 3: return run_v3(body, begin, end);
        default: return body(begin, end);
    }
}

#else

template <typename Body>
void run(const Body& body, int64_t begin, int64_t end)
{
    body(begin, end);
}

#endif

// body(begin, end) must be always_inline, and what it does for an index must not depend on the range it came in.
template <typename Body>
void parallel_for(const stg_cpu_pool* pool, int64_t count, int64_t grain, const Body& body)
{
    const stg_cpu_task task = [](void* argument, int64_t begin, int64_t end) {
        run(*static_cast<const Body*>(argument), begin, end);
    };
    void* const argument = const_cast<Body*>(&body);
    if (pool == nullptr)
        task(argument, 0, count);
    else if (count > 0)
        pool->parallel_for(pool->context, count, grain, task, argument);
}

constexpr int64_t kGrain = 32768;  // elements that are worth a thread: some microseconds

// body(row, token, count) for all tokens of all rows, at most `together` neighbours of a row at once.
template <typename Body>
void for_each_token(const stg_cpu_pool* pool, int64_t rows, int64_t tokens, int64_t channels, int64_t together,
                    const Body& body)
{
    const int64_t grain = 1 + kGrain / (channels + 1);
    parallel_for(pool, rows * tokens, grain, [&](int64_t begin, int64_t end) STG_INLINE {
        for (int64_t i = begin, count; i < end; i += count) {
            const int64_t token = i % tokens;
            count = std::min({together, tokens - token, end - i});
            body(i / tokens, token, count);
        }
    });
}

// Term i is added to lane i % 32 and the lanes in a fixed tree: the bits depend on the terms alone.
template <typename Term>
STG_INLINE inline float sum(int64_t count, const Term& term)
{
    constexpr int kLanes = 32;
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
    for (int lane = 0; i + lane < count; ++lane) lanes[lane] += term(i + lane);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    return lanes[0];
}

}  // namespace stg::cpu
