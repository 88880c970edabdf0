/* Footprint attention backwards, and the batch statistics of its hidden vectors u = weight1 relu(norm1(delta)), the
 * input of norm2, with their backward. The patchwise form, which has one hidden vector for a pixel, comes in two parts,
 * whose gradients pass each other a map; its statistics are those of that map.
 *
 * Everything of size k x k is computed again, one pixel (patchwise: a few pixels) at a time. Gradients of neighbours
 * are added where they belong, so threads must not meet: the rows of an image are cut into bands at least twice as high
 * as a footprint reaches, and the even bands are worked on before the odd ones. Gradients of parameters are summed in
 * `slots`, each with a fixed share of the bands. Nothing therefore depends on the number of threads or their timing.
 * Layers whose channels fill no vector have loops of their own: planes_backward.h.
 */
#include "footprint.h"

enum mode { ATTENTION, STATISTICS, STATISTICS_BACKWARD };

struct backward {
    struct task task;
    int64_t mode;                        /* an enum mode: FROM_HIDDEN, ATTENTION; TO_HIDDEN, STATISTICS_BACKWARD */
    int64_t inputs, inputs_padded;       /* inputs_padded: to whole vectors */
    int64_t slots, parameters;           /* parameters: elements of a slot */
    int64_t band, odd;                   /* rows of a band; whether the odd ones are worked on */
    struct matrix gradient;              /* of the output, [pixels][out]; STATISTICS_BACKWARD: [2][hidden], where
                                            d loss / d u = gradient[0] + gradient[1] * u */
    struct matrix weight1_t, weight2_t;  /* [hidden_used][inputs_padded], [columns][hidden] */
    struct matrix d_between;             /* [pixels][hidden_used]: given TO_HIDDEN, written FROM_HIDDEN */
    struct matrix d_query, d_key;        /* [pixels][rel], rows padded to whole vectors unless task.planes */
    struct matrix d_value;               /* [pixels][out] */
    struct matrix d_place;               /* [pixels][2]: one for each image; or NULL */
    float *d_parameters;                 /* [slots][parameters]: of scale1, shift1, weight1, shift2, weight2, bias2 */
    double *sums;                        /* STATISTICS: [slots][2][hidden], sums of u and of u * u */
};

struct gradients { /* of the parameters, by a slot */
    float *scale1, *shift1, *shift2, *bias2;
    struct matrix weight1, weight2;
};

INLINE struct gradients gradients_of(const struct backward *b, int64_t slot) {
    const struct task *t = &b->task;
    struct gradients g;
    g.scale1 = b->d_parameters + slot * b->parameters;
    g.shift1 = g.scale1 + b->inputs_padded;
    g.weight1 = (struct matrix){g.shift1 + b->inputs_padded, t->hidden};
    g.shift2 = row_of(g.weight1, b->inputs);
    g.weight2 = (struct matrix){g.shift2 + t->hidden, t->lanes * (t->form == PATCHWISE ? t->kernel * t->kernel : 1)};
    g.bias2 = row_of(g.weight2, t->hidden_used);
    return g;
}

struct band {
    int64_t image, top, bottom; /* rows */
};

/* Bands of an image that are worked on now. */
INLINE int64_t bands_now(const struct backward *b) {
    return ((b->task.height + b->band - 1) / b->band + 1 - b->odd) / 2;
}

INLINE struct band band_of(const struct backward *b, int64_t unit) {
    const int64_t bands = bands_now(b), top = (2 * (unit % bands) + b->odd) * b->band, bottom = top + b->band;
    return (struct band){unit / bands, top, bottom < b->task.height ? bottom : b->task.height};
}

/* A slot that no thread has taken, or -1. */
INLINE int64_t next_slot(struct backward *b) {
    const int64_t slot = __atomic_fetch_add(&b->task.next, 1, __ATOMIC_RELAXED);
    return slot < b->slots ? slot : -1;
}

#include "planes_backward.h"

struct scratch { /* what is [lines] has a line for each tap of a pixel, patchwise for each of a few pixels */
    struct matrix related, d_related, middle, d_middle; /* [lines][inputs], [lines][hidden] */
    struct matrix weights, d_weights;                   /* [lines][columns] */
    float *factor;                                      /* [lanes] */
    float *zero;                                        /* as wide as any product */
    int64_t *neighbours;                                /* [lines][taps], pairwise [taps]; numbers in the image */
    struct gradients d;                                 /* of the slot */
    double *sums;
};

