// What both flavours refuse, and with which words.
#pragma once

#include "stg/ops.h"

namespace stg {

// Keeps the message for stg_last_error() and returns `status`.
__attribute__((format(printf, 2, 3))) stg_status fail(stg_status status, const char* format, ...);

stg_status check(const stg_norm_modulate_params* params);
stg_status check(const stg_residual_gate_params* params);
stg_status check(const stg_residual_gate_norm_modulate_params* params);
stg_status check(const stg_qk_norm_rope_params* params);

// `needed` is the workspace's size; the query itself, which precedes the pointers, checks the sizes alone.
stg_status check(const stg_combine_guidance_params* params, size_t needed);
stg_status check_sizes(const stg_combine_guidance_params* params);

stg_status check(const stg_cpu_pool* pool);

inline bool is_empty(const stg_qk_norm_rope_params& p)
{
    return p.rows == 0 || p.tokens == 0 || p.heads == 0 || p.head_size == 0;
}

inline bool is_empty(const stg_combine_guidance_params& p) { return p.videos == 0 || p.elements == 0; }

template <typename Params>
bool is_empty(const Params& p)
{
    return p.rows == 0 || p.tokens == 0 || p.channels == 0;
}

}  // namespace stg
