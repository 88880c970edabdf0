/* Footprint attention for inference, with nothing of size k x k in memory beyond one pixel's own.
 *
 * Plain C with the vector extensions of GCC and Clang: no Python, torch or OpenMP headers. Built once for each
 * instruction set; loaded with ctypes by native.py, which fills struct task. Maps are float32, channels last.
 *
 * Both forms are: relate (delta, norm, ReLU) -> product with weight1 -> ReLU -> product with weight2 -> (pairwise:
 * softmax over the footprint) -> weighted sum of the values. The pairwise products run over the neighbours of one
 * pixel, the patchwise ones over a few pixels of a row, so that a block of accumulators stays in registers.
 */
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

/* ---------------------------------------------------------------------------------------------- matrix products -- */

INLINE void multiply_block(const int rows, const int blocks, const float *a, int64_t a_row, const float *w,
                           int64_t w_row, int64_t inner, const float *start, float *c, int64_t c_row, const int relu) {
    vec sum[ROWS][BLOCKS];
    for (int m = 0; m < rows; m++)
        for (int b = 0; b < blocks; b++) sum[m][b] = *(const vec *)(start + b * LANES);
    for (int64_t i = 0; i < inner; i++) {
        vec line[BLOCKS];
        for (int b = 0; b < blocks; b++) line[b] = *(const vec *)(w + i * w_row + b * LANES);
        for (int m = 0; m < rows; m++)
            for (int b = 0; b < blocks; b++) sum[m][b] += a[m * a_row + i] * line[b];
    }
    for (int m = 0; m < rows; m++)
        for (int b = 0; b < blocks; b++)
            *(vec *)(c + m * c_row + b * LANES) = relu ? positive(sum[m][b]) : sum[m][b];
}

INLINE void multiply_rows(const int rows, const float *a, int64_t a_row, const float *w, int64_t w_row, int64_t inner,
                          const float *start, float *c, int64_t c_row, int64_t columns, const int relu) {
    int64_t j = 0;
#if BLOCKS >= 4
    for (; j + 4 * LANES <= columns; j += 4 * LANES)
        multiply_block(rows, 4, a, a_row, w + j, w_row, inner, start + j, c + j, c_row, relu);
    for (; j + 2 * LANES <= columns; j += 2 * LANES)
        multiply_block(rows, 2, a, a_row, w + j, w_row, inner, start + j, c + j, c_row, relu);
#endif
    for (; j < columns; j += LANES)
        multiply_block(rows, 1, a, a_row, w + j, w_row, inner, start + j, c + j, c_row, relu);
}

/* c[m][:] = start + a[m][:inner] w, with ReLU if asked; `columns` is a multiple of LANES. */
INLINE void multiply(int64_t rows, const float *a, int64_t a_row, const float *w, int64_t w_row, int64_t inner,
                     const float *start, float *c, int64_t c_row, int64_t columns, const int relu) {
#define CASE(n) case n: multiply_rows(n, a, a_row, w, w_row, inner, start, c, c_row, columns, relu); break;
    for (; rows > 0; rows -= ROWS, a += ROWS * a_row, c += ROWS * c_row)
        switch (rows < ROWS ? rows : ROWS) {
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
        }
#undef CASE
}

/* -------------------------------------------------------------------------------------------------------- softmax -- */

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

/* ------------------------------------------------------------------------------------------------- the weighted sum */

