/* Attention with a vector across neighbouring pixels of a row, for layers whose channels fill no vector.
 *
 * Keys, values and coordinates of the rows in reach lie in a ring of planes, reflected beyond both ends of a row, so
 * that what a span of pixels sees at a tap is one vector of each plane. The products have gamma's weights as scalars on
 * their left, and no lane is a channel that is not there. A row is made into planes once for each band of rows.
 *
 *   span          pixels that are worked on together: up to BLOCKS vectors
 *   planes        of a row: rel of the key, 2 of the coordinates, out of the value
 */
#ifndef SAN_PLANES_H
#define SAN_PLANES_H

#include "footprint.h"

struct planes {
    int64_t count, pitch;   /* planes of a row; elements from one to the next */
    int64_t slots;          /* rows that the ring holds */
    int64_t image, *held;   /* whose rows they are: [slots], -1 for none */
    float *ring;            /* [slots][count][pitch] */
    float *query;           /* [rel + 2][span]: phi(x_i) and p_i */
    struct matrix related;  /* [inputs][span], patchwise those of a group of taps */
    struct matrix middle;   /* [hidden][span] */
    struct matrix shift2;   /* [hidden][span], the same in all pixels; so is bias2: [weight channels][span] of each tap,
                               pairwise of one */
    struct matrix bias2;
    float *weights;         /* [weight channels][taps][span] */
    float *output;          /* [out][span] */
};

INLINE int64_t planes_reach(const struct task *t) { return t->dilation * (t->kernel / 2); }

/* ---- planes ---- */

typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));

#if defined(__clang__)
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t iquad __attribute__((vector_size(16)));
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (iquad){i, j, k, l})
#endif

/* Four rows of four elements become four columns. */
INLINE void transpose(const float *const *from, float *const *to) {
    const quad a = *(const quad *)from[0], b = *(const quad *)from[1];
    const quad c = *(const quad *)from[2], d = *(const quad *)from[3];
    const quad ab = SHUFFLE(a, b, 0, 4, 1, 5), cd = SHUFFLE(c, d, 0, 4, 1, 5);
    const quad ab2 = SHUFFLE(a, b, 2, 6, 3, 7), cd2 = SHUFFLE(c, d, 2, 6, 3, 7);
    *(quad *)to[0] = SHUFFLE(ab, cd, 0, 1, 4, 5), *(quad *)to[1] = SHUFFLE(ab, cd, 2, 3, 6, 7);
    *(quad *)to[2] = SHUFFLE(ab2, cd2, 0, 1, 4, 5), *(quad *)to[3] = SHUFFLE(ab2, cd2, 2, 3, 6, 7);
}

/* to[c][x] = from[x][c]: `count` lines of `length` elements; lines of `to` are `row` elements apart. */
static void transpose_lines(const float *const *from, int64_t count, int64_t length, float *to, int64_t row) {
    int64_t x = 0;
    for (; x + 4 <= count; x += 4) {
        int64_t c = 0;
        for (; c + 4 <= length; c += 4) {
            const float *lines[4] = {from[x] + c, from[x + 1] + c, from[x + 2] + c, from[x + 3] + c};
            float *line = to + c * row + x, *columns[4] = {line, line + row, line + 2 * row, line + 3 * row};
            transpose(lines, columns);
        }
        for (; c < length; c++)
            for (int64_t i = x; i < x + 4; i++) to[c * row + i] = from[i][c];
    }
    for (; x < count; x++)
        for (int64_t c = 0; c < length; c++) to[c * row + x] = from[x][c];
}

/* The planes of row y of an image, made if they are not there. */
static const float *planes_of_row(const struct task *t, struct planes *p, int64_t image, int64_t y,
                                  const float **pixels) {
    const int64_t slot = y % p->slots, padded = t->width + 2 * planes_reach(t), first = image * t->height;
    float *to = p->ring + slot * p->count * p->pitch;
    if (p->image == image && p->held[slot] == y) return to;
    if (p->image != image) {
        for (int64_t i = 0; i < p->slots; i++) p->held[i] = -1;
        p->image = image;
    }
    p->held[slot] = y;
    float *at = to;
#define MAP(map, line, channels)                                                                      \
    for (int64_t x = 0; x < padded; x++) pixels[x] = row_of(map, (line) * t->width + t->columns[x]);    \
    transpose_lines(pixels, padded, channels, at, p->pitch), at += (channels) * p->pitch
    MAP(t->key, first + y, t->rel);
    if (t->place.at) { MAP(t->place, y, 2); }
    MAP(t->value, first + y, t->out);
#undef MAP
    return to;
}

