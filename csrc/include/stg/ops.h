/* The kernels of a guided diffusion step for C and C++ hosts, on the CPU and on CUDA. Needs neither torch nor Python.
 *
 * R rows, S tokens, C channels, N heads, D head size, B videos. `[R, S, C]` is a shape; the last dimension of every
 * tensor is contiguous. Outputs are contiguous and overlap no input. Arithmetic is float32 with one rounding at the
 * end.
 *
 * No function allocates memory, waits for the device, or reads device memory on the host. Results are deterministic; a
 * row's bits depend on no other row, on no alignment and on no number of threads. Functions may be called from any
 * number of threads at once. Pointers need the alignment of their element; 16 bytes (lines too) is fastest on CUDA.
 *
 *     #include <stdio.h>
 *     #include "stg/ops.h"
 *
 *     int gated_residual(const void *x, const void *y, const void *gate, void *out, int64_t S, int64_t C, void *stream)
 *     {
 *         stg_residual_gate_params p = {0};
 *         p.struct_size = sizeof p;
 *         p.rows = 3, p.tokens = S, p.channels = C;
 *         p.x = (stg_tensor){x, STG_BFLOAT16, {S * C, C, 0}};
 *         p.y = (stg_tensor){y, STG_BFLOAT16, {S * C, C, 0}};
 *         p.gate = (stg_tensor){gate, STG_FLOAT32, {C, 0, 0}};  // [3, 1, C]: every token has its row's gate
 *         p.out = out;
 *         if (stg_cuda_residual_gate(&p, stream) == STG_OK)     // on a CPU: stg_cpu_residual_gate(&p, NULL)
 *             return 0;
 *         fprintf(stderr, "%s\n", stg_last_error());
 *         return 1;
 *     }
 */
#ifndef STG_OPS_H
#define STG_OPS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define STG_API
#else
#define STG_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum stg_status {
    STG_OK = 0,
    STG_INVALID_ARGUMENT = 1, /* nothing was run; stg_last_error() names the field, its value and what is allowed */
    STG_CUDA_ERROR = 2        /* the launch failed; stg_last_error() has CUDA's words */
} stg_status;

typedef enum stg_dtype { STG_FLOAT32 = 0, STG_BFLOAT16 = 1, STG_FLOAT16 = 2 } stg_dtype;

/* What went wrong in the last call of this thread that did not return STG_OK. */
STG_API const char *stg_last_error(void);

typedef struct stg_tensor {
    const void *data; /* NULL: absent, which only tensors called optional may be */
    stg_dtype dtype;
    int64_t strides[3]; /* in elements, of every dimension but the last ([R, S, C]: two of them; [C]: none);
                           0 repeats one entry along that dimension */
} stg_tensor;

/* The host's threads. parallel_for calls task(argument, begin, end) on ranges that cover [0, count) once, in any order,
 * on any threads, and returns when all are done; fewer than `grain` items are not worth a thread. NULL instead of a
 * pool: the calling thread does it all. */
typedef void (*stg_cpu_task)(void *argument, int64_t begin, int64_t end);

typedef struct stg_cpu_pool {
    size_t struct_size; /* sizeof(stg_cpu_pool), as in every struct below */
    void *context;
    void (*parallel_for)(void *context, int64_t count, int64_t grain, stg_cpu_task task, void *argument);
} stg_cpu_pool;

/* out = norm(x) * (1 + scale) + shift
 * norm(x) = (x - m) / sqrt(mean((x - m)^2) + eps) * weight + bias, m the mean of x if subtract_mean, else 0. */
typedef struct stg_norm_modulate_params {
    size_t struct_size;
    int64_t rows, tokens, channels;
    stg_tensor x;            /* [R, S, C] */
    stg_tensor scale, shift; /* optional [R, S, C], x's dtype or float32 */
    stg_tensor weight, bias; /* optional [C], x's dtype or float32 */
    const int64_t *row_map;  /* optional [R]: row r takes scale and shift from row row_map[r] of theirs, unchecked */
    float eps;
    bool subtract_mean;
    void *out; /* [R, S, C], x's dtype */
} stg_norm_modulate_params;

/* out = x + gate * y; rows that pass through are x, bit for bit. */
typedef struct stg_residual_gate_params {
    size_t struct_size;
    int64_t rows, tokens, channels;
    stg_tensor x, y;          /* [R, S, C], one dtype */
    stg_tensor gate;          /* optional [R, S, C], x's dtype or float32; absent is 1 */
    const int64_t *row_map;   /* optional [R]: row r takes its gate from row row_map[r], unchecked */
    const bool *pass_through; /* optional [R] */
    void *out;                /* [R, S, C], x's dtype */
} stg_residual_gate_params;

