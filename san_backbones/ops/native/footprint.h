/* What the forward and the backward loops share: the task, products of small matrices, softmax, neighbours.
 *
 * Plain C with the vector extensions of GCC and Clang: no Python, torch or OpenMP headers. Built once for each
 * instruction set; loaded with ctypes by library.py, which describes the structs. Maps are float32, channels last.
 *
 * Both forms are: relate (delta, norm, ReLU) -> product with weight1 -> ReLU -> product with weight2 -> (pairwise:
 * softmax over the footprint) -> weighted sum of the values. The pairwise products run over the neighbours of one
 * pixel, the patchwise ones over a few pixels of a row, so that a block of accumulators stays in registers. Nothing of
 * size k x k is in memory beyond that.
 *
 * Sizes, by the names that they have in the structs and in the shapes of comments, [rows][columns]:
 *   pixels        of a batch: batch * height * width
 *   taps          of a footprint: kernel * kernel
 *   rel           channels of phi and psi
 *   inputs        channels of the relation: centre + tap (+ 2 for positions); patchwise centre + taps * tap
 *   hidden        width of the middle of gamma, padded to whole vectors; hidden_used without the padding
 *   lanes         attention weights of one tap, repeated to whole vectors, so that channels that share a weight meet it
 *                 without shuffling
 *   columns       of weight2: lanes; patchwise taps * lanes, those of a tap together
 *   weight channels  attention weights of one tap
 *   out           channels of the value and of the output
 */
#ifndef SAN_FOOTPRINT_H
#define SAN_FOOTPRINT_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

/* WIDTH: elements of a vector register; a compiler keeps wider vectors in memory. ROWS x BLOCKS vectors of sums make a
 * register block: with BLOCKS vectors of the right factor and one element of the left they fill the 16 or (AVX-512,
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
typedef uint32_t uvec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias)); /* may overflow */
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

INLINE vec at(const float *p) { return *(const vec *)p; }

INLINE float relu(float x) { return x > 0 ? x : x != x ? x : 0; }

enum form { PAIRWISE, PATCHWISE };
/* The patchwise form has one hidden vector for a pixel, so that it can be done in two parts with a map of them between:
 * from query and key to u = weight1 relu(norm1(delta)), and from relu(norm2(u)) and value to the output. */
enum part { WHOLE, TO_HIDDEN, FROM_HIDDEN };
enum failure { NO_MEMORY = 1, UNKNOWN_CODE };

/* Row m begins at at + m * row; with row 0, one row serves all. */
struct matrix {
    float *at;
    int64_t row;
};

struct task {
    int64_t form, relation;           /* an enum form; an enum pairwise_relation or patchwise_relation */
    int64_t part;                     /* an enum part: rel is 0 from the hidden vectors, out is 0 to them */
    int64_t absolute;                 /* positions p_j instead of p_i - p_j */
    int64_t batch, height, width, kernel, dilation;
    int64_t rel, centre, tap, hidden, hidden_used, lanes, weight_channels, out;
    int64_t planes;                   /* whether vectors lie across pixels (planes.h) */
    struct matrix query, key;         /* [pixels][rel] */
    struct matrix value;              /* [pixels][out] */
    struct matrix between;            /* [pixels][hidden_used]: what TO_HIDDEN writes, and FROM_HIDDEN reads */
    struct matrix place;              /* [height * width][2], or NULL. Of place, query, key, scale1 and shift1 whole
                                         vectors are read, beyond their ends too */
    const float *scale1, *shift1;     /* norm1: [inputs] */
    float *shift2, *bias2;            /* [hidden], TO_HIDDEN zeros; [columns] */
    struct matrix weight1;            /* [inputs][hidden], norm2 folded in */
    struct matrix weight2;            /* [hidden_used][columns] */
    const struct linear *eight;       /* NULL; or gamma in 8 bits: weight1 of each group of taps, then weight2 */
    const int64_t *rows, *columns;    /* source index of every row and column of the padded map */
    const float *shift;               /* NULL, or [out]: the output is relu(y + shift) */
    struct matrix output;             /* [pixels][out] */
    int64_t together;                 /* pixels that a thread takes */
    int64_t next;                     /* the next pixel of the batch that no thread has taken */
    int64_t failed;                   /* an enum failure, or 0 */
};

