/* The loops of backward.c with a vector across neighbouring pixels of a row: planes.h, whose legend holds.
 *
 * Gradients of keys, values and coordinates are summed in planes of their own, and are added to the maps when a band is
 * done. Gradients of parameters stay vectors, of sums over every WIDTHth pixel, until a slot is done. Beyond the end of
 * a row the lanes of a span have zeros for query and gradient, and so add nothing.
 */
#ifndef SAN_PLANES_BACKWARD_H
#define SAN_PLANES_BACKWARD_H

#include "planes.h"

struct vector_sums { /* a vector for each parameter, without padding; names as in struct gradients */
    float *scale1, *shift1, *weight1, *shift2, *weight2, *bias2;
};

struct planes_backward {
    struct planes p;        /* `related` of all inputs; pairwise `middle` of all taps: [taps][hidden][span] */
    float *ring;            /* of gradients, as p.ring */
    float *query;           /* gradients of p.query */
    float *gradient;        /* of the output: [out][span] */
    float *counts;          /* 1 for a pixel, 0 beyond the end of the row: [span] */
    struct matrix related, middle, zero; /* gradients: [inputs][span], [hidden][span]; zeros for all rows */
    float *weights;         /* gradients of p.weights */
    float *first, *moments; /* STATISTICS: hidden vectors of the first tap; sums and squares of the others' differences
                               from them: [hidden][span], [2][hidden][span] */
    double *sums;           /* STATISTICS: [2][hidden][WIDTH] */
    size_t parameters;      /* vectors of `sum` */
    struct vector_sums sum;
    float *turned;          /* a row of a map */
    const float **line, **row, **keys;
};

/* ---- sums over pixels ---- */

INLINE void add_total(const float *sums, float *to) {
    for (int l = 0; l < WIDTH; l++) *to += sums[l];
}

enum { OUTER_ROWS = BLOCKS >= 4 ? 4 : 2, OUTER_COLUMNS = 4 };

INLINE void outer_block(const int rows, const int columns, const int blocks, struct matrix a, struct matrix b,
                        float *sums, int64_t row) {
    vec sum[OUTER_ROWS][OUTER_COLUMNS];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) sum[i][j] = at(sums + (i * row + j) * WIDTH);
    for (int k = 0; k < blocks; k++) {
        vec line[OUTER_COLUMNS];
        for (int j = 0; j < columns; j++) line[j] = at(row_of(b, j) + k * WIDTH);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < columns; j++) sum[i][j] += at(row_of(a, i) + k * WIDTH) * line[j];
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) *(vec *)(sums + (i * row + j) * WIDTH) = sum[i][j];
}

INLINE void outer_rows(const int rows, const int blocks, struct matrix a, struct matrix b, int64_t columns,
                       float *sums, int64_t row) {
    int64_t j = 0;
    for (; j + OUTER_COLUMNS <= columns; j += OUTER_COLUMNS)
        outer_block(rows, OUTER_COLUMNS, blocks, a, rows_from(b, j), sums + j * WIDTH, row);
    for (; j + 2 <= columns; j += 2) outer_block(rows, 2, blocks, a, rows_from(b, j), sums + j * WIDTH, row);
    for (; j < columns; j++) outer_block(rows, 1, blocks, a, rows_from(b, j), sums + j * WIDTH, row);
}

/* sums[i][j] += a[i] b[j] over the pixels of a span; vectors of `sums` are `row` vectors apart from i to i + 1. */
INLINE void outer(const int blocks, int64_t rows, struct matrix a, int64_t columns, struct matrix b, float *sums,
                  int64_t row) {
    int64_t i = 0;
    for (; i + OUTER_ROWS <= rows; i += OUTER_ROWS)
        outer_rows(OUTER_ROWS, blocks, rows_from(a, i), b, columns, sums + i * row * WIDTH, row);
    for (; i < rows; i++) outer_rows(1, blocks, rows_from(a, i), b, columns, sums + i * row * WIDTH, row);
}