/* out = x + gate * y, norm_out = norm(out) * (1 + scale) + shift of the rounded out. */
typedef struct stg_residual_gate_norm_modulate_params {
    size_t struct_size;
    int64_t rows, tokens, channels;
    stg_tensor x, y;               /* [R, S, C], one dtype */
    stg_tensor gate, scale, shift; /* optional [R, S, C], x's dtype or float32 */
    stg_tensor weight, bias;       /* optional [C], x's dtype or float32 */
    const int64_t *row_map;        /* optional [R], for gate, scale and shift, unchecked */
    const bool *pass_through;      /* optional [R] */
    float eps;
    bool subtract_mean;
    void *out, *norm_out; /* [R, S, C], x's dtype */
} stg_residual_gate_norm_modulate_params;

/* q_out = rope(norm(q)), k_out = rope(norm(k)). norm as above, over all heads of a token, or over each head alone if
 * per_head. rope turns pairs (a, b) of a head into (a cos - b sin, b cos + a sin); pair i is (2 i, 2 i + 1) if
 * interleaved, else (i, i + D / 2). */
typedef struct stg_qk_norm_rope_params {
    size_t struct_size;
    int64_t rows, tokens, heads, head_size;
    stg_tensor q, k;               /* [R, S, N * D], one dtype: the heads of a token are adjacent */
    stg_tensor q_weight, k_weight; /* optional [N * D], or [D] if per_head; q's dtype or float32 */
    stg_tensor q_bias, k_bias;     /* likewise */
    stg_tensor cos, sin;           /* optional, both or neither: float32 [R, S, N, D / 2], D even */
    const int64_t *row_map;        /* optional [R]: row r takes cos and sin from row row_map[r], unchecked */
    float eps;
    bool per_head, subtract_mean, interleaved;
    void *q_out, *k_out; /* [R, S, N, D], q's dtype */
} stg_qk_norm_rope_params;

/* v = u + g (c - u) + sum_i s_i (c - p_i), without uncond c + sum_i s_i (c - p_i); out = v, or latents + dt v.
 * rescale:  v times r std(c) / std(v) + 1 - r (std with N - 1), over each video, or over all of them if over_batch.
 * cfg_star: u is first multiplied by <c, u> / (|u|^2 + 1e-8) of its video.
 * Both sum squares in float32: values beyond about 1e16 make them infinite, and the result NaN. */
typedef struct stg_combine_guidance_params {
    size_t struct_size;
    int64_t videos, elements, skips; /* B, elements of a video, skip branches */
    bool has_uncond, rescale, over_batch, cfg_star;
    stg_dtype dtype;     /* of rows */
    const void *rows;    /* [K, B, elements] contiguous: uncond (if any), cond, skips; K = has_uncond + 1 + skips */
    const float *scales; /* [2 + skips]: g, r, s_1, s_2, ...; read when the kernel runs */
    const void *latents; /* optional [B, elements] contiguous, out_dtype */
    const float *dt;     /* one value, read when the kernel runs; with latents and only then */
    stg_dtype out_dtype;
    void *out;       /* [B, elements] */
    void *workspace; /* of the size that the query below tells; NULL where that is 0. Any content, any alignment */
    size_t workspace_size;
} stg_combine_guidance_params;

STG_API stg_status stg_cpu_norm_modulate(const stg_norm_modulate_params *params, const stg_cpu_pool *pool);
STG_API stg_status stg_cpu_residual_gate(const stg_residual_gate_params *params, const stg_cpu_pool *pool);
STG_API stg_status stg_cpu_residual_gate_norm_modulate(const stg_residual_gate_norm_modulate_params *params,
                                                       const stg_cpu_pool *pool);
STG_API stg_status stg_cpu_qk_norm_rope(const stg_qk_norm_rope_params *params, const stg_cpu_pool *pool);
STG_API stg_status stg_cpu_combine_guidance(const stg_combine_guidance_params *params, const stg_cpu_pool *pool);

/* Bytes of workspace; depends on videos, elements, rescale, over_batch and cfg_star alone. */
STG_API stg_status stg_cpu_combine_guidance_workspace(const stg_combine_guidance_params *params, size_t *size);

/* Only in a library that was built with CUDA. All pointers but `params` are device pointers of the current device,
 * row_map and pass_through too; `stream` is a cudaStream_t. */
STG_API stg_status stg_cuda_norm_modulate(const stg_norm_modulate_params *params, void *stream);
STG_API stg_status stg_cuda_residual_gate(const stg_residual_gate_params *params, void *stream);
STG_API stg_status stg_cuda_residual_gate_norm_modulate(const stg_residual_gate_norm_modulate_params *params,
                                                        void *stream);
STG_API stg_status stg_cuda_qk_norm_rope(const stg_qk_norm_rope_params *params, void *stream);
STG_API stg_status stg_cuda_combine_guidance(const stg_combine_guidance_params *params, void *stream);
STG_API stg_status stg_cuda_combine_guidance_workspace(const stg_combine_guidance_params *params, size_t *size);

#ifdef __cplusplus
}
#endif

#endif