/* ---- one span ---- */

/* Weighted sums of `some` channels that share the weights [taps][span]: the planes of the first begin at values[o], and
 * those of the next `step` elements further. */
INLINE void planes_sum(const int some, const int blocks, const float *weights, const float *const *values, int64_t step,
                       int64_t taps, const float *factor, const float *shift, int64_t shift_step, struct matrix output) {
    vec sum[4][BLOCKS];
    for (int s = 0; s < some; s++)
        for (int b = 0; b < blocks; b++) sum[s][b] = (vec){0};
    for (int64_t o = 0; o < taps; o++) {
        const float *value = values[o];
        vec w[BLOCKS];
        for (int b = 0; b < blocks; b++) w[b] = at(weights + o * SPAN + b * WIDTH);
        for (int s = 0; s < some; s++)
            for (int b = 0; b < blocks; b++) sum[s][b] += w[b] * at(value + s * step + b * WIDTH);
    }
    for (int s = 0; s < some; s++)
        for (int b = 0; b < blocks; b++) {
            const vec y = sum[s][b] * at(factor + b * WIDTH);
            *(vec *)(row_of(output, s) + b * WIDTH) = shift ? positive(y + shift[s * shift_step]) : y;
        }
}

/* Logits of a span, [weight channels][taps][span]; keys[o]: where the keys of tap o begin. */
INLINE void planes_pairwise(const struct task *t, const enum pairwise_relation relation, const int blocks,
                            const struct planes *p, const float *const *keys) {
    const int64_t taps = t->kernel * t->kernel, inputs = t->centre + t->tap + (t->place.at ? 2 : 0);
    const int64_t span = blocks * WIDTH;
    for (int64_t o = 0; o < taps; o++) {
        relate_span(t, relation, blocks, p->query, keys[o], p->pitch, p->related.at);
        multiply_transposed(t->hidden_used, t->weight1, p->related, inputs, p->shift2, p->middle, span, 1);
        multiply_transposed(t->weight_channels, t->weight2, p->middle, t->hidden_used, p->bias2,
                            (struct matrix){p->weights + o * SPAN, taps * SPAN}, span, 0);
    }
}

/* Taps whose channels are multiplied with weight1 together. */
INLINE int64_t planes_group(const struct task *t) {
    const int64_t taps = t->kernel * t->kernel, group = t->tap ? 64 / t->tap : taps;
    return group < 1 ? 1 : group < taps ? group : taps;
}

/* The middle of gamma of a span, with the ReLU unless it goes to the hidden vectors. */
INLINE void planes_patchwise_hidden(const struct task *t, const int blocks, const struct planes *p, const float *const *keys) {
    const int64_t taps = t->kernel * t->kernel, group = planes_group(t), span = blocks * WIDTH;
    for (int64_t begin = 0, done = 0; begin < taps; begin += group) {
        const int64_t end = begin + group < taps ? begin + group : taps, centre = begin ? 0 : t->centre;
        const int64_t inputs = centre + (end - begin) * t->tap;
        if (!begin) relate_centre_span(t, blocks, p->query, p->related.at);
        for (int64_t o = begin; o < end; o++)
            relate_tap_span(t, blocks, p->query, keys[o], p->pitch, o,
                            row_of(p->related, centre + (o - begin) * t->tap));
        multiply_transposed(t->hidden_used, rows_from(t->weight1, done), p->related, inputs,
                            begin ? p->middle : p->shift2, p->middle, span, end == taps && t->part == WHOLE);
        done += inputs;
    }
}

/* Weights of a span, as above. */
INLINE void planes_patchwise_weights(const struct task *t, const int blocks, const struct planes *p) {
    const int64_t taps = t->kernel * t->kernel, span = blocks * WIDTH;
    for (int64_t o = 0; o < taps; o++)
        multiply_transposed(t->weight_channels, columns_from(t->weight2, o * t->lanes), p->middle, t->hidden_used,
                            rows_from(p->bias2, o * t->weight_channels),
                            (struct matrix){p->weights + o * SPAN, taps * SPAN}, span, 0);
}

