#include "check.h"

#include <cstdarg>
#include <cstdio>
#include <initializer_list>

namespace stg {
namespace {

thread_local char last_error[256] = "";

const char* name_of(stg_dtype dtype)
{
    switch (dtype) {
        case STG_FLOAT32: return "float32";
        case STG_BFLOAT16: return "bfloat16";
        case STG_FLOAT16: return "float16";
    }
    return nullptr;
}

struct Size {
    const char* field;
    int64_t value;
};

// Remembers the first complaint; what follows it is not looked at.
class Check {
public:
    stg_status status = STG_OK;

    template <typename Params>
    Check(const char* field, const Params* params)
    {
        if (params == nullptr)
            status = fail(STG_INVALID_ARGUMENT, "%s is NULL", field);
        else if (params->struct_size != sizeof(Params))
            status = fail(STG_INVALID_ARGUMENT, "%s.struct_size is %zu; it must be %zu in this version of the library",
                          field, params->struct_size, sizeof(Params));
    }

    explicit operator bool() const { return status == STG_OK; }

    void sizes(std::initializer_list<Size> sizes)
    {
        int64_t elements = 1;
        for (const Size& size : sizes) {
            if (size.value < 0)
                return refuse("%s is %lld; it must be >= 0", size.field, static_cast<long long>(size.value));
            if (size.value != 0 && elements > INT64_MAX / 8 / size.value)
                return refuse("%s is %lld; a tensor must have less than 2^63 bytes", size.field,
                              static_cast<long long>(size.value));
            elements *= size.value == 0 ? 1 : size.value;
        }
    }

    void dtype(const char* field, stg_dtype dtype)
    {
        if (name_of(dtype) == nullptr)
            refuse("%s is %d; it must be 0 (float32), 1 (bfloat16) or 2 (float16)", field, static_cast<int>(dtype));
    }

    void pointer(const char* field, const void* pointer, size_t alignment)
    {
        if (pointer == nullptr) return refuse("%s is NULL; it must point to the tensor's values", field);
        aligned(field, pointer, alignment);
    }

    void aligned(const char* field, const void* pointer, size_t alignment)
    {
        if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
            refuse("%s is %p; it must be a multiple of the element's size, %zu", field, const_cast<void*>(pointer),
                   alignment);
    }

    void values(const char* field, const void* pointer, stg_dtype dtype)
    {
        this->pointer(field, pointer, dtype == STG_FLOAT32 ? 4 : 2);
    }

    void required(const char* field, const stg_tensor& tensor)
    {
        dtype(named(field, "dtype"), tensor.dtype);
        values(named(field, "data"), tensor.data, tensor.dtype);
    }

    void required(const char* field, const stg_tensor& tensor, stg_dtype expected, const char* why)
    {
        dtype(named(field, "dtype"), tensor.dtype);
        if (*this && tensor.dtype != expected)
            refuse("%s.dtype is %s; it must be %s%s", field, name_of(tensor.dtype), name_of(expected), why);
        required(field, tensor);
    }

    void optional(const char* field, const stg_tensor& tensor, stg_dtype expected, const char* why)
    {
        if (tensor.data != nullptr) required(field, tensor, expected, why);
    }

    void optional_or_float32(const char* field, const stg_tensor& tensor, stg_dtype expected, const char* why)
    {
        optional(field, tensor, tensor.dtype == STG_FLOAT32 ? STG_FLOAT32 : expected, why);
    }

    void eps(float eps)
    {
        if (!(eps >= 0)) refuse("eps is %g; it must be >= 0", static_cast<double>(eps));
    }

    template <typename... Values>
    void refuse(const char* format, Values... values)
    {
        if (status == STG_OK) status = fail(STG_INVALID_ARGUMENT, format, values...);
    }

private:
    const char* named(const char* field, const char* member)
    {
        std::snprintf(name_, sizeof name_, "%s.%s", field, member);
        return name_;
    }