/* ---- one span ---- */

/* Gradients of the weights of one tap, whose weight channels are `step` elements apart, and of the values it sees. */
INLINE void planes_sum_backward(const struct task *t, const int blocks, const float *gradient, const float *weights,
                                int64_t step, const float *value, int64_t pitch, float *d_weights, float *d_value) {
    const int64_t share = t->weight_channels, out = t->out;
    for (int64_t l = 0; l < share; l++) {
        vec w[BLOCKS], d_w[BLOCKS];
        for (int b = 0; b < blocks; b++) w[b] = at(weights + l * step + b * WIDTH), d_w[b] = (vec){0};
        for (int64_t c = l; c < out; c += share)
            for (int b = 0; b < blocks; b++) {
                const vec g = at(gradient + c * SPAN + b * WIDTH);
                d_w[b] += g * at(value + c * pitch + b * WIDTH);
                *(vec *)(d_value + c * pitch + b * WIDTH) += g * w[b];
            }
        for (int b = 0; b < blocks; b++) *(vec *)(d_weights + l * step + b * WIDTH) = d_w[b];
    }
}

/* Gradients of the weights w of one channel, [taps][span], become those of its logits: w (dw - sum w dw). */
INLINE void planes_softmax_backward(const int blocks, int64_t taps, const float *weights, float *d_weights) {
    for (int b = 0; b < blocks; b++) {
        vec dot = {0};
        for (int64_t o = b; o < taps * BLOCKS; o += BLOCKS) dot += at(weights + o * WIDTH) * at(d_weights + o * WIDTH);
        for (int64_t o = b; o < taps * BLOCKS; o += BLOCKS)
            *(vec *)(d_weights + o * WIDTH) = at(weights + o * WIDTH) * (at(d_weights + o * WIDTH) - dot);
    }
}

/* Gradient of the middle by the logits of tap o, added to `start`; and of weight2 and bias2. */
INLINE void planes_logits_backward(const struct task *t, const int blocks, struct planes_backward *s, int64_t o,
                                   struct matrix middle, struct matrix start) {
    const int64_t taps = t->kernel * t->kernel, share = t->weight_channels, tap = t->form == PAIRWISE ? 0 : o;
    const int64_t columns = share * (t->form == PAIRWISE ? 1 : taps);
    const struct matrix d_logits = {s->weights + o * SPAN, taps * SPAN};
    for (int64_t l = 0; l < share; l++) {
        vec *sum = (vec *)(s->sum.bias2 + (tap * share + l) * WIDTH), total = *sum;
        for (int b = 0; b < blocks; b++) total += at(row_of(d_logits, l) + b * WIDTH);
        *sum = total;
    }
    outer(blocks, t->hidden_used, middle, share, d_logits, s->sum.weight2 + tap * share * WIDTH, columns);
    multiply(t->hidden_used, columns_from(t->weight2, tap * t->lanes), d_logits, share, start, s->middle,
             blocks * WIDTH);
}

/* Gradient of the middle through its ReLU, and of shift2. */
INLINE void planes_relu_backward(const struct task *t, const int blocks, struct planes_backward *s,
                                 struct matrix middle) {
    for (int64_t h = 0; h < t->hidden_used; h++) {
        vec *sum = (vec *)(s->sum.shift2 + h * WIDTH), total = *sum;
        for (int b = 0; b < blocks; b++) {
            vec *g = (vec *)(row_of(s->middle, h) + b * WIDTH);
            *g = positive_backward(at(row_of(middle, h) + b * WIDTH), *g);
            total += *g;
        }
        *sum = total;
    }
}

/* Gradient of the hidden vectors by their sums and those of their squares. */
INLINE void planes_moments_backward(const struct backward *b, const int blocks, struct planes_backward *s,
                                    struct matrix middle) {
    for (int64_t h = 0; h < b->task.hidden_used; h++)
        for (int k = 0; k < blocks; k++)
            *(vec *)(row_of(s->middle, h) + k * WIDTH) = at(s->counts + k * WIDTH) *
                (row_of(b->gradient, 0)[h] + row_of(b->gradient, 1)[h] * at(row_of(middle, h) + k * WIDTH));
}