/* output[c] = factor[c mod lanes] * sum_o weights[o][c mod lanes] * value(o)[c] */
INLINE void weighted_sum(const float *weights, const float *const *values, int64_t area, int64_t lanes, int64_t out,
                         const float *factor, float *output) {
    int64_t c = 0;
#define CHUNK(n)                                                                                          \
    for (; c + n * LANES <= out && c % lanes + n * LANES <= lanes; c += n * LANES) {                      \
        const int64_t l = c % lanes;                                                                      \
        vec sum[n];                                                                                       \
        for (int b = 0; b < n; b++) sum[b] = (vec){0};                                                    \
        for (int64_t o = 0; o < area; o++)                                                                \
            for (int b = 0; b < n; b++)                                                                   \
                sum[b] += *(const vec *)(weights + o * lanes + l + b * LANES) * *(const vec *)(values[o] + c + b * LANES); \
        for (int b = 0; b < n; b++)                                                                       \
            *(vec *)(output + c + b * LANES) = sum[b] * *(const vec *)(factor + l + b * LANES); \
    }
    if (lanes == LANES) /* one vector of weights serves several of values */
        for (; c + 4 * LANES <= out; c += 4 * LANES) {
            vec sum[4] = {{0}, {0}, {0}, {0}};
            for (int64_t o = 0; o < area; o++) {
                const vec w = *(const vec *)(weights + o * lanes);
                for (int b = 0; b < 4; b++) sum[b] += w * *(const vec *)(values[o] + c + b * LANES);
            }
            for (int b = 0; b < 4; b++) *(vec *)(output + c + b * LANES) = sum[b] * *(const vec *)factor;
        }
    while (c + LANES <= out) {
        CHUNK(4)
        CHUNK(1)
    }
#undef CHUNK
    for (; c < out; c++) {
        float sum = 0;
        for (int64_t o = 0; o < area; o++) sum += weights[o * lanes + c % lanes] * values[o][c];
        output[c] = sum * factor[c % lanes];
    }
}

/* -------------------------------------------------------------------------------------------------------- pairwise -- */

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

struct scratch {
    float *related, *middle, *weights, *factor;
    const float **keys, **values, **places;
};

INLINE void pairwise_row(const struct task *t, int64_t image, int64_t y, struct scratch *s) {
    const int64_t area = t->kernel * t->kernel, pixels = t->height * t->width;
    const float *key = t->key + image * pixels * t->rel, *value = t->value + image * pixels * t->out;
    /* neighbours worked on together: the whole of a small footprint, one row of a large one, to stay in cache */
    const int64_t group = t->kernel < ROWS ? area : t->kernel;
    const int64_t inputs_row = 2 * t->rel + 3;
    for (int64_t x = 0; x < t->width; x++) {
        const int64_t here = (image * t->height + y) * t->width + x;
        const float *q = t->query + here * t->rel;
        for (int64_t a = 0, o = 0; a < t->kernel; a++) {
            const int64_t line = t->rows[y + a * t->dilation] * t->width;
            for (int64_t b = 0; b < t->kernel; b++, o++) {
                const int64_t there = line + t->columns[x + b * t->dilation];
                s->keys[o] = key + there * t->rel;
                s->values[o] = value + there * t->out;
                s->places[o] = t->place ? t->place + there * 2 : NULL;
            }
        }
        const float *p_i = t->place ? t->place + (y * t->width + x) * 2 : NULL;
        for (int64_t first = 0; first < area; first += group) {
            int64_t inputs = 0;
            for (int64_t o = 0; o < group; o++)
                inputs = relate(t, q, s->keys[first + o], t->scale1, t->shift1, p_i, s->places[first + o],
                                s->related + o * inputs_row);
            multiply(group, s->related, inputs_row, t->weight1, t->hidden, inputs, t->shift2, s->middle, t->hidden,
                     t->hidden, 1);
            multiply(group, s->middle, t->hidden, t->weight2, t->lanes, t->hidden_used, t->bias2,
                     s->weights + first * t->lanes, t->lanes, t->lanes, 0);
        }
        softmax(s->weights, area, t->lanes, s->factor);
        weighted_sum(s->weights, s->values, area, t->lanes, t->out, s->factor, t->output + here * t->out);
    }
}

/* ------------------------------------------------------------------------------------------------------- patchwise -- */