    char name_[32];
};

template <typename Params>
void check_norm(Check& check, const Params& p)
{
    check.optional_or_float32("scale", p.scale, p.x.dtype, ", as x's, or float32");
    check.optional_or_float32("shift", p.shift, p.x.dtype, ", as x's, or float32");
    check.optional_or_float32("weight", p.weight, p.x.dtype, ", as x's, or float32");
    check.optional_or_float32("bias", p.bias, p.x.dtype, ", as x's, or float32");
    check.eps(p.eps);
}

template <typename Params>
void check_residual(Check& check, const Params& p)
{
    check.required("x", p.x);
    check.required("y", p.y, p.x.dtype, ", as x's");
    check.optional_or_float32("gate", p.gate, p.x.dtype, ", as x's, or float32");
    check.aligned("row_map", p.row_map, alignof(int64_t));
    check.values("out", p.out, p.x.dtype);
}

}  // namespace

stg_status fail(stg_status status, const char* format, ...)
{
    va_list values;
    va_start(values, format);
    std::vsnprintf(last_error, sizeof last_error, format, values);
    va_end(values);
    return status;
}

stg_status check(const stg_norm_modulate_params* params)
{
    Check check("params", params);
    if (!check) return check.status;
    const auto& p = *params;
    check.sizes({{"rows", p.rows}, {"tokens", p.tokens}, {"channels", p.channels}});
    if (!check || is_empty(p)) return check.status;
    check.required("x", p.x);
    check_norm(check, p);
    check.aligned("row_map", p.row_map, alignof(int64_t));
    check.values("out", p.out, p.x.dtype);
    return check.status;
}

stg_status check(const stg_residual_gate_params* params)
{
    Check check("params", params);
    if (!check) return check.status;
    const auto& p = *params;
    check.sizes({{"rows", p.rows}, {"tokens", p.tokens}, {"channels", p.channels}});
    if (!check || is_empty(p)) return check.status;
    check_residual(check, p);
    return check.status;
}

stg_status check(const stg_residual_gate_norm_modulate_params* params)
{
    Check check("params", params);
    if (!check) return check.status;
    const auto& p = *params;
    check.sizes({{"rows", p.rows}, {"tokens", p.tokens}, {"channels", p.channels}});
    if (!check || is_empty(p)) return check.status;
    check_residual(check, p);
    check_norm(check, p);
    check.values("norm_out", p.norm_out, p.x.dtype);
    return check.status;
}

stg_status check(const stg_qk_norm_rope_params* params)
{
    Check check("params", params);
    if (!check) return check.status;
    const auto& p = *params;
    check.sizes({{"rows", p.rows}, {"tokens", p.tokens}, {"heads", p.heads}, {"head_size", p.head_size}});
    if (!check || is_empty(p)) return check.status;
    check.required("q", p.q);
    check.required("k", p.k, p.q.dtype, ", as q's");
    check.optional_or_float32("q_weight", p.q_weight, p.q.dtype, ", as q's, or float32");
    check.optional_or_float32("k_weight", p.k_weight, p.q.dtype, ", as q's, or float32");
    check.optional_or_float32("q_bias", p.q_bias, p.q.dtype, ", as q's, or float32");
    check.optional_or_float32("k_bias", p.k_bias, p.q.dtype, ", as q's, or float32");
    if ((p.cos.data == nullptr) != (p.sin.data == nullptr))
        check.refuse("%s.data is NULL; cos and sin go together", p.cos.data == nullptr ? "cos" : "sin");
    if (p.cos.data != nullptr && p.head_size % 2 != 0)
        check.refuse("head_size is %lld; a rotary embedding needs an even one", static_cast<long long>(p.head_size));
    check.optional("cos", p.cos, STG_FLOAT32, "");
    check.optional("sin", p.sin, STG_FLOAT32, "");
    check.eps(p.eps);
    check.aligned("row_map", p.row_map, alignof(int64_t));
    check.values("q_out", p.q_out, p.q.dtype);
    check.values("k_out", p.k_out, p.q.dtype);
    return check.status;
}

stg_status check_sizes(const stg_combine_guidance_params* params)
{
    Check check("params", params);
    if (!check) return check.status;
    const auto& p = *params;
    check.sizes({{"videos", p.videos}, {"elements", p.elements}, {"skips", p.skips}});
    if (p.cfg_star && !p.has_uncond) check.refuse("cfg_star is true; it must be false where has_uncond is");
    return check.status;
}

stg_status check(const stg_combine_guidance_params* params, size_t needed)
{
    const stg_status status = check_sizes(params);
    if (status != STG_OK || is_empty(*params)) return status;
    Check check("params", params);
    const auto& p = *params;
    check.dtype("dtype", p.dtype);
    check.dtype("out_dtype", p.out_dtype);
    check.values("rows", p.rows, p.dtype);
    check.pointer("scales", p.scales, alignof(float));
    if ((p.latents == nullptr) != (p.dt == nullptr))
        check.refuse("%s is NULL; latents and dt go together", p.latents == nullptr ? "latents" : "dt");
    check.aligned("latents", p.latents, p.out_dtype == STG_FLOAT32 ? 4 : 2);
    check.aligned("dt", p.dt, alignof(float));
    check.values("out", p.out, p.out_dtype);
    if (p.workspace_size < needed)
        check.refuse("workspace_size is %zu; it must be at least %zu", p.workspace_size, needed);
    if (needed > 0 && p.workspace == nullptr) check.refuse("workspace is NULL; it must be %zu bytes", needed);
    return check.status;
}

stg_status check(const stg_cpu_pool* pool)
{
    if (pool == nullptr) return STG_OK;
    Check check("pool", pool);
    if (check && pool->parallel_for == nullptr) check.refuse("pool.parallel_for is NULL; it must be a function");
    return check.status;
}

}  // namespace stg

const char* stg_last_error(void) { return stg::last_error; }
