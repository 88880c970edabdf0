/* What the forward and the backward loops share: the task, products of small matrices, softmax, delta.
 *
 * Plain C with the vector extensions of GCC and Clang: no Python, torch or OpenMP headers. Built once for each
 * instruction set; loaded with ctypes by __init__.py, which fills struct task. Maps are float32, channels last.
 *
 * Both forms are: relate (delta, norm, ReLU) -> product with weight1 -> ReLU -> product with weight2 -> (pairwise:
 * softmax over the footprint) -> weighted sum of the values. The pairwise products run over the neighbours of one
 * pixel, the patchwise ones over a few pixels of a row, so that a block of accumulators stays in registers. Nothing of
 * size k x k is in memory beyond that.
 */
#ifndef SAN_FOOTPRINT_H
#define SAN_FOOTPRINT_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define ROWS 7 /* rows of one register block: a row of the paper's 7 x 7 footprint */
#ifdef __AVX512F__
#define BLOCKS 4 /* vectors of LANES in a register block; ROWS x BLOCKS of 32 registers */
#else
#define BLOCKS 1
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))

INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }
INLINE vec positive(vec x) { return choose(x < (vec){0}, (vec){0}, x); } /* ReLU; NaN stays NaN */

enum relation { SUBTRACTION, SUMMATION, HADAMARD, CONCATENATION, DOT, PATCH_CONCATENATION, PATCH_STAR };

struct task {
    int64_t relation, absolute, batch, height, width, rel, hidden, lanes, out, kernel, dilation;
    /* hidden: width of the middle of gamma, padded to LANES. lanes: attention weights of one neighbour, repeated to a
     * multiple of LANES, so that the channels that share a weight meet it without shuffling. */
    const float *query, *key, *value, *place;
    const float *scale1, *shift1;   /* norm1, in the order in which relate writes its channels */
    const float *weight1, *shift2;  /* [inputs][hidden], norm2 folded in */
    const float *weight2, *bias2;   /* [hidden][lanes]; patchwise: [hidden][k * k][lanes] */
    const int64_t *rows, *columns;  /* source index of every row and column of the padded map */
    float *output;
    int64_t hidden_used;            /* rows of weight2 */
    int64_t next;                   /* the next row of the batch that no thread has taken */
    int64_t failed;                 /* a thread had no memory */
};

/* ---- matrix products ---- */

/* A matrix in memory: element (m, i) of the left factor is at a[m * row + i * inner]. */
struct left {
    const float *a;
    int64_t row, inner;
};

INLINE void multiply_block(const int rows, const int blocks, struct left l, const float *w, int64_t w_row,
                           int64_t inner, const float *start, int64_t start_row, float *c, int64_t c_row,
                           const int relu) {
    vec sum[ROWS][BLOCKS];
    for (int m = 0; m < rows; m++)
        for (int b = 0; b < blocks; b++) sum[m][b] = *(const vec *)(start + m * start_row + b * LANES);
    for (int64_t i = 0; i < inner; i++) {
        vec line[BLOCKS];
        for (int b = 0; b < blocks; b++) line[b] = *(const vec *)(w + i * w_row + b * LANES);
        for (int m = 0; m < rows; m++)
            for (int b = 0; b < blocks; b++) sum[m][b] += l.a[m * l.row + i * l.inner] * line[b];
    }
    for (int m = 0; m < rows; m++)
        for (int b = 0; b < blocks; b++)
            *(vec *)(c + m * c_row + b * LANES) = relu ? positive(sum[m][b]) : sum[m][b];
}

INLINE void multiply_rows(const int rows, struct left l, const float *w, int64_t w_row, int64_t inner,
                          const float *start, int64_t start_row, float *c, int64_t c_row, int64_t columns,
                          const int relu) {
    int64_t j = 0;
#if BLOCKS >= 4
    for (; j + 4 * LANES <= columns; j += 4 * LANES)
        multiply_block(rows, 4, l, w + j, w_row, inner, start + j, start_row, c + j, c_row, relu);
    for (; j + 2 * LANES <= columns; j += 2 * LANES)
        multiply_block(rows, 2, l, w + j, w_row, inner, start + j, start_row, c + j, c_row, relu);
#endif
    for (; j < columns; j += LANES)
        multiply_block(rows, 1, l, w + j, w_row, inner, start + j, start_row, c + j, c_row, relu);
}