/* Hidden vectors of one more tap: differences from those of the first, as float32 has no digits for the variance beside
 * a large mean. */
INLINE void planes_moments(const struct task *t, const int blocks, struct planes_backward *s, struct matrix middle,
                           int first) {
    for (int64_t h = 0; h < t->hidden_used; h++)
        for (int b = 0; b < blocks; b++) {
            const int64_t here = h * SPAN + b * WIDTH;
            const vec u = at(row_of(middle, h) + b * WIDTH);
            vec *centre = (vec *)(s->first + here), *sum = (vec *)(s->moments + here), *squares = sum + t->hidden * BLOCKS;
            if (first) *centre = u, *sum = (vec){0}, *squares = (vec){0};
            const vec v = u - *centre;
            *sum += v, *squares += v * v;
        }
}

/* Adds those of all `taps` to the sums. */
INLINE void planes_moments_done(const struct task *t, const int blocks, struct planes_backward *s, double taps) {
    for (int64_t h = 0; h < t->hidden_used; h++)
        for (int b = 0; b < blocks; b++) {
            const float *centre = s->first + h * SPAN + b * WIDTH, *sum = s->moments + h * SPAN + b * WIDTH;
            const float *squares = sum + t->hidden * SPAN, *counts = s->counts + b * WIDTH;
            double *restrict sums = s->sums + h * WIDTH, *restrict sums2 = sums + t->hidden * WIDTH;
            for (int l = 0; l < WIDTH; l++) {
                const double c = centre[l];
                sums[l] += counts[l] * (taps * c + sum[l]);
                sums2[l] += counts[l] * (taps * c * c + 2 * c * sum[l] + squares[l]);
            }
        }
}

/* Gradients of weight1 and of `inputs` channels of the relation. */
INLINE void planes_middle_backward(const struct task *t, const int blocks, struct planes_backward *s, int64_t inputs) {
    outer(blocks, inputs, s->p.related, t->hidden_used, s->middle, s->sum.weight1, t->hidden_used);
    multiply(inputs, t->weight1, s->middle, t->hidden_used, s->zero, s->related, blocks * WIDTH);
}

INLINE void planes_pairwise_backward(const struct backward *b, const int blocks, struct planes_backward *s,
                                     const float *const *keys, int64_t first_value) {
    const struct task *t = &b->task;
    const struct planes *p = &s->p;
    const enum pairwise_relation relation = t->relation;
    const int64_t taps = t->kernel * t->kernel, share = t->weight_channels, span = blocks * WIDTH;
    if (b->mode == ATTENTION) {
        float *factor = p->weights + share * taps * SPAN;
        for (int64_t o = 0; o < taps; o++) {
            const struct matrix middle = rows_from(p->middle, o * t->hidden);
            relate_span(t, relation, blocks, p->query, keys[o], p->pitch, p->related.at);
            multiply_transposed(t->hidden_used, t->weight1, p->related, b->inputs, p->shift2, middle, span, 1);
            multiply_transposed(share, t->weight2, middle, t->hidden_used, p->bias2,
                                (struct matrix){p->weights + o * SPAN, taps * SPAN}, span, 0);
        }
        for (int64_t l = 0; l < share; l++) {
            float *weights = p->weights + l * taps * SPAN;
            softmax((struct matrix){weights, SPAN}, taps, span, factor);
            for (int64_t o = 0; o < taps; o++)
                for (int k = 0; k < span; k += WIDTH) *(vec *)(weights + o * SPAN + k) *= at(factor + k);
        }
        for (int64_t o = 0; o < taps; o++)
            planes_sum_backward(t, blocks, s->gradient, p->weights + o * SPAN, taps * SPAN, keys[o] + first_value,
                                p->pitch, s->weights + o * SPAN, s->ring + (keys[o] - p->ring) + first_value);
        for (int64_t l = 0; l < share; l++)
            planes_softmax_backward(blocks, taps, p->weights + l * taps * SPAN, s->weights + l * taps * SPAN);
    }
    for (int64_t o = 0; o < taps; o++) {
        struct matrix middle = p->middle;
        relate_span(t, relation, blocks, p->query, keys[o], p->pitch, p->related.at);
        if (b->mode == ATTENTION) {
            middle = rows_from(middle, o * t->hidden);
            planes_logits_backward(t, blocks, s, o, middle, s->zero);
            planes_relu_backward(t, blocks, s, middle);
        } else {
            multiply_transposed(t->hidden_used, t->weight1, p->related, b->inputs, s->zero, middle, span, 0);
            if (b->mode == STATISTICS) {
                planes_moments(t, blocks, s, middle, o == 0);
                continue;
            }
            planes_moments_backward(b, blocks, s, middle);
        }
        planes_middle_backward(t, blocks, s, b->inputs);
        relate_span_backward(t, relation, blocks, p->query, keys[o], p->pitch, p->related.at, s->related.at, s->query,
                             s->ring + (keys[o] - p->ring), s->sum.scale1, s->sum.shift1);
    }
    if (b->mode == STATISTICS) planes_moments_done(t, blocks, s, taps);
}

