/* Every CPU function from C, in buffers of exactly the size it may touch, against the formulas in double. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "stg/ops.h"

enum { R = 3, S = 5, N = 3, D = 22, C = N * D, B = 2, E = 2051 };

#define CHECK(condition)                                                                   \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            printf("line %d: %s; last error: %s\n", __LINE__, #condition, stg_last_error()); \
            exit(1);                                                                       \
        }                                                                                  \
    } while (0)

static float *values(size_t count)
{
    static unsigned state = 1;
    float *result = malloc(count * sizeof *result);
    CHECK(result != NULL);
    for (size_t i = 0; i < count; ++i) {
        state = state * 1664525u + 1013904223u;
        result[i] = (float)(state >> 8) / (float)(1 << 23) - 1.0f;
    }
    return result;
}

static stg_tensor tensor(const float *data, int64_t row, int64_t token, int64_t head)
{
    stg_tensor result = {data, STG_FLOAT32, {row, token, head}};
    return result;
}

static int near(double actual, double expected) { return fabs(actual - expected) <= 1e-5 * (1 + fabs(expected)); }

static double inverse_rms(const float *x, int count)
{
    double sum = 0;
    for (int i = 0; i < count; ++i) sum += (double)x[i] * x[i];
    return 1 / sqrt(sum / count + 1e-6);
}

static void check_residual_and_norm(const stg_cpu_pool *pool)
{
    float *x = values(R * S * C), *y = values(R * S * C), *gate = values(2 * C), *scale = values(2 * C);
    float *out = values(R * S * C), *norm_out = values(R * S * C);
    float *alone = values(R * S * C), *norm_alone = values(R * S * C);
    const int64_t row_map[R] = {1, 0, 1};
    const bool pass_through[R] = {false, false, true};

    stg_residual_gate_norm_modulate_params p;
    memset(&p, 0, sizeof p);
    p.struct_size = sizeof p;
    p.rows = R, p.tokens = S, p.channels = C;
    p.x = tensor(x, S * C, C, 0), p.y = tensor(y, S * C, C, 0);
    p.gate = tensor(gate, C, 0, 0), p.scale = tensor(scale, C, 0, 0);
    p.row_map = row_map, p.pass_through = pass_through, p.eps = 1e-6f;
    p.out = out, p.norm_out = norm_out;
    CHECK(stg_cpu_residual_gate_norm_modulate(&p, pool) == STG_OK);

    stg_residual_gate_params q;
    memset(&q, 0, sizeof q);
    q.struct_size = sizeof q;
    q.rows = R, q.tokens = S, q.channels = C;
    q.x = p.x, q.y = p.y, q.gate = p.gate, q.row_map = row_map, q.pass_through = pass_through, q.out = alone;
    CHECK(stg_cpu_residual_gate(&q, pool) == STG_OK);
    CHECK(memcmp(out, alone, R * S * C * sizeof *out) == 0);

    stg_norm_modulate_params n;
    memset(&n, 0, sizeof n);
    n.struct_size = sizeof n;
    n.rows = R, n.tokens = S, n.channels = C;
    n.x = tensor(out, S * C, C, 0), n.scale = p.scale, n.row_map = row_map, n.eps = p.eps, n.out = norm_alone;
    CHECK(stg_cpu_norm_modulate(&n, pool) == STG_OK);
    CHECK(memcmp(norm_out, norm_alone, R * S * C * sizeof *out) == 0);

    for (int r = 0; r < R; ++r)
        for (int s = 0; s < S; ++s) {
            const int at = (r * S + s) * C;
            const double inverse = inverse_rms(out + at, C);
            for (int c = 0; c < C; ++c) {
                const int entry = (int)row_map[r] * C + c;
                const double h = pass_through[r] ? x[at + c] : x[at + c] + (double)gate[entry] * y[at + c];
                CHECK(near(out[at + c], h));
                CHECK(near(norm_out[at + c], out[at + c] * inverse * (1 + (double)scale[entry])));
            }
        }
    CHECK(memcmp(out + 2 * S * C, x + 2 * S * C, S * C * sizeof *x) == 0);
    free(x), free(y), free(gate), free(scale), free(out), free(norm_out), free(norm_alone), free(alone);
}

static void check_qk_norm_rope(const stg_cpu_pool *pool, bool per_head, bool interleaved)
{
    float *q = values(R * S * C), *k = values(R * S * C), *q_out = values(R * S * C), *k_out = values(R * S * C);
    float *cosines = values(S * D / 2), *sines = values(S * D / 2), *weight = values(per_head ? D : C);

    stg_qk_norm_rope_params p;
    memset(&p, 0, sizeof p);
    p.struct_size = sizeof p;
    p.rows = R, p.tokens = S, p.heads = N, p.head_size = D;
    p.q = tensor(q, S * C, C, 0), p.k = tensor(k, S * C, C, 0), p.k_weight = tensor(weight, 0, 0, 0);
    p.cos = tensor(cosines, 0, D / 2, 0), p.sin = tensor(sines, 0, D / 2, 0);
    p.eps = 1e-6f, p.per_head = per_head, p.interleaved = interleaved;
    p.q_out = q_out, p.k_out = k_out;
    CHECK(stg_cpu_qk_norm_rope(&p, pool) == STG_OK);

    for (int token = 0; token < R * S; ++token)
        for (int n = 0; n < N; ++n)
            for (int i = 0; i < D / 2; ++i) {
                const float *x = k + token * C;
                const double inverse = per_head ? inverse_rms(x + n * D, D) : inverse_rms(x, C);
                const int first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : i + D / 2;
                const int start = per_head ? 0 : n * D;
                const double a = x[n * D + first] * inverse * weight[start + first];
                const double b = x[n * D + second] * inverse * weight[start + second];
                const double cosine = cosines[token % S * (D / 2) + i], sine = sines[token % S * (D / 2) + i];
                CHECK(near(k_out[token * C + n * D + first], a * cosine - b * sine));
                CHECK(near(k_out[token * C + n * D + second], b * cosine + a * sine));
            }
    free(q), free(k), free(q_out), free(k_out), free(cosines), free(sines), free(weight);
}

static void check_combine_guidance(const stg_cpu_pool *pool)
{
    float *rows = values(3 * B * E), *latents = values(B * E), *out = values(B * E);
    const float scales[3] = {3.0f, 0.7f, 1.5f}, dt = -0.25f;
    size_t size = 0;

    stg_combine_guidance_params p;
    memset(&p, 0, sizeof p);
    p.struct_size = sizeof p;
    p.videos = B, p.elements = E, p.skips = 1, p.has_uncond = true, p.rescale = true;
    CHECK(stg_cpu_combine_guidance_workspace(&p, &size) == STG_OK && size > 0);
    p.rows = rows, p.scales = scales, p.latents = latents, p.dt = &dt, p.out = out;
    p.workspace = malloc(size), p.workspace_size = size;
    CHECK(stg_cpu_combine_guidance(&p, pool) == STG_OK);

    for (int b = 0; b < B; ++b) {
        double sums[2] = {0, 0}, squares[2] = {0, 0};
        static double v[E];
        for (int i = 0; i < E; ++i) {
            const double u = rows[b * E + i], c = rows[(B + b) * E + i], skip = rows[(2 * B + b) * E + i];
            v[i] = u + scales[0] * (c - u) + scales[2] * (c - skip);
            sums[0] += c, squares[0] += c * c;
            sums[1] += v[i], squares[1] += v[i] * v[i];
        }
        const double ratio = sqrt((squares[0] - sums[0] * sums[0] / E) / (squares[1] - sums[1] * sums[1] / E));
        for (int i = 0; i < E; ++i)
            CHECK(near(out[b * E + i], latents[b * E + i] + dt * v[i] * (scales[1] * ratio + 1 - scales[1])));
    }

    p.workspace_size = size - 1;
    CHECK(stg_cpu_combine_guidance(&p, pool) == STG_INVALID_ARGUMENT);
    CHECK(strstr(stg_last_error(), "workspace_size") != NULL);
    free(rows), free(latents), free(out), free(p.workspace);
}

static void in_two_halves(void *context, int64_t count, int64_t grain, stg_cpu_task task, void *argument)
{
    (void)grain;
    ++*(int *)context;
    task(argument, count / 2, count);
    task(argument, 0, count / 2);
}

int main(void)
{
    int calls = 0;
    const stg_cpu_pool pool = {sizeof pool, &calls, in_two_halves};
    const stg_cpu_pool *const pools[2] = {NULL, &pool};
    for (int i = 0; i < 2; ++i) {
        check_residual_and_norm(pools[i]);
        for (int form = 0; form < 4; ++form) check_qk_norm_rope(pools[i], form / 2 != 0, form % 2 != 0);
        check_combine_guidance(pools[i]);
    }
    CHECK(calls == 3 + 4 + 2);
    CHECK(stg_cpu_norm_modulate(NULL, NULL) == STG_INVALID_ARGUMENT);
    puts("ok");
    return 0;
}