/* c += a^T b: [rows][columns] from [inner][rows] and [inner][columns] */
static void accumulate(int64_t rows, struct matrix a, struct matrix b, int64_t inner, struct matrix c,
                       int64_t columns) {
    multiply_transposed(rows, a, b, inner, c, c, columns, 0);
}

/* Gradients of the weights of one neighbour and of its value. */
INLINE void weighted_sum_backward(const float *restrict weight, const float *restrict gradient,
                                  const float *restrict value, int64_t lanes, int64_t out, float *restrict d_weight,
                                  float *restrict d_value) {
    const int64_t whole = out - out % WIDTH;
    for (int64_t l = 0; l < lanes; l += WIDTH) {
        const vec w = at(weight + l);
        vec d_w = {0};
        for (int64_t c = l; c < whole; c += lanes) {
            const vec g = at(gradient + c);
            d_w += g * at(value + c);
            *(vec *)(d_value + c) += g * w;
        }
        *(vec *)(d_weight + l) = d_w;
    }
    for (int64_t c = whole; c < out; c++) {
        d_weight[c % lanes] += gradient[c] * value[c];
        d_value[c] += gradient[c] * weight[c % lanes];
    }
}

/* Sets to zero what the ReLU stopped, and adds the rest up: `sum` gets the gradient of what was added before it. */
INLINE void relu_backward(int64_t rows, int64_t columns, struct matrix after, struct matrix gradient, float *sum) {
    for (int64_t c = 0; c < columns; c += WIDTH) {
        vec total = at(sum + c);
        for (int64_t m = 0; m < rows; m++) {
            vec *g = (vec *)(row_of(gradient, m) + c);
            *g = positive_backward(at(row_of(after, m) + c), *g);
            total += *g;
        }
        *(vec *)(sum + c) = total;
    }
}

/* Sums of the hidden vectors and their squares; or, given how the loss depends on those sums, on the vectors. */
INLINE void statistics(const struct backward *b, int64_t rows, struct scratch *s) {
    const int64_t hidden = b->task.hidden;
    const struct matrix middle = s->middle, d_middle = s->d_middle, gradient = b->gradient;
    for (int64_t h = 0; h < hidden; h += WIDTH) {
        /* of differences from one of the vectors: float32 has no digits for the variance beside a large mean */
        const vec centre = at(middle.at + h);
        vec sum = {0}, squares = {0};
        for (int64_t m = 0; m < rows; m++) {
            const vec u = at(row_of(middle, m) + h), v = u - centre;
            if (b->mode == STATISTICS) sum += v, squares += v * v;
            else *(vec *)(row_of(d_middle, m) + h) =
                     at(row_of(gradient, 0) + h) + at(row_of(gradient, 1) + h) * u;
        }
        if (b->mode == STATISTICS)
            for (int64_t l = 0; l < WIDTH; l++) {
                const double c = centre[l];
                s->sums[h + l] += rows * c + sum[l];
                s->sums[hidden + h + l] += rows * c * c + 2 * c * sum[l] + squares[l];
            }
    }
}