/* Gradients of the middle (s->middle), of weight2, bias2 and the values, given the middle (p->middle). */
INLINE void planes_from_hidden_backward(const struct backward *b, const int blocks, struct planes_backward *s,
                                        const float *const *keys, int64_t first_value) {
    const struct task *t = &b->task;
    const struct planes *p = &s->p;
    const int64_t taps = t->kernel * t->kernel, share = t->weight_channels;
    for (int64_t o = 0; o < taps; o++) {
        multiply_transposed(share, columns_from(t->weight2, o * t->lanes), p->middle, t->hidden_used,
                            rows_from(p->bias2, o * share), (struct matrix){p->weights + o * SPAN, taps * SPAN},
                            blocks * WIDTH, 0);
        planes_sum_backward(t, blocks, s->gradient, p->weights + o * SPAN, taps * SPAN, keys[o] + first_value,
                            p->pitch, s->weights + o * SPAN, s->ring + (keys[o] - p->ring) + first_value);
        planes_logits_backward(t, blocks, s, o, p->middle, o ? s->middle : s->zero);
    }
}

/* Given the gradient of the hidden vectors (s->middle), those of norm1, weight1, queries and keys. */
INLINE void planes_to_hidden_backward(const struct backward *b, const int blocks, struct planes_backward *s,
                                      const float *const *keys) {
    const struct task *t = &b->task;
    const struct planes *p = &s->p;
    const int64_t taps = t->kernel * t->kernel;
    relate_centre_span(t, blocks, p->query, p->related.at);
    for (int64_t o = 0; o < taps; o++)
        relate_tap_span(t, blocks, p->query, keys[o], p->pitch, o, row_of(p->related, t->centre + o * t->tap));
    planes_middle_backward(t, blocks, s, b->inputs);
    relate_centre_span_backward(t, blocks, p->query, p->related.at, s->related.at, s->query, s->sum.scale1,
                                s->sum.shift1);
    for (int64_t o = 0; o < taps; o++) {
        const int64_t first = (t->centre + o * t->tap) * SPAN;
        relate_tap_span_backward(t, blocks, p->query, keys[o], p->pitch, o, p->related.at + first,
                                 s->related.at + first, s->query, s->ring + (keys[o] - p->ring), s->sum.scale1,
                                 s->sum.shift1);
    }
}

