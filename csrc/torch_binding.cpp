// What stg::<op>_native runs (schemas: kernels/stg_kernels/ops.py), and the module stg_kernels._C. The only file that
// knows torch, and that through its stable ABI: one build serves every torch from 2.11 on.

#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "stg/ops.h"

#ifdef STG_CUDA
#define STG_FLAVOURS(op) stg_cpu_##op, stg_cuda_##op
#define STG_DEVICES "(ss)", "cpu", "cuda"
#else
#define STG_FLAVOURS(op) stg_cpu_##op, static_cast<decltype(&stg_cuda_##op)>(nullptr)
#define STG_DEVICES "(s)", "cpu"
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

constexpr int64_t kAny = -1;

void succeed(stg_status status)
{
    if (status != STG_OK) throw std::runtime_error(stg_last_error());
}

[[noreturn]] void refuse(const char* name, const std::string& text) { throw std::runtime_error(name + (" " + text)); }

void parallel_for(void*, int64_t count, int64_t grain, stg_cpu_task task, void* argument)
{
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { task(argument, begin, end); });
}

const stg_cpu_pool kPool{sizeof(stg_cpu_pool), nullptr, parallel_for};

// On torch's threads, or on its current stream of the tensor's device.
template <typename Params>
void run(stg_status (*cpu)(const Params*, const stg_cpu_pool*), stg_status (*cuda)(const Params*, void*),
         const Tensor& on, Params params)
{
    params.struct_size = sizeof params;
    if (on.is_cpu()) return succeed(cpu(&params, &kPool));
#ifdef STG_CUDA
    const int32_t device = on.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    succeed(cuda(&params, stream));
#else
    (void)cuda;
#endif
}

std::string text_of(const int64_t* values, size_t count)
{
    std::string text;
    for (size_t i = 0; i < count; ++i)
        text += (i > 0 ? ", " : "") + (values[i] == kAny ? std::string("any") : std::to_string(values[i]));
    return "[" + text + "]";
}

Sizes sizes_of(const char* name, const Tensor& tensor, size_t dimensions)
{
    const auto shape = tensor.sizes();
    if (shape.size() != dimensions)
        refuse(name, "has shape " + text_of(shape.data(), shape.size()) + "; it must have " +
                         std::to_string(dimensions) + " dimensions");
    return {shape.begin(), shape.end()};
}

// [R, S, ...] of a table: its rows are its own business where a row map picks from them.
Sizes table_sizes(Sizes sizes, const Optional& row_map)
{
    if (row_map && sizes[0] > 0) sizes[0] = kAny;
    return sizes;
}

// A wrong shape could only lead to a memory error beyond here, so it is refused even where api.py has looked.
void expect(const char* name, const Tensor& tensor, const Tensor& on, const Sizes& sizes, bool repeats)
{
    const auto shape = tensor.sizes();
    bool ok = shape.size() == sizes.size();
    for (size_t i = 0; ok && i < sizes.size(); ++i)
        ok = sizes[i] == kAny ? shape[i] > 0
                              : shape[i] == sizes[i] || (repeats && shape[i] == 1 && i + 1 < sizes.size());
    if (!ok)
        refuse(name, "has shape " + text_of(shape.data(), shape.size()) + "; it must be " +
                         text_of(sizes.data(), sizes.size()) + (repeats ? ", or 1 before the last" : ""));
    if (tensor.is_cpu() != on.is_cpu() || tensor.get_device_index() != on.get_device_index())
        refuse(name, "is on another device than the op's first tensor");
}

stg_dtype dtype_of(const char* name, ScalarType type)
{
    switch (type) {
        case ScalarType::Float: return STG_FLOAT32;
        case ScalarType::BFloat16: return STG_BFLOAT16;
        case ScalarType::Half: return STG_FLOAT16;
        default: refuse(name, std::string("has dtype ") + toString(type) + "; it must be Float, BFloat16 or Half");
    }
}