/* c[m][:] = start[m][:] + l[m][:inner] w, with ReLU if asked. `columns` is a multiple of LANES; start_row is 0 for one
 * row that serves all; start may be c itself. */
INLINE void multiply(int64_t rows, struct left l, const float *w, int64_t w_row, int64_t inner, const float *start,
                     int64_t start_row, float *c, int64_t c_row, int64_t columns, const int relu) {
#define CASE(n) case n: multiply_rows(n, l, w, w_row, inner, start, start_row, c, c_row, columns, relu); break;
    for (; rows > 0; rows -= ROWS, l.a += ROWS * l.row, c += ROWS * c_row, start += ROWS * start_row)
        switch (rows < ROWS ? rows : ROWS) {
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
        }
#undef CASE
}

/* ---- softmax ---- */

/* e^x for x <= 0, to about two units in the last place; 0 below the smallest normal number, NaN stays NaN. */
INLINE vec exponential(vec x) {
    const vec magic = (vec){0} + 12582912.f; /* 1.5 * 2^23: adding it rounds to an integer */
    const ivec tiny = x < -87.f; /* e^x below the smallest normal number */
    x = choose(tiny, (vec){0}, x);
    vec n = (x * 1.44269504f + magic) - magic;
    vec f = x - n * 0.693359375f + n * 2.12194440e-4f; /* x - n ln 2, ln 2 in two parts */
    vec p = 1.9875691500e-4f * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.f;
    const ivec bits = (__builtin_convertvector(choose(n == n, n, (vec){0}), ivec) + 127) << 23;
    return choose(tiny, (vec){0}, p * (vec)bits);
}

/* logits[o][c] become weights, unnormalised; `factor` receives 1 / their sum over o. */
INLINE void softmax(float *logits, int64_t area, int64_t lanes, float *factor) {
    for (int64_t c = 0; c < lanes; c += LANES) {
        vec top = *(vec *)(logits + c), sum = {0};
        for (int64_t o = 1; o < area; o++) {
            vec x = *(vec *)(logits + o * lanes + c);
            top = choose(x > top, x, top);
        }
        for (int64_t o = 0; o < area; o++) {
            vec *x = (vec *)(logits + o * lanes + c);
            *x = exponential(*x - top);
            sum += *x;
        }
        *(vec *)(factor + c) = 1.f / sum;
    }
}

/* ---- pairwise ---- */

INLINE float relu(float x) { return x > 0 ? x : x != x ? x : 0; }

/* delta and norm1 of one pair, positive part. Returns the number of channels. */
INLINE int64_t relate(const struct task *t, const float *restrict q, const float *restrict k,
                      const float *restrict scale, const float *restrict shift, const float *p_i, const float *p_j,
                      float *restrict d) {
    const int64_t r = t->rel;
    int64_t width = r;
    switch (t->relation) {
        case SUBTRACTION: for (int64_t c = 0; c < r; c++) d[c] = relu((q[c] - k[c]) * scale[c] + shift[c]); break;
        case SUMMATION: for (int64_t c = 0; c < r; c++) d[c] = relu((q[c] + k[c]) * scale[c] + shift[c]); break;
        case HADAMARD: for (int64_t c = 0; c < r; c++) d[c] = relu(q[c] * k[c] * scale[c] + shift[c]); break;
        case CONCATENATION:
            for (int64_t c = 0; c < r; c++) d[c] = relu(q[c] * scale[c] + shift[c]);
            for (int64_t c = 0; c < r; c++) d[r + c] = relu(k[c] * scale[r + c] + shift[r + c]);
            width = 2 * r;
            break;
        default: {
            float product = 0;
            for (int64_t c = 0; c < r; c++) product += q[c] * k[c];
            d[0] = relu(product * scale[0] + shift[0]);
            width = 1;
        }
    }
    if (p_j)
        for (int64_t c = 0; c < 2; c++, width++)
            d[width] = relu((t->absolute ? p_j[c] : p_i[c] - p_j[c]) * scale[width] + shift[width]);
    return width;
}

/* ---- threads ---- */

static inline void *take(char **from, size_t bytes) {
    void *here = *from;
    *from += (bytes + 63) / 64 * 64;
    return here;
}

#endif