/* Channels of `pixels` pixels of a map from number `here` as lines of a span, with zeros beyond. */
INLINE void lay_span(struct matrix map, int64_t here, int64_t pixels, int64_t span, int64_t channels, float *to,
                     const float **line) {
    for (int64_t i = 0; i < pixels; i++) line[i] = row_of(map, here + i);
    transpose_lines(line, pixels, channels, to, SPAN);
    for (int64_t c = 0; c < channels; c++)
        for (int64_t i = pixels; i < span; i++) to[c * SPAN + i] = 0;
}

/* The pixels x to x + pixels of row y of an image. */
INLINE void planes_span_backward(const struct backward *b, const int blocks, struct planes_backward *s, int64_t image,
                                 int64_t y, int64_t x, int64_t pixels) {
    const struct task *t = &b->task;
    struct planes *p = &s->p;
    const int64_t positions = t->place.at ? 2 : 0, span = blocks * WIDTH, in_image = y * t->width + x;
    const int64_t here = image * t->height * t->width + in_image, first_value = (t->rel + positions) * p->pitch;
    lay_span(t->query, here, pixels, span, t->rel, p->query, s->line);
    lay_span(t->place, in_image, pixels, span, positions, p->query + t->rel * SPAN, s->line);
    if (b->mode == ATTENTION) lay_span(b->gradient, here, pixels, span, t->out, s->gradient, s->line);
    if (t->part == TO_HIDDEN) lay_span(b->d_between, here, pixels, span, t->hidden_used, s->middle.at, s->line);
    if (t->part == FROM_HIDDEN) lay_span(t->between, here, pixels, span, t->hidden_used, p->middle.at, s->line);
    for (int64_t i = 0; i < span; i++) s->counts[i] = i < pixels;
    for (int64_t a = 0, o = 0; a < t->kernel; a++)
        for (int64_t c = 0; c < t->kernel; c++, o++) s->keys[o] = s->row[a] + x + c * t->dilation;
    memset(s->query, 0, 4 * (t->rel + positions) * SPAN);
    if (t->form == PAIRWISE) planes_pairwise_backward(b, blocks, s, s->keys, first_value);
    else if (t->part == TO_HIDDEN) planes_to_hidden_backward(b, blocks, s, s->keys);
    else planes_from_hidden_backward(b, blocks, s, s->keys, first_value);
    if (b->mode == STATISTICS) return;
    if (t->part == FROM_HIDDEN) {
        for (int64_t h = 0; h < t->hidden_used; h++) s->line[h] = row_of(s->middle, h);
        transpose_lines(s->line, t->hidden_used, pixels, row_of(b->d_between, here), b->d_between.row);
        return;
    }
    for (int64_t c = 0; c < t->rel; c++) s->line[c] = s->query + c * SPAN;
    transpose_lines(s->line, t->rel, pixels, row_of(b->d_query, here), b->d_query.row);
    for (int64_t i = 0; i < pixels; i++)
        for (int64_t c = 0; c < positions; c++) row_of(b->d_place, here + i)[c] += s->query[(t->rel + c) * SPAN + i];
}

/* ---- bands ---- */

/* Adds `count` planes of gradients of row y of an image, those beyond both ends of it where they are reflected from. */
static void add_planes(const struct task *t, const struct planes_backward *s, const float *planes, int64_t count,
                       struct matrix map, int64_t first) {
    const int64_t padded = t->width + 2 * planes_reach(t);
    for (int64_t c = 0; c < count; c++) s->line[c] = planes + c * s->p.pitch;
    transpose_lines(s->line, count, padded, s->turned, count);
    for (int64_t x = 0; x < padded; x++) {
        float *restrict to = row_of(map, first + t->columns[x]);
        const float *restrict from = s->turned + x * count;
        for (int64_t c = 0; c < count; c++) to[c] += from[c];
    }
}