/* Pixel number `spot` of an image that begins at pixel number `first` of the batch. */
static void pairwise_pixel(const struct backward *b, int64_t first, int64_t spot, struct scratch *s) {
    const struct task *t = &b->task;
    /* once: whatever is written to might be one of them */
    const struct matrix related = s->related, d_related = s->d_related, middle = s->middle, d_middle = s->d_middle;
    const struct matrix weights = s->weights, d_weights = s->d_weights, d_query = b->d_query, d_key = b->d_key;
    const struct matrix query = t->query, key = t->key, value = t->value, d_value = b->d_value;
    const struct matrix place = t->place, d_place = b->d_place;
    const int64_t taps = t->kernel * t->kernel, here = first + spot, lanes = t->lanes, hidden = t->hidden;
    const float *q = row_of(query, here), *p_i = place.at ? row_of(place, spot) : NULL;
    find_neighbours(t, spot, s->neighbours);
    for (int64_t o = 0; o < taps; o++) {
        const int64_t there = s->neighbours[o];
        relate(t, (enum pairwise_relation)t->relation, q, row_of(key, first + there), p_i,
               p_i ? row_of(place, there) : NULL, row_of(related, o));
    }
    if (b->mode == ATTENTION) {
        multiply_relu(taps, related, t->weight1, b->inputs, one_row(t->shift2), middle, hidden);
        multiply(taps, middle, t->weight2, t->hidden_used, one_row(t->bias2), weights, lanes);
        softmax(weights, taps, lanes, s->factor);
        for (int64_t o = 0; o < taps; o++) {
            float *w = row_of(weights, o);
            for (int64_t l = 0; l < lanes; l += WIDTH) *(vec *)(w + l) *= at(s->factor + l);
            const int64_t there = first + s->neighbours[o];
            weighted_sum_backward(w, row_of(b->gradient, here), row_of(value, there), lanes, t->out,
                                  row_of(d_weights, o), row_of(d_value, there));
        }
        for (int64_t l = 0; l < lanes; l += WIDTH) { /* through the softmax: dl = w (dw - sum w dw) */
            vec dot = {0}, total = at(s->d.bias2 + l);
            for (int64_t o = 0; o < taps; o++) dot += at(row_of(weights, o) + l) * at(row_of(d_weights, o) + l);
            for (int64_t o = 0; o < taps; o++) {
                vec *g = (vec *)(row_of(d_weights, o) + l);
                *g = at(row_of(weights, o) + l) * (*g - dot);
                total += *g;
            }
            *(vec *)(s->d.bias2 + l) = total;
        }
        accumulate(t->hidden_used, middle, d_weights, taps, s->d.weight2, lanes);
        multiply(taps, d_weights, b->weight2_t, lanes, one_row(s->zero), d_middle, hidden);
        relu_backward(taps, hidden, middle, d_middle, s->d.shift2);
    } else {
        multiply(taps, related, t->weight1, b->inputs, one_row(s->zero), middle, hidden);
        statistics(b, taps, s);
        if (b->mode == STATISTICS) return;
    }
    accumulate(b->inputs, related, d_middle, taps, s->d.weight1, hidden);
    multiply(taps, d_middle, b->weight1_t, t->hidden_used, one_row(s->zero), d_related, b->inputs_padded);
    for (int64_t o = 0; o < taps; o++) {
        const int64_t there = s->neighbours[o];
        relate_backward(t, q, row_of(key, first + there), p_i, p_i ? row_of(place, there) : NULL,
                        row_of(related, o), row_of(d_related, o), row_of(d_query, here),
                        row_of(d_key, first + there), p_i ? row_of(d_place, here) : NULL,
                        p_i ? row_of(d_place, first + there) : NULL, s->d.scale1, s->d.shift1);
    }
}

/* From the hidden vectors, of `count` pixels from number `spot` of an image that begins at pixel number `first` of the
 * batch: gradients of relu(norm2(u)), weight2, bias2 and the values.
 */
static void from_hidden_backward(const struct backward *b, int64_t first, int64_t spot, int64_t count,
                                 struct scratch *s) {
    const struct task *t = &b->task;
    /* once: whatever is written to might be one of them */
    const struct matrix middle = s->middle, d_middle = s->d_middle, weights = s->weights, d_weights = s->d_weights;
    const struct matrix value = t->value, d_value = b->d_value;
    const int64_t taps = t->kernel * t->kernel, here = first + spot, lanes = t->lanes, columns = taps * lanes;
    copy_rows(count, rows_from(t->between, here), middle, t->hidden_used);
    multiply(count, middle, t->weight2, t->hidden_used, one_row(t->bias2), weights, columns);
    for (int64_t m = 0; m < count; m++) {
        find_neighbours(t, spot + m, s->neighbours);
        for (int64_t o = 0; o < taps; o++) {
            const int64_t there = first + s->neighbours[o];
            weighted_sum_backward(row_of(weights, m) + o * lanes, row_of(b->gradient, here + m), row_of(value, there),
                                  lanes, t->out, row_of(d_weights, m) + o * lanes, row_of(d_value, there));
        }
    }
    for (int64_t j = 0; j < columns; j += WIDTH)
        for (int64_t m = 0; m < count; m++) *(vec *)(s->d.bias2 + j) += at(row_of(d_weights, m) + j);
    accumulate(t->hidden_used, middle, d_weights, count, s->d.weight2, columns);
    multiply(count, d_weights, b->weight2_t, columns, one_row(s->zero), d_middle, t->hidden);
    copy_rows(count, d_middle, rows_from(b->d_between, here), t->hidden_used);
}

