// float32, bfloat16 and float16 values in memory, as float32 in registers.
#pragma once

#include <cstdint>
#include <cstring>

#include "../check.h"

// A loop takes the instruction set of the function that it is inlined in.
#define STG_INLINE __attribute__((always_inline))

namespace stg::cpu {

struct Bfloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

STG_INLINE inline uint32_t bits_of(float value)
{
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

STG_INLINE inline float float_of(uint32_t bits)
{
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

STG_INLINE inline float to_float(float value) { return value; }

STG_INLINE inline float to_float(Bfloat16 value) { return float_of(uint32_t(value.bits) << 16); }

// gcc 12 does not vectorise conversions of _Float16 without AVX512-FP16; integer arithmetic it does.
STG_INLINE inline float to_float(Float16 value)
{
    const uint32_t magnitude = uint32_t(value.bits & 0x7fffu) << 13;
    const float normal = float_of(magnitude + 0x70000000u) * 0x1p-112f;  // the detour takes infinity to infinity
    const float subnormal = float_of(magnitude + 0x38800000u) - 0x1p-14f;
    const uint32_t bits = bits_of(magnitude < 0x00800000u ? subnormal : normal);
    return float_of(bits | uint32_t(value.bits & 0x8000u) << 16);
}

template <typename T>
T from_float(float value);

template <>
STG_INLINE inline float from_float<float>(float value)
{
    return value;
}

// To nearest, ties to even, as float16 below.
template <>
STG_INLINE inline Bfloat16 from_float<Bfloat16>(float value)
{
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}

// Added to 2^13 times its own power of two, a value is rounded to float16's 11 bits: the sum's last ones.
template <>
STG_INLINE inline Float16 from_float<Float16>(float value)
{
    const uint32_t bits = bits_of(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t exponent = magnitude & 0x7f800000u;
    const uint32_t power = exponent < 0x38800000u ? 0x38800000u : exponent;  // float16's smallest normal one
    const uint32_t large = power + (13u << 23);
    const uint32_t digits = bits_of(float_of(magnitude) + float_of(large)) - large;
    const uint32_t finite = ((power - 0x38800000u) >> 13) + digits;
    const uint32_t rounded = finite < 0x7c00u ? finite : 0x7c00u;
    const uint32_t quiet = magnitude > 0x7f800000u ? 0x0200u : 0u;
    return {uint16_t((bits >> 16 & 0x8000u) | rounded | quiet)};
}

// Calls function(T()) with the type of the values.
template <typename Function>
STG_INLINE inline void with_dtype(stg_dtype dtype, const Function& function)
{
    switch (dtype) {
        case STG_FLOAT32: return function(float());
        case STG_BFLOAT16: return function(Bfloat16());
        case STG_FLOAT16: return function(Float16());
    }
}

// Rows are worked on in chunks, so that what has to be widened to float32 fits into level 1 cache.
constexpr int64_t kChunk = 256;

struct Constant {
    float values[kChunk];
    constexpr explicit Constant(float value) : values()
    {
        for (float& v : values) v = value;
    }
};

alignas(64) inline constexpr Constant kZeros{0.f};
alignas(64) inline constexpr Constant kOnes{1.f};

template <typename T>
STG_INLINE inline void widen(const T* values, int64_t count, float* out)
{
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(values[i]);
}

// One line of an optional tensor, which has x's dtype T or float32.
template <typename T>
class Line {
public:
    STG_INLINE Line(const stg_tensor& tensor, int64_t offset)
        : floats_(tensor.dtype == STG_FLOAT32 ? static_cast<const float*>(tensor.data) : nullptr),
          narrow_(tensor.dtype == STG_FLOAT32 ? nullptr : static_cast<const T*>(tensor.data)),
          offset_(offset)
    {}

    // `count` values from `start` on, where they are or widened into `buffer`; `absent` if there is no tensor.
    STG_INLINE const float* floats(int64_t start, int64_t count, float* buffer, const Constant& absent) const
    {
        if (floats_ != nullptr) return floats_ + offset_ + start;
        if (narrow_ == nullptr) return absent.values;
        widen(narrow_ + offset_ + start, count, buffer);
        return buffer;
    }

private:
    const float* floats_;
    const T* narrow_;
    int64_t offset_;
};

}  // namespace stg::cpu