/* The pixels x to x + pixels of row y of an image; rows[a] is where the planes of tap row a begin. */
INLINE void planes_span(const struct task *t, const int blocks, struct planes *p, int64_t image, int64_t y, int64_t x,
                        int64_t pixels, const float *const *rows, const float **lines) {
    const int64_t taps = t->kernel * t->kernel, pitch = p->pitch, share = t->weight_channels;
    const int64_t here = (image * t->height + y) * t->width + x;
    const int64_t first_value = (t->rel + (t->place.at ? 2 : 0)) * pitch;
    for (int64_t i = 0; i < pixels; i++) lines[i] = row_of(t->query, here + i);
    transpose_lines(lines, pixels, t->rel, p->query, SPAN);
    if (t->place.at) {
        for (int64_t i = 0; i < pixels; i++) lines[i] = row_of(t->place, y * t->width + x + i);
        transpose_lines(lines, pixels, 2, p->query + t->rel * SPAN, SPAN);
    }
    if (t->part == FROM_HIDDEN) {
        for (int64_t i = 0; i < pixels; i++) lines[i] = row_of(t->between, here + i);
        transpose_lines(lines, pixels, t->hidden_used, p->middle.at, SPAN);
    }
    for (int64_t a = 0, o = 0; a < t->kernel; a++)
        for (int64_t b = 0; b < t->kernel; b++, o++) lines[o] = rows[a] + x + b * t->dilation;
    float *factor = p->weights + share * taps * SPAN; /* stays one for the patchwise form */
    if (t->part == TO_HIDDEN) {
        planes_patchwise_hidden(t, blocks, p, lines);
        for (int64_t h = 0; h < t->hidden_used; h++) lines[h] = row_of(p->middle, h);
        transpose_lines(lines, t->hidden_used, pixels, row_of(t->between, here), t->between.row);
        return;
    }
    if (t->form == PATCHWISE) {
        if (t->part == WHOLE) planes_patchwise_hidden(t, blocks, p, lines);
        planes_patchwise_weights(t, blocks, p);
    } else {
        switch ((enum pairwise_relation)t->relation) { /* a copy of the loops for each */
#define COPY(code, name) case code: planes_pairwise(t, code, blocks, p, lines); break;
            PAIRWISE_RELATIONS(COPY)
#undef COPY
        }
        for (int64_t l = 0; l < share; l++)
            softmax((struct matrix){p->weights + l * taps * SPAN, SPAN}, taps, blocks * WIDTH, factor + l * SPAN);
    }
    for (int64_t o = 0; o < taps; o++) lines[o] += first_value;
    for (int64_t l = 0; l < share; l++) {
        const float *weights = p->weights + l * taps * SPAN;
        int64_t c = l;
#define SUM(some)                                                                                                   \
    planes_sum(some, blocks, weights, lines, share * pitch, taps, factor + l * SPAN, t->shift ? t->shift + c : NULL, \
               share, (struct matrix){p->output + c * SPAN, share * SPAN});                                          \
    for (int64_t o = 0; o < taps; o++) lines[o] += some * share * pitch
        for (; c + 3 * share < t->out; c += 4 * share) { SUM(4); }
        for (; c < t->out; c += share) { SUM(1); }
#undef SUM
        for (int64_t o = 0; o < taps; o++) lines[o] += (l + 1 - c) * pitch;
    }
    for (int64_t c = 0; c < t->out; c++) lines[c] = p->output + c * SPAN;
    transpose_lines(lines, t->out, pixels, row_of(t->output, here), t->output.row);
}

/* ---- rows ---- */