/* ---- neighbours ---- */

/* there[o]: the number, within the image, of what pixel number `spot` of the image sees at tap o. */
INLINE void find_neighbours(const struct task *t, int64_t spot, int64_t *there) {
    const int64_t kernel = t->kernel, dilation = t->dilation, width = t->width; /* once: `there` might be one of them */
    const int64_t *rows = t->rows + spot / width, *columns = t->columns + spot % width;
    for (int64_t a = 0, o = 0; a < kernel; a++) {
        const int64_t line = rows[a * dilation] * width;
        for (int64_t b = 0; b < kernel; b++, o++) there[o] = line + columns[b * dilation];
    }
}

/* ---- matrix products ---- */

INLINE float *row_of(struct matrix a, int64_t m) { return a.at + m * a.row; }

UNUSED static void copy_rows(int64_t rows, struct matrix from, struct matrix to, int64_t columns) {
    for (int64_t m = 0; m < rows; m++) memcpy(row_of(to, m), row_of(from, m), 4 * columns);
}

INLINE struct matrix one_row(float *x) { return (struct matrix){x, 0}; }

INLINE struct matrix rows_from(struct matrix a, int64_t m) { return (struct matrix){a.at + m * a.row, a.row}; }

INLINE struct matrix columns_from(struct matrix a, int64_t j) { return (struct matrix){a.at + j, a.row}; }

INLINE void multiply_block(const int rows, const int blocks, struct matrix a, const int transposed, struct matrix w,
                           int64_t inner, struct matrix start, struct matrix c, const int relu) {
    const int64_t row = transposed ? 1 : a.row, step = transposed ? a.row : 1;
    vec sum[ROWS][BLOCKS];
    for (int m = 0; m < rows; m++)
        for (int b = 0; b < blocks; b++) sum[m][b] = at(start.at + m * start.row + b * WIDTH);
    for (int64_t i = 0; i < inner; i++) {
        vec line[BLOCKS];
        for (int b = 0; b < blocks; b++) line[b] = at(w.at + i * w.row + b * WIDTH);
        for (int m = 0; m < rows; m++)
            for (int b = 0; b < blocks; b++) sum[m][b] += a.at[m * row + i * step] * line[b];
    }
    for (int m = 0; m < rows; m++)
        for (int b = 0; b < blocks; b++)
            *(vec *)(c.at + m * c.row + b * WIDTH) = relu ? positive(sum[m][b]) : sum[m][b];
}

INLINE void multiply_rows(const int rows, struct matrix a, const int transposed, struct matrix w, int64_t inner,
                          struct matrix start, struct matrix c, int64_t columns, const int relu) {
#define COLUMNS(blocks)                                                                               \
    multiply_block(rows, blocks, a, transposed, columns_from(w, j), inner, columns_from(start, j),     \
                   columns_from(c, j), relu)
    int64_t j = 0;
#if BLOCKS >= 4
    for (; j + 4 * WIDTH <= columns; j += 4 * WIDTH) COLUMNS(4);
#endif
    for (; j + 2 * WIDTH <= columns; j += 2 * WIDTH) COLUMNS(2);
    for (; j < columns; j += WIDTH) COLUMNS(1);
#undef COLUMNS
}

/* c = start + a w, with ReLU if asked: c and start are [rows][columns], a is [rows][inner] or, transposed,
 * [inner][rows], w [inner][columns]. `columns` is a multiple of WIDTH; start may be c itself. */
INLINE void multiply_any(int64_t rows, struct matrix a, const int transposed, struct matrix w, int64_t inner,
                         struct matrix start, struct matrix c, int64_t columns, const int relu) {
#define CASE(n) case n: multiply_rows(n, a, transposed, w, inner, start, c, columns, relu); break;
    /* register blocks of about the same number of rows: few sums would wait for one another */
    for (int64_t blocks = (rows + ROWS - 1) / ROWS, some; blocks > 0; blocks--, rows -= some) {
        some = (rows + blocks - 1) / blocks;
        switch (some) {
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if ROWS > 6
            CASE(7)
#endif
        }
        a.at += transposed ? some : some * a.row, c = rows_from(c, some), start = rows_from(start, some);
    }
#undef CASE
}

