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

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

/* WIDTH: numbers in a vector register; a compiler keeps wider vectors in memory. ROWS x BLOCKS vectors of sums make a
 * register block: with BLOCKS vectors of the right factor and one number of the left they fill the 16 or (AVX-512,
 * AArch64) 32 registers. */
#if defined(__AVX512F__)
#define WIDTH 16
#define ROWS 7
#define BLOCKS 4
#elif defined(__AVX__)
#define WIDTH 8
#define ROWS 6
#define BLOCKS 2
#elif defined(__aarch64__)
#define WIDTH 4
#define ROWS 6
#define BLOCKS 4
#else
#define WIDTH 4
#define ROWS 6
#define BLOCKS 2
#endif

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define UNUSED __attribute__((unused)) /* by one of the files */

INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

/* The larger; x where either is NaN. One instruction where the vector extensions would need three. */
INLINE vec larger(vec x, vec y) {
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)y, (__m512)x);
#elif defined(__AVX__)
    return (vec)_mm256_max_ps((__m256)y, (__m256)x);
#else
    return choose(x < y, y, x);
#endif
}

/* The smaller; x where either is NaN. */
INLINE vec smaller(vec x, vec y) {
#if defined(__AVX512F__)
    return (vec)_mm512_min_ps((__m512)y, (__m512)x);
#elif defined(__AVX__)
    return (vec)_mm256_min_ps((__m256)y, (__m256)x);
#else
    return choose(x > y, y, x);
#endif
}

INLINE vec positive(vec x) { return larger(x, (vec){0}); } /* ReLU; NaN stays NaN */

/* The gradient of a ReLU's input, given its input or output and its output's gradient; torch's passes where NaN is. */
INLINE vec positive_backward(vec x, vec gradient) { return choose(x <= (vec){0}, (vec){0}, gradient); }

enum relation { SUBTRACTION, SUMMATION, HADAMARD, CONCATENATION, DOT, PATCH_CONCATENATION, PATCH_STAR };
enum form { PAIRWISE, PATCHWISE, UNKNOWN };
enum failure { NO_MEMORY = 1, UNKNOWN_CODE };

INLINE enum form form_of(int64_t relation) {
    switch (relation) {
        case SUBTRACTION: case SUMMATION: case HADAMARD: case CONCATENATION: case DOT: return PAIRWISE;
        case PATCH_CONCATENATION: case PATCH_STAR: return PATCHWISE;
        default: return UNKNOWN;
    }
}

struct task {
    int64_t relation, absolute, batch, height, width, rel, hidden, lanes, out, kernel, dilation;
    int64_t query_row, key_row, value_row; /* from one pixel to the next, in numbers */
    /* hidden: width of the middle of gamma, padded to WIDTH. lanes: attention weights of one neighbour, repeated to a
     * multiple of WIDTH, so that the channels that share a weight meet it without shuffling. Of query, key, place,
     * scale1 and shift1 whole vectors are read, beyond their ends too. */
    const float *query, *key, *value, *place;
    const float *scale1, *shift1;   /* norm1, in the order in which relate writes its channels */
    const float *weight1, *shift2;  /* [inputs][hidden], norm2 folded in */
    const float *weight2, *bias2;   /* [hidden][lanes]; patchwise: [hidden][k * k][lanes] */
    const int64_t *rows, *columns;  /* source index of every row and column of the padded map */
    const float *shift;             /* NULL, or [out]: the output is relu(y + shift) */
    float *output;
    int64_t hidden_used;            /* rows of weight2 */
    int64_t together;               /* pixels that a thread takes */
    int64_t next;                   /* the next pixel of the batch that no thread has taken */
    int64_t failed;                 /* an enum failure, or 0 */
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
        for (int b = 0; b < blocks; b++) sum[m][b] = *(const vec *)(start + m * start_row + b * WIDTH);
    for (int64_t i = 0; i < inner; i++) {
        vec line[BLOCKS];
        for (int b = 0; b < blocks; b++) line[b] = *(const vec *)(w + i * w_row + b * WIDTH);
        for (int m = 0; m < rows; m++)
            for (int b = 0; b < blocks; b++) sum[m][b] += l.a[m * l.row + i * l.inner] * line[b];
    }
    for (int m = 0; m < rows; m++)
        for (int b = 0; b < blocks; b++)
            *(vec *)(c + m * c_row + b * WIDTH) = relu ? positive(sum[m][b]) : sum[m][b];
}

INLINE void multiply_rows(const int rows, struct left l, const float *w, int64_t w_row, int64_t inner,
                          const float *start, int64_t start_row, float *c, int64_t c_row, int64_t columns,
                          const int relu) {
    int64_t j = 0;
#if BLOCKS >= 4
    for (; j + 4 * WIDTH <= columns; j += 4 * WIDTH)
        multiply_block(rows, 4, l, w + j, w_row, inner, start + j, start_row, c + j, c_row, relu);
#endif
    for (; j + 2 * WIDTH <= columns; j += 2 * WIDTH)
        multiply_block(rows, 2, l, w + j, w_row, inner, start + j, start_row, c + j, c_row, relu);
    for (; j < columns; j += WIDTH)
        multiply_block(rows, 1, l, w + j, w_row, inner, start + j, start_row, c + j, c_row, relu);
}