/* To the hidden vectors u, of pixels as above: given the gradient of u, those of norm1, weight1, queries and keys. */
static void to_hidden_backward(const struct backward *b, int64_t first, int64_t spot, int64_t count, struct scratch *s) {
    const struct task *t = &b->task;
    /* once: whatever is written to might be one of them */
    const struct matrix related = s->related, d_related = s->d_related, d_middle = s->d_middle;
    const struct matrix query = t->query, key = t->key, d_query = b->d_query, d_key = b->d_key;
    const int64_t taps = t->kernel * t->kernel, here = first + spot;
    for (int64_t m = 0; m < count; m++) {
        const float *q = row_of(query, here + m);
        int64_t *there = s->neighbours + m * taps;
        float *d = row_of(related, m);
        find_neighbours(t, spot + m, there);
        relate_centre(t, q, d);
        d += t->centre;
        for (int64_t o = 0; o < taps; o++, d += t->tap) relate_tap(t, q, row_of(key, first + there[o]), o, d);
    }
    copy_rows(count, rows_from(b->d_between, here), d_middle, t->hidden_used);
    accumulate(b->inputs, related, d_middle, count, s->d.weight1, t->hidden);
    multiply(count, d_middle, b->weight1_t, t->hidden_used, one_row(s->zero), d_related, b->inputs_padded);
    for (int64_t m = 0; m < count; m++) {
        const float *q = row_of(query, here + m), *d = row_of(related, m), *g = row_of(d_related, m);
        float *d_q = row_of(d_query, here + m);
        relate_centre_backward(t, q, d, g, d_q, s->d.scale1, s->d.shift1);
        for (int64_t o = 0; o < taps; o++) {
            const int64_t there = first + s->neighbours[m * taps + o];
            relate_tap_backward(t, q, row_of(key, there), o, d, g, d_q, row_of(d_key, there), s->d.scale1,
                                s->d.shift1);
        }
    }
}

/* Works on slots until none is left. Any number of threads may call this with the same argument. */
static void work_backward(void *argument) {
    struct backward *b = argument;
    struct task *t = &b->task;
    const int64_t taps = t->kernel * t->kernel, patchwise = t->form == PATCHWISE;
    const int64_t together = patchwise ? 4 * ROWS : 1, lines = patchwise ? together : taps; /* of the products */
    const int64_t columns = patchwise ? taps * t->lanes : t->lanes;
    const size_t related = 4 * (lines * b->inputs_padded + 2 * WIDTH), middle = 4 * lines * t->hidden;
    const size_t weights = 4 * lines * columns, neighbours = 8 * together * taps;
    size_t zero = t->hidden > b->inputs_padded ? t->hidden : b->inputs_padded;
    zero = 4 * (zero > (size_t)t->lanes ? zero : (size_t)t->lanes);
    const size_t all = 2 * (related + middle + weights) + 4 * t->lanes + zero + neighbours + 10 * 64;
    char *memory = calloc(1, all), *from = memory;
    if (!memory) {
        t->failed = NO_MEMORY;
        return;
    }
    from += 64 - (uintptr_t)from % 64;
    struct scratch s = {0};
    s.related = take_matrix(&from, related, b->inputs_padded);
    s.d_related = take_matrix(&from, related, b->inputs_padded);
    s.middle = take_matrix(&from, middle, t->hidden);
    s.d_middle = take_matrix(&from, middle, t->hidden);
    s.weights = take_matrix(&from, weights, columns);
    s.d_weights = take_matrix(&from, weights, columns);
    s.factor = take(&from, 4 * t->lanes);
    s.zero = take(&from, zero);
    s.neighbours = take(&from, neighbours);
    for (int64_t slot; (slot = next_slot(b)) >= 0;) {
        if (b->mode == STATISTICS) s.sums = b->sums + 2 * slot * t->hidden;
        else s.d = gradients_of(b, slot);
        for (int64_t unit = slot; unit < t->batch * bands_now(b); unit += b->slots) {
            const struct band band = band_of(b, unit);
            const int64_t first = band.image * t->height * t->width, end = band.bottom * t->width;
            for (int64_t spot = band.top * t->width; spot < end; spot += together) {
                const int64_t count = end - spot < together ? end - spot : together;
                if (!patchwise) pairwise_pixel(b, first, spot, &s);
                else if (t->part == TO_HIDDEN) to_hidden_backward(b, first, spot, count, &s);
                else from_hidden_backward(b, first, spot, count, &s);
            }
        }
    }
    free(memory);
}

/* The even bands, then the odd ones; on `threads` threads. */
void san_backward_run(struct backward *b, parallel_function parallel, unsigned threads) {
    const int in_parts = b->task.part != WHOLE; /* as the patchwise form is */
    if (!is_known(&b->task) || in_parts != (b->task.form == PATCHWISE) || b->mode < ATTENTION
        || b->mode > STATISTICS_BACKWARD) {
        b->task.failed = UNKNOWN_CODE;
        return;
    }
    for (b->odd = 0; b->odd < 2; b->odd++) {
        b->task.next = 0;
        run(b->task.planes ? work_planes_backward : work_backward, b, parallel, threads);
    }
}

int64_t san_backward_bytes(void) { return sizeof(struct backward); }