UNUSED static void multiply(int64_t rows, struct matrix a, struct matrix w, int64_t inner, struct matrix start,
                            struct matrix c, int64_t columns) {
    multiply_any(rows, a, 0, w, inner, start, c, columns, 0);
}

UNUSED static void multiply_relu(int64_t rows, struct matrix a, struct matrix w, int64_t inner, struct matrix start,
                                 struct matrix c, int64_t columns) {
    multiply_any(rows, a, 0, w, inner, start, c, columns, 1);
}

/* The left factor transposed, [inner][rows]: c = start + a^T w. */
UNUSED static void multiply_transposed(int64_t rows, struct matrix a, struct matrix w, int64_t inner,
                                       struct matrix start, struct matrix c, int64_t columns, const int relu) {
    if (relu) multiply_any(rows, a, 1, w, inner, start, c, columns, 1);
    else multiply_any(rows, a, 1, w, inner, start, c, columns, 0);
}

/* ---- norm and ReLU of a pixel ---- */

/* y[c] = min(relu(scale[c] x[c] + shift[c]), limit) of `count` channels. */
UNUSED static inline void scale_shift_relu(const float *x, const float *scale, const float *shift, float limit,
                                           int64_t count, float *y) {
    int64_t c = 0;
    for (; c + WIDTH <= count; c += WIDTH)
        *(vec *)(y + c) = smaller(positive(at(x + c) * at(scale + c) + at(shift + c)), (vec){0} + limit);
    for (; c < count; c++) {
        const float z = relu(x[c] * scale[c] + shift[c]);
        y[c] = z > limit ? limit : z;
    }
}

/* ---- softmax ---- */

/* e^x for x <= 0, to one unit in the last place; 0 below the smallest normal number, NaN stays NaN. What is
 * computed of numbers below that is never used. */
INLINE vec exponential(vec x) {
    const vec magic = (vec){0} + 12582912.f; /* 1.5 * 2^23: adding it rounds to an integer, in the low bits */
    const vec least = (vec){0} - 87.f; /* e^x below the smallest normal number */
    const vec shifted = x * 1.44269504f + magic, n = shifted - magic;
    vec f = x - n * 0.693359375f + n * 2.12194440e-4f; /* x - n ln 2, ln 2 in two parts */
    vec p = 1.9875691500e-4f * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.f;
#if defined(__AVX512F__)
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)least, _CMP_NLT_UQ);
    return (vec)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
    const uvec power = ((uvec)shifted << 23) + (127u << 23); /* 2^n; of NaN, and beyond the exponents, anything */
    return choose(x < least, (vec){0}, p * (vec)power);
#endif
}

/* Logits, [taps][lanes], become weights, unnormalised; `factor` receives 1 / their sum over the taps. */
INLINE void softmax(struct matrix logits, int64_t taps, int64_t lanes, float *factor) {
    for (int64_t c = 0; c < lanes; c += WIDTH) {
        vec top = at(logits.at + c), sum = {0};
        for (int64_t o = 1; o < taps; o++) {
            top = larger(top, at(row_of(logits, o) + c));
        }
        for (int64_t o = 0; o < taps; o++) {
            vec *x = (vec *)(row_of(logits, o) + c);
            *x = exponential(*x - top);
            sum += *x;
        }
        *(vec *)(factor + c) = 1.f / sum;
    }
}

enum { SPAN = BLOCKS * WIDTH }; /* pixels that planes.h works on together, at most */

#include "relations.h"

/* ---- threads ---- */

static inline void *take(char **from, size_t bytes) {
    void *here = *from;
    *from += (bytes + 63) / 64 * 64;
    return here;
}

/* `bytes` for a matrix whose rows are `row` elements apart. */
UNUSED static struct matrix take_matrix(char **from, size_t bytes, int64_t row) {
    return (struct matrix){take(from, bytes), row};
}

typedef void (*parallel_function)(void (*)(void *), void *, unsigned, unsigned);

/* Runs `work` on `threads` threads of the runtime that threads.py found; without one, on this thread. */
static inline void run(void (*work)(void *), void *argument, parallel_function parallel, unsigned threads) {
    if (parallel && threads > 1) parallel(work, argument, threads, 0);
    else work(argument);
}

#endif