static void planes_row(const struct task *t, struct planes *p, int64_t image, int64_t y, const float **rows,
                       const float **lines) {
    for (int64_t a = 0; a < t->kernel; a++)
        rows[a] = planes_of_row(t, p, image, t->rows[y + a * t->dilation], lines);
    for (int64_t x = 0, left = t->width, some; left > 0; x += some, left -= some) {
        const int64_t blocks = left >= SPAN ? BLOCKS : (left + WIDTH - 1) / WIDTH;
        some = left < blocks * WIDTH ? left : blocks * WIDTH;
        const int64_t back = blocks * WIDTH - some, start = back < x ? x - back : 0;
        const int64_t pixels = x + some - start;
        switch (blocks) {
#define CASE(n) case n: planes_span(t, n, p, image, y, start, pixels, rows, lines); break;
            CASE(1) CASE(2)
#if BLOCKS > 2
            CASE(3) CASE(4)
#endif
#undef CASE
        }
    }
}

/* Works on bands of rows until none is left. Any number of threads may call this with the same task. */
static void work_planes(void *argument) {
    struct task *t = argument;
    const int64_t reach = planes_reach(t), taps = t->kernel * t->kernel, share = t->weight_channels;
    const int64_t bands = (t->height + t->together - 1) / t->together;
    struct planes p;
    p.count = t->rel + (t->place.at ? 2 : 0) + t->out;
    p.pitch = (t->width > SPAN ? t->width : SPAN) + 2 * reach;
    p.slots = 2 * reach + 1 < t->height ? 2 * reach + 1 : t->height;
    p.image = -1;
    const size_t ring = 4 * p.slots * p.count * p.pitch, query = 4 * (t->rel + 2) * SPAN;
    const int64_t inputs = t->form == PAIRWISE ? 2 * t->rel + 3 : t->centre + planes_group(t) * t->tap;
    const int64_t logits = t->part == TO_HIDDEN ? 0 : t->form == PAIRWISE ? 1 : taps;
    const size_t related = 4 * inputs * SPAN, middle = 4 * t->hidden * SPAN, bias2 = 4 * logits * share * SPAN;
    const size_t weights = 4 * share * (taps + 1) * SPAN, output = 4 * t->out * SPAN, held = 8 * p.slots;
    const int64_t wide = p.pitch > taps ? p.pitch : taps; /* no less than a span */
    const int64_t channels = t->out > t->hidden ? t->out : t->hidden;
    const size_t lines = sizeof(float *) * (wide > channels ? wide : channels), rows = sizeof(float *) * t->kernel;
    char *memory = calloc(1, ring + query + related + 2 * middle + bias2 + weights + output + held + lines + rows + 12 * 64);
    if (!memory) {
        t->failed = NO_MEMORY;
        return;
    }
    char *from = memory + (64 - (uintptr_t)memory % 64);
    p.ring = take(&from, ring), p.query = take(&from, query), p.related = take_matrix(&from, related, SPAN);
    p.middle = take_matrix(&from, middle, SPAN), p.shift2 = take_matrix(&from, middle, SPAN);
    p.bias2 = take_matrix(&from, bias2, SPAN), p.weights = take(&from, weights), p.output = take(&from, output);
    p.held = take(&from, held);
    const float **line = take(&from, lines), **row = take(&from, rows);
    for (int64_t x = 0; x < SPAN; x++) {
        for (int64_t l = 0; l < share; l++) p.weights[(share * taps + l) * SPAN + x] = 1;
        for (int64_t h = 0; h < t->hidden_used && t->part == WHOLE; h++) row_of(p.shift2, h)[x] = t->shift2[h];
        for (int64_t o = 0; o < logits; o++)
            for (int64_t l = 0; l < share; l++) row_of(p.bias2, o * share + l)[x] = t->bias2[o * t->lanes + l];
    }
    for (;;) {
        const int64_t n = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED);
        if (n >= t->batch * bands) break;
        const int64_t image = n / bands, top = n % bands * t->together;
        const int64_t bottom = top + t->together < t->height ? top + t->together : t->height;
        for (int64_t y = top; y < bottom; y++) planes_row(t, &p, image, y, row, line);
    }
    free(memory);
}

/* Bands are so high that few rows are made into planes twice, and every thread has a few. */
INLINE void run_planes(struct task *t, parallel_function parallel, unsigned threads) {
    const int64_t share = t->batch * t->height / (4 * (int64_t)threads), least = 2 * planes_reach(t);
    t->together = share < least ? least : share;
    if (t->together > t->height) t->together = t->height;
    if (t->together < 1) t->together = 1;
    run(work_planes, t, parallel, threads);
}

#endif