static void planes_band(const struct backward *b, struct planes_backward *s, int64_t image, int64_t top,
                        int64_t bottom) {
    const struct task *t = &b->task;
    struct planes *p = &s->p;
    p->image = -1; /* rows that are there at the end are of this band */
    for (int64_t y = top; y < bottom; y++) {
        for (int64_t a = 0; a < t->kernel; a++)
            s->row[a] = planes_of_row(t, p, image, t->rows[y + a * t->dilation], s->line);
        for (int64_t x = 0, left = t->width, some; left > 0; x += some, left -= some) {
            const int64_t blocks = left >= SPAN ? BLOCKS : (left + WIDTH - 1) / WIDTH;
            some = left < blocks * WIDTH ? left : blocks * WIDTH;
            switch (blocks) {
#define CASE(n) case n: planes_span_backward(b, n, s, image, y, x, some); break;
                CASE(1) CASE(2)
#if BLOCKS > 2
                CASE(3) CASE(4)
#endif
#undef CASE
            }
        }
    }
    if (b->mode == STATISTICS) return;
    for (int64_t slot = 0; slot < p->slots; slot++) {
        if (p->held[slot] < 0) continue;
        const int64_t first = (image * t->height + p->held[slot]) * t->width, size = p->count * p->pitch;
        float *planes = s->ring + slot * size, *at = planes;
        add_planes(t, s, at, t->rel, b->d_key, first), at += t->rel * p->pitch;
        if (t->place.at) add_planes(t, s, at, 2, b->d_place, first), at += 2 * p->pitch;
        add_planes(t, s, at, t->out, b->d_value, first);
        memset(planes, 0, 4 * size);
    }
}

/* The sums of a slot: from vectors to where they belong. */
static void end_slot(const struct backward *b, struct planes_backward *s, int64_t slot) {
    const struct task *t = &b->task;
    const struct vector_sums *from = &s->sum;
    const int64_t share = t->weight_channels, taps = t->form == PAIRWISE ? 1 : t->kernel * t->kernel;
    if (b->mode == STATISTICS) {
        double *to = b->sums + 2 * slot * t->hidden;
        for (int64_t h = 0; h < 2 * t->hidden; h++)
            for (int l = 0; l < WIDTH; l++) to[h] += s->sums[h * WIDTH + l];
        memset(s->sums, 0, 16 * t->hidden * WIDTH);
        return;
    }
    const struct gradients to = gradients_of(b, slot);
    for (int64_t i = 0; i < b->inputs; i++) {
        add_total(from->scale1 + i * WIDTH, to.scale1 + i), add_total(from->shift1 + i * WIDTH, to.shift1 + i);
        for (int64_t h = 0; h < t->hidden_used; h++)
            add_total(from->weight1 + (i * t->hidden_used + h) * WIDTH, row_of(to.weight1, i) + h);
    }
    for (int64_t h = 0; h < t->hidden_used; h++) add_total(from->shift2 + h * WIDTH, to.shift2 + h);
    for (int64_t o = 0; b->mode == ATTENTION && o < taps; o++)
        for (int64_t l = 0; l < share; l++) {
            const int64_t column = o * share + l;
            add_total(from->bias2 + column * WIDTH, to.bias2 + o * t->lanes + l);
            for (int64_t h = 0; h < t->hidden_used; h++)
                add_total(from->weight2 + (h * taps * share + column) * WIDTH, row_of(to.weight2, h) + o * t->lanes + l);
        }
    memset(from->scale1, 0, 4 * s->parameters * WIDTH);
}

