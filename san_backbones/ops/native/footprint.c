/* Footprint attention forwards. */
#include "footprint.h"

/* ---- the weighted sum ---- */

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
                sum[b] += *(const vec *)(weights + o * lanes + l + b * LANES) *                           \
                          *(const vec *)(values[o] + c + b * LANES);                                      \
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
            multiply(group, (struct left){s->related, inputs_row, 1}, t->weight1, t->hidden, inputs, t->shift2, 0,
                     s->middle, t->hidden, t->hidden, 1);
            multiply(group, (struct left){s->middle, t->hidden, 1}, t->weight2, t->lanes, t->hidden_used, t->bias2, 0,
                     s->weights + first * t->lanes, t->lanes, t->lanes, 0);
        }
        softmax(s->weights, area, t->lanes, s->factor);
        weighted_sum(s->weights, s->values, area, t->lanes, t->out, s->factor, t->output + here * t->out);
    }
}

/* ---- patchwise ---- */

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
    multiply(count, (struct left){d, inputs, 1}, t->weight1, t->hidden, inputs, t->shift2, 0, s->middle, t->hidden,
             t->hidden, 1);
    multiply(count, (struct left){s->middle, t->hidden, 1}, t->weight2, columns, t->hidden_used, t->bias2, 0,
             s->weights, columns, columns, 0);
    for (int64_t m = 0; m < count; m++)
        weighted_sum(s->weights + m * columns, s->values + m * area, area, t->lanes, t->out, s->factor,
                     t->output + (here + m) * t->out);
}

/* ---- threads ---- */

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