// A dimension of size 1 gets stride 0 and so repeats where it may.
stg_tensor view(const char* name, const Tensor& tensor, const Tensor& on, const Sizes& sizes, bool repeats)
{
    expect(name, tensor, on, sizes, repeats);
    const auto shape = tensor.sizes(), strides = tensor.strides();
    const size_t last = sizes.size() - 1;
    if (shape[last] > 1 && strides[last] != 1)
        refuse(name, "has stride " + std::to_string(strides[last]) + " in its last dimension; it must be 1");
    stg_tensor result{tensor.const_data_ptr(), dtype_of(name, tensor.scalar_type()), {0, 0, 0}};
    for (size_t i = 0; i < last; ++i) result.strides[i] = shape[i] == 1 ? 0 : strides[i];
    return result;
}

stg_tensor table(const char* name, const Optional& tensor, const Tensor& on, const Sizes& sizes)
{
    return tensor ? view(name, *tensor, on, sizes, true) : stg_tensor{};
}

stg_tensor channel_vector(const char* name, const Optional& tensor, const Tensor& on, int64_t size)
{
    return tensor ? view(name, *tensor, on, {size}, false) : stg_tensor{};
}

// What the C API wants contiguous of one dimension; a copy that takes lives as long as this.
template <typename Value, ScalarType TYPE>
class Flat {
public:
    Flat(const char* name, const Optional& tensor, const Tensor& on, int64_t size)
    {
        if (!tensor) return;
        expect(name, *tensor, on, {size}, false);
        if (tensor->scalar_type() != TYPE)
            refuse(name,
                   std::string("has dtype ") + toString(tensor->scalar_type()) + "; it must be " + toString(TYPE));
        kept_ = tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor);
        values = static_cast<const Value*>(kept_->const_data_ptr());
    }

    const Value* values = nullptr;

private:
    Optional kept_;
};

using RowMap = Flat<int64_t, ScalarType::Long>;
using PassThrough = Flat<bool, ScalarType::Bool>;
using Floats = Flat<float, ScalarType::Float>;

Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType type)
{
    return torch::stable::new_empty(like, sizes, type);
}

template <typename Params>
void set_norm(Params& p, const Tensor& x, const Sizes& tables, const Optional& scale, const Optional& shift,
              const Optional& weight, const Optional& bias, double eps, bool subtract_mean)
{
    p.scale = table("scale", scale, x, tables);
    p.shift = table("shift", shift, x, tables);
    p.weight = channel_vector("weight", weight, x, tables[2]);
    p.bias = channel_vector("bias", bias, x, tables[2]);
    p.eps = static_cast<float>(eps);
    p.subtract_mean = subtract_mean;
}

template <typename Params>
void set_tokens(Params& p, const Tensor& x, const Sizes& sizes)
{
    p.rows = sizes[0], p.tokens = sizes[1], p.channels = sizes[2];
    p.x = view("x", x, x, sizes, false);
}

Tensor norm_modulate(Tensor x, Optional scale, Optional shift, Optional weight, Optional bias, double eps,
                     bool subtract_mean, Optional row_map)
{
    const auto sizes = sizes_of("x", x, 3);
    const RowMap map("row_map", row_map, x, sizes[0]);
    stg_norm_modulate_params p{};
    set_tokens(p, x, sizes);
    set_norm(p, x, table_sizes(sizes, row_map), scale, shift, weight, bias, eps, subtract_mean);
    const Tensor out = empty(x, sizes, x.scalar_type());
    p.row_map = map.values;
    p.out = out.mutable_data_ptr();
    run(STG_FLAVOURS(norm_modulate), x, p);
    return out;
}