/* As work_backward. */
static void work_planes_backward(void *argument) {
    struct backward *b = argument;
    struct task *t = &b->task;
    const int64_t pairwise = t->form == PAIRWISE, taps = t->kernel * t->kernel, share = t->weight_channels;
    const int64_t reach = planes_reach(t), rows = b->band + 2 * reach, hidden = t->hidden_used;
    const int64_t columns = share * (pairwise ? 1 : taps), logits = b->mode == ATTENTION ? columns : 0;
    struct planes_backward s = {.parameters = 2 * b->inputs + b->inputs * hidden + hidden + hidden * columns + columns};
    struct planes *p = &s.p;
    p->count = t->rel + (t->place.at ? 2 : 0) + t->out;
    p->pitch = (t->width + SPAN - 1) / SPAN * SPAN + 2 * reach;
    p->slots = rows < t->height ? rows : t->height;
    const int64_t most = b->inputs > t->hidden ? b->inputs : t->hidden, wide = p->pitch > taps ? p->pitch : taps;
    const int64_t some = t->out > t->rel ? t->out : t->rel, channels = some > t->hidden ? some : t->hidden; /* and > 2 */
    const size_t ring = 4 * p->slots * p->count * p->pitch, query = 4 * (t->rel + 2) * SPAN;
    const size_t related = 4 * b->inputs * SPAN, middle = 4 * t->hidden * SPAN, bias2 = 4 * logits * SPAN;
    const size_t weights = 4 * share * (taps + 1) * SPAN, gradient = 4 * t->out * SPAN, held = 8 * p->slots;
    const size_t sums = 16 * t->hidden * WIDTH, vectors = 4 * s.parameters * WIDTH, turned = 4 * p->pitch * channels;
    const size_t line = sizeof(float *) * (wide > channels ? wide : channels), row = sizeof(float *) * t->kernel;
    const size_t keys = sizeof(float *) * taps;
    char *memory = calloc(1, 2 * (ring + query + related + weights) + (6 + (pairwise ? taps : 1)) * middle + bias2
                             + gradient + 4 * SPAN + 4 * most * SPAN + held + sums + vectors + turned + line + row + keys
                             + 32 * 64);
    if (!memory) {
        t->failed = NO_MEMORY;
        return;
    }
    char *from = memory + (64 - (uintptr_t)memory % 64);
    p->ring = take(&from, ring), s.ring = take(&from, ring);
    p->query = take(&from, query), s.query = take(&from, query);
    p->related = take_matrix(&from, related, SPAN), s.related = take_matrix(&from, related, SPAN);
    p->weights = take(&from, weights), s.weights = take(&from, weights);
    p->middle = take_matrix(&from, (pairwise ? taps : 1) * middle, SPAN), s.middle = take_matrix(&from, middle, SPAN);
    p->shift2 = take_matrix(&from, middle, SPAN), p->bias2 = take_matrix(&from, bias2, SPAN);
    s.first = take(&from, middle), s.moments = take(&from, 2 * middle);
    s.zero = take_matrix(&from, 4 * most * SPAN, SPAN);
    s.gradient = take(&from, gradient), s.counts = take(&from, 4 * SPAN), p->held = take(&from, held);
    s.sums = take(&from, sums), s.turned = take(&from, turned);
    s.line = take(&from, line), s.row = take(&from, row), s.keys = take(&from, keys);
    s.sum.scale1 = take(&from, vectors), s.sum.shift1 = s.sum.scale1 + b->inputs * WIDTH;
    s.sum.weight1 = s.sum.shift1 + b->inputs * WIDTH, s.sum.shift2 = s.sum.weight1 + b->inputs * hidden * WIDTH;
    s.sum.weight2 = s.sum.shift2 + hidden * WIDTH, s.sum.bias2 = s.sum.weight2 + hidden * columns * WIDTH;
    for (int64_t x = 0; x < SPAN && b->mode == ATTENTION; x++) {
        for (int64_t h = 0; h < hidden && t->part == WHOLE; h++) row_of(p->shift2, h)[x] = t->shift2[h];
        for (int64_t c = 0; c < columns; c++) row_of(p->bias2, c)[x] = t->bias2[c / share * t->lanes + c % share];
    }
    for (int64_t slot, unit; (slot = next_slot(b)) >= 0; end_slot(b, &s, slot))
        for (unit = slot; unit < t->batch * bands_now(b); unit += b->slots) {
            const struct band band = band_of(b, unit);
            planes_band(b, &s, band.image, band.top, band.bottom);
        }
    free(memory);
}

#endif