/* c[m][:] = start[m][:] + l[m][:inner] w, with ReLU if asked. `columns` is a multiple of WIDTH; start_row is 0 for one
 * row that serves all; start may be c itself. */
INLINE void multiply_any(int64_t rows, struct left l, const float *w, int64_t w_row, int64_t inner, const float *start,
                         int64_t start_row, float *c, int64_t c_row, int64_t columns, const int relu) {
#define CASE(n) case n: multiply_rows(n, l, w, w_row, inner, start, start_row, c, c_row, columns, relu); break;
    /* register blocks of about the same number of rows: few sums would wait for one another */
    for (int64_t blocks = (rows + ROWS - 1) / ROWS, some; blocks > 0; blocks--, rows -= some) {
        some = (rows + blocks - 1) / blocks;
        switch (some) {
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if ROWS > 6
            CASE(7)
#endif
        }
        l.a += some * l.row, c += some * c_row, start += some * start_row;
    }
#undef CASE
}

UNUSED static void multiply(int64_t rows, struct left l, const float *w, int64_t w_row, int64_t inner,
                            const float *start, int64_t start_row, float *c, int64_t c_row, int64_t columns) {
    multiply_any(rows, l, w, w_row, inner, start, start_row, c, c_row, columns, 0);
}

UNUSED static void multiply_relu(int64_t rows, struct left l, const float *w, int64_t w_row, int64_t inner,
                                 const float *start, int64_t start_row, float *c, int64_t c_row, int64_t columns) {
    multiply_any(rows, l, w, w_row, inner, start, start_row, c, c_row, columns, 1);
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
    for (int64_t c = 0; c < lanes; c += WIDTH) {
        vec top = *(vec *)(logits + c), sum = {0};
        for (int64_t o = 1; o < area; o++) {
            top = larger(top, *(vec *)(logits + o * lanes + c));
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

INLINE vec at(const float *p) { return *(const vec *)p; }

INLINE float relu(float x) { return x > 0 ? x : x != x ? x : 0; }

/* r channels of x from channel `first` of the relation, normalised, positive part, to d. Whole vectors are written, up
 * to WIDTH - 1 numbers beyond the last channel: d is filled in increasing order. */
#define CHANNELS(d, first, x) \
    for (int64_t c = 0; c < r; c += WIDTH) \
        *(vec *)((d) + c) = positive((x) * at(t->scale1 + (first) + c) + at(t->shift1 + (first) + c))

/* delta and norm1 of one pair, positive part. Returns the number of channels. */
INLINE int64_t relate(const struct task *t, const int relation, const float *restrict q, const float *restrict k,
                      const float *restrict p_i, const float *restrict p_j, float *restrict d) {
    const int64_t r = t->rel;
    int64_t width = r;
    switch (relation) {
        case SUBTRACTION: CHANNELS(d, 0, at(q + c) - at(k + c)); break;
        case SUMMATION: CHANNELS(d, 0, at(q + c) + at(k + c)); break;
        case HADAMARD: CHANNELS(d, 0, at(q + c) * at(k + c)); break;
        case CONCATENATION:
            CHANNELS(d, 0, at(q + c));
            CHANNELS(d + r, r, at(k + c));
            width = 2 * r;
            break;
        case DOT: {
            float product = 0;
            for (int64_t c = 0; c < r; c++) product += q[c] * k[c];
            d[0] = relu(product * t->scale1[0] + t->shift1[0]);
            width = 1;
        }
    }
    if (p_j) {
        vec p = at(p_j);
        if (!t->absolute) p = at(p_i) - p;
        *(vec *)(d + width) = positive(p * at(t->scale1 + width) + at(t->shift1 + width));
        width += 2;
    }
    return width;
}

/* ---- patchwise ---- */

/* The query's channels of the relation of one pixel, positive part; none in the star-product. Returns their number. */
INLINE int64_t relate_centre(const struct task *t, const float *restrict q, float *restrict d) {
    const int64_t r = t->relation == PATCH_STAR ? 0 : t->rel;
    CHANNELS(d, 0, at(q + c));
    return r;
}

/* The channels of neighbour o. Returns their number. */
INLINE int64_t relate_neighbour(const struct task *t, const float *restrict q, const float *restrict k, int64_t o,
                                float *restrict d) {
    const int64_t r = t->rel;
    if (t->relation == PATCH_STAR) {
        float product = 0;
        for (int64_t c = 0; c < r; c++) product += q[c] * k[c];
        *d = relu(product * t->scale1[o] + t->shift1[o]);
        return 1;
    }
    CHANNELS(d, (o + 1) * r, at(k + c));
    return r;
}

/* ---- threads ---- */

static inline void *take(char **from, size_t bytes) {
    void *here = *from;
    *from += (bytes + 63) / 64 * 64;
    return here;
}

typedef void (*parallel_function)(void (*)(void *), void *, unsigned, unsigned);

/* Runs `work` on `threads` threads of the runtime that threads.py found; without one, on this thread. */
static inline void run(void (*work)(void *), void *argument, parallel_function parallel, unsigned threads) {
    if (parallel && threads > 1) parallel(work, argument, threads, 0);
    else work(argument);
}

#endif