/* `count` pixels of row y from column x. */
INLINE void patchwise_pixels(const struct task *t, int64_t image, int64_t y, int64_t x, int64_t count,
                             struct scratch *s) {
    const int64_t area = t->kernel * t->kernel, pixels = t->height * t->width, r = t->rel;
    const float *key = t->key + image * pixels * r, *value = t->value + image * pixels * t->out;
    const int64_t here = (image * t->height + y) * t->width + x;
    const float *query = t->query + here * r;
    const int64_t inputs = t->relation == PATCH_STAR ? area : r * (area + 1);
    float *d = s->related;
    if (t->relation != PATCH_STAR)
        for (int64_t m = 0; m < count; m++)
            for (int64_t c = 0; c < r; c++) d[m * inputs + c] = relu(query[m * r + c] * t->scale1[c] + t->shift1[c]);
    for (int64_t a = 0, o = 0; a < t->kernel; a++) {
        const int64_t line = t->rows[y + a * t->dilation] * t->width;
        for (int64_t b = 0; b < t->kernel; b++, o++)
            for (int64_t m = 0; m < count; m++) {
                const int64_t there = line + t->columns[x + m + b * t->dilation];
                const float *restrict k = key + there * r, *restrict q = query + m * r;
                s->values[m * area + o] = value + there * t->out;
                if (t->relation == PATCH_STAR) {
                    float product = 0;
                    for (int64_t c = 0; c < r; c++) product += q[c] * k[c];
                    d[m * inputs + o] = relu(product * t->scale1[o] + t->shift1[o]);
                } else {
                    const float *restrict scale = t->scale1 + (o + 1) * r, *restrict shift = t->shift1 + (o + 1) * r;
                    float *restrict to = d + m * inputs + (o + 1) * r;
                    for (int64_t c = 0; c < r; c++) to[c] = relu(k[c] * scale[c] + shift[c]);
                }
            }
    }
    const int64_t columns = area * t->lanes;
    multiply(count, d, inputs, t->weight1, t->hidden, inputs, t->shift2, s->middle, t->hidden, t->hidden, 1);
    multiply(count, s->middle, t->hidden, t->weight2, columns, t->hidden_used, t->bias2, s->weights, columns, columns, 0);
    for (int64_t m = 0; m < count; m++)
        weighted_sum(s->weights + m * columns, s->values + m * area, area, t->lanes, t->out, s->factor,
                     t->output + (here + m) * t->out);
}

/* --------------------------------------------------------------------------------------------------------- threads -- */

static void *take(char **from, size_t bytes) {
    void *here = *from;
    *from += (bytes + 63) / 64 * 64;
    return here;
}

/* Works on rows until none is left. Any number of threads may call this with the same task. */
void san_work(void *argument) {
    struct task *t = argument;
    const size_t area = t->kernel * t->kernel, together = t->relation >= PATCH_CONCATENATION ? ROWS : 1;
    const size_t related = 4 * (together * (t->rel + 1) * (area + 1) + (2 * t->rel + 3) * area + LANES);
    const size_t middle = 4 * (together + area) * t->hidden, weights = 4 * together * area * t->lanes;
    const size_t factor = 4 * t->lanes, pointers = together * area * sizeof(float *);
    char *memory = malloc(related + middle + weights + factor + 3 * pointers + 8 * 64), *from = memory;
    if (!memory) {
        t->failed = 1;
        return;
    }
    from += 64 - (uintptr_t)from % 64;
    struct scratch s;
    s.related = take(&from, related);
    s.middle = take(&from, middle);
    s.weights = take(&from, weights);
    s.factor = take(&from, factor);
    s.keys = take(&from, pointers);
    s.values = take(&from, pointers);
    s.places = take(&from, pointers);
    for (int64_t l = 0; l < t->lanes; l++) s.factor[l] = 1;
    for (;;) {
        const int64_t row = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED);
        if (row >= t->batch * t->height) break;
        const int64_t image = row / t->height, y = row % t->height;
        if (t->relation < PATCH_CONCATENATION)
            pairwise_row(t, image, y, &s);
        else
            for (int64_t x = 0; x < t->width; x += ROWS)
                patchwise_pixels(t, image, y, x, t->width - x < ROWS ? t->width - x : ROWS, &s);
    }
    free(memory);
}

/* Runs san_work on `threads` threads of an OpenMP runtime that is loaded already (GOMP_parallel's address), so that no
 * second pool of threads competes with torch's; without one, on this thread. */
typedef void (*parallel_function)(void (*)(void *), void *, unsigned, unsigned);

void san_run(struct task *task, parallel_function parallel, unsigned threads) {
    if (parallel && threads > 1) parallel(san_work, task, threads, 0);
    else san_work(task);
}

int64_t san_task_bytes(void) { return sizeof(struct task); }