Tensor residual_gate(Tensor x, Tensor y, Optional gate, Optional row_map, Optional pass_through)
{
    const auto sizes = sizes_of("x", x, 3);
    const RowMap map("row_map", row_map, x, sizes[0]);
    const PassThrough through("pass_through", pass_through, x, sizes[0]);
    stg_residual_gate_params p{};
    set_tokens(p, x, sizes);
    p.y = view("y", y, x, sizes, false);
    p.gate = table("gate", gate, x, table_sizes(sizes, row_map));
    const Tensor out = empty(x, sizes, x.scalar_type());
    p.row_map = map.values;
    p.pass_through = through.values;
    p.out = out.mutable_data_ptr();
    run(STG_FLAVOURS(residual_gate), x, p);
    return out;
}

std::tuple<Tensor, Tensor> residual_gate_norm_modulate(Tensor x, Tensor y, Optional gate, Optional scale,
                                                       Optional shift, Optional weight, Optional bias, double eps,
                                                       bool subtract_mean, Optional row_map, Optional pass_through)
{
    const auto sizes = sizes_of("x", x, 3), tables = table_sizes(sizes, row_map);
    const RowMap map("row_map", row_map, x, sizes[0]);
    const PassThrough through("pass_through", pass_through, x, sizes[0]);
    stg_residual_gate_norm_modulate_params p{};
    set_tokens(p, x, sizes);
    p.y = view("y", y, x, sizes, false);
    p.gate = table("gate", gate, x, tables);
    set_norm(p, x, tables, scale, shift, weight, bias, eps, subtract_mean);
    const Tensor out = empty(x, sizes, x.scalar_type()), norm_out = empty(x, sizes, x.scalar_type());
    p.row_map = map.values;
    p.pass_through = through.values;
    p.out = out.mutable_data_ptr(), p.norm_out = norm_out.mutable_data_ptr();
    run(STG_FLAVOURS(residual_gate_norm_modulate), x, p);
    return {out, norm_out};
}

// [R, S, N, D] with adjacent heads as [R, S, N * D].
stg_tensor heads_of(const char* name, const Tensor& tensor, const Tensor& on, const Sizes& sizes)
{
    const stg_tensor result = view(name, tensor, on, sizes, false);
    if (sizes[2] > 1 && result.strides[2] != sizes[3])
        refuse(name, "has stride " + std::to_string(result.strides[2]) +
                         " between heads; a token's heads must be adjacent, " + std::to_string(sizes[3]));
    return result;
}

std::tuple<Tensor, Tensor> qk_norm_rope(Tensor q, Tensor k, Optional q_weight, Optional k_weight, Optional q_bias,
                                        Optional k_bias, Optional cos, Optional sin, double eps, bool per_head,
                                        bool subtract_mean, bool interleaved, Optional row_map)
{
    const auto sizes = sizes_of("q", q, 4);
    const int64_t normed = per_head ? sizes[3] : sizes[2] * sizes[3];
    const Sizes tables = table_sizes({sizes[0], sizes[1], sizes[2], sizes[3] / 2}, row_map);
    const RowMap map("row_map", row_map, q, sizes[0]);
    stg_qk_norm_rope_params p{};
    p.rows = sizes[0], p.tokens = sizes[1], p.heads = sizes[2], p.head_size = sizes[3];
    p.q = heads_of("q", q, q, sizes);
    p.k = heads_of("k", k, q, sizes);
    p.q_weight = channel_vector("q_weight", q_weight, q, normed);
    p.k_weight = channel_vector("k_weight", k_weight, q, normed);
    p.q_bias = channel_vector("q_bias", q_bias, q, normed);
    p.k_bias = channel_vector("k_bias", k_bias, q, normed);
    p.cos = table("cos", cos, q, tables);
    p.sin = table("sin", sin, q, tables);
    p.row_map = map.values;
    p.eps = static_cast<float>(eps);
    p.per_head = per_head, p.subtract_mean = subtract_mean, p.interleaved = interleaved;
    const Tensor q_out = empty(q, sizes, q.scalar_type()), k_out = empty(q, sizes, q.scalar_type());
    p.q_out = q_out.mutable_data_ptr(), p.k_out = k_out.mutable_data_ptr();
    run(STG_FLAVOURS(qk_norm_rope), q, p);
    return {q_out, k_out};
}

Tensor combine_guidance(Tensor rows, Tensor scales, bool has_uncond, bool rescale, bool over_batch, bool cfg_star,
                        std::optional<ScalarType> dtype, Optional latents, Optional dt)
{
    const auto shape = rows.sizes();
    const int64_t skips = scales.numel() - 2, branches = has_uncond + 1 + skips;
    if (skips < 0 || shape.empty() || shape[0] % branches != 0 || !rows.is_contiguous())
        refuse("rows", "has shape " + text_of(shape.data(), shape.size()) + " with " + std::to_string(scales.numel()) +
                           " scales; it must be contiguous [K * B, ...], K = scales - 1 + has_uncond");
    Sizes sizes(shape.begin(), shape.end());
    sizes[0] /= branches;
    const Floats scale_values("scales", scales, rows, skips + 2), dt_value("dt", dt, rows, 1);
    if (latents) expect("latents", *latents, rows, sizes, false);
    if (latents && !latents->is_contiguous()) refuse("latents", "is not contiguous; it must be");

    const ScalarType type = latents ? latents->scalar_type() : dtype.value_or(rows.scalar_type());
    const Tensor out = empty(rows, sizes, type);
    stg_combine_guidance_params p{};
    p.struct_size = sizeof p;
    p.videos = sizes[0], p.elements = sizes[0] == 0 ? 0 : out.numel() / sizes[0], p.skips = skips;
    p.has_uncond = has_uncond, p.rescale = rescale, p.over_batch = over_batch, p.cfg_star = cfg_star;
    p.dtype = dtype_of("rows", rows.scalar_type());
    p.out_dtype = dtype_of("the result", type);
    size_t size = 0;
    const std::pair queries{STG_FLAVOURS(combine_guidance_workspace)};
    succeed((rows.is_cpu() ? queries.first : queries.second)(&p, &size));
    Optional workspace;
    if (size > 0) workspace = empty(rows, {static_cast<int64_t>(size)}, ScalarType::Byte);
    p.rows = rows.const_data_ptr();
    p.scales = scale_values.values;
    p.latents = latents ? latents->const_data_ptr() : nullptr;
    p.dt = dt_value.values;
    p.out = out.mutable_data_ptr();
    p.workspace = workspace ? workspace->mutable_data_ptr() : nullptr;
    p.workspace_size = size;
    run(STG_FLAVOURS(combine_guidance), rows, p);
    return out;
}

void register_ops(torch::stable::detail::StableLibrary& library)
{
    library.impl("combine_guidance_native", TORCH_BOX(&combine_guidance));
    library.impl("norm_modulate_native", TORCH_BOX(&norm_modulate));
    library.impl("residual_gate_native", TORCH_BOX(&residual_gate));
    library.impl("residual_gate_norm_modulate_native", TORCH_BOX(&residual_gate_norm_modulate));
    library.impl("qk_norm_rope_native", TORCH_BOX(&qk_norm_rope));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(stg, CPU, library) { register_ops(library); }

#ifdef STG_CUDA
STABLE_TORCH_LIBRARY_IMPL(stg, CUDA, library) { register_ops(library); }
#endif

PyMODINIT_FUNC PyInit__C()
{
    static PyModuleDef definition{};
    definition.m_base = PyModuleDef_HEAD_INIT;
    definition.m_name = "_C";
    definition.m_doc = "C++ and CUDA implementations of stg::<op>_native.";
    definition.m_size = -1;
    PyObject* module = PyModule_Create(&definition);
    PyObject* devices = Py_BuildValue(STG_DEVICES);
    if (module != nullptr && PyModule_AddObjectRef(module, "DEVICES", devices) < 0) Py_CLEAR(module);
    Py_XDECREF(devices);
    return module;
}
