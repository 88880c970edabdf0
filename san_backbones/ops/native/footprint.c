/* Footprint attention forwards. */
#include "linear.h"
#include "planes.h"

/* ---- the weighted sum ---- */

/* What is left to do to the sum over the footprint. */
struct finish {
    const float *factor, *shift; /* of the weights, [lanes]; of the output, [out], with ReLU, or NULL */
};

INLINE void store(const struct finish *f, int64_t c, int64_t lane, vec sum, float *output) {
    sum *= at(f->factor + lane);
    *(vec *)(output + c) = f->shift ? positive(sum + at(f->shift + c)) : sum;
}

/* output[c] = factor[c mod lanes] * sum_o weights[o][c mod lanes] * values[o][c]; weights: [taps][lanes] */
static void weighted_sum(const float *weights, const float *const *values, int64_t taps, int64_t lanes, int64_t out,
                         const struct finish *f, float *output) {
    int64_t c = 0;
    for (; c + 4 * WIDTH <= out; c += 4 * WIDTH) {
        vec sum[4] = {{0}, {0}, {0}, {0}};
        int64_t lane[4];
        for (int b = 0; b < 4; b++) lane[b] = (c + b * WIDTH) % lanes;
        if (lanes == WIDTH) /* one vector of weights serves several of values */
            for (int64_t o = 0; o < taps; o++) {
                const vec w = at(weights + o * WIDTH);
                for (int b = 0; b < 4; b++) sum[b] += w * at(values[o] + c + b * WIDTH);
            }
        else
            for (int64_t o = 0; o < taps; o++)
                for (int b = 0; b < 4; b++) sum[b] += at(weights + o * lanes + lane[b]) * at(values[o] + c + b * WIDTH);
        for (int b = 0; b < 4; b++) store(f, c + b * WIDTH, lane[b], sum[b], output);
    }
    for (; c + WIDTH <= out; c += WIDTH) {
        vec sum = {0};
        for (int64_t o = 0; o < taps; o++) sum += at(weights + o * lanes + c % lanes) * at(values[o] + c);
        store(f, c, c % lanes, sum, output);
    }
    for (; c < out; c++) {
        float sum = 0;
        for (int64_t o = 0; o < taps; o++) sum += weights[o * lanes + c % lanes] * values[o][c];
        sum *= f->factor[c % lanes];
        output[c] = f->shift ? relu(sum + f->shift[c]) : sum;
    }
}

struct scratch { /* of `together` pixels; what is [lines] has a line for each pair, patchwise for each pixel */
    struct matrix related, middle; /* [lines][inputs], patchwise those of a group of taps; [lines][hidden] */
    struct matrix weights;         /* [lines][columns] */
    float *factor;                 /* [lanes] */
    int64_t *neighbours;           /* [together * taps] */
    const float **values;          /* [together * taps] */
    uint8_t *rounded;              /* in 8 bits, [lines][rounded_row]; and what makes numbers of them, [lines] */
    float *scale, *zero;
};

/* The numbers, within the image, of the neighbours of pixel number `here` of the batch, and where their values are. */
INLINE void find_values(const struct task *t, int64_t here, int64_t taps, int64_t *there, const float **values) {
    const int64_t pixels = t->height * t->width, first = here / pixels * pixels;
    find_neighbours(t, here - first, there);
    for (int64_t o = 0; o < taps; o++) values[o] = row_of(t->value, first + there[o]);
}

#if defined(__AVX512F__)
/* What `product` makes of the lines of a, which a ReLU gave, in 8 bits: to c. */
static void multiply8(const struct linear *product, int64_t lines, struct matrix a, struct scratch *s, struct matrix c) {
    const int64_t row = rounded_row(product);
    for (int64_t m = 0; m < lines; m++)
        quantise(product, 1, row_of(a, m), NULL, s->rounded + m * row, s->scale + m, s->zero + m);
    linear8(product, lines, s->rounded, row, s->scale, s->zero, c, 0, product->columns);
}
#endif

/* ---- pairwise ---- */

/* Elements from one row of `related` to the next: no fewer than `inputs` of any relation. */
INLINE int64_t pairwise_row(const struct task *t) { return 2 * t->rel + 3; }

/* `count` pixels from number `here` of the batch: their pairs are the lines of one product. */
INLINE void pairwise_pixels(const struct task *t, const enum pairwise_relation relation, int64_t here, int64_t count,
                            struct scratch *s) {
    const int64_t taps = t->kernel * t->kernel, pixels = t->height * t->width;
    const int64_t inputs = t->centre + t->tap + (t->place.at ? 2 : 0);
    const struct finish finish = {s->factor, t->shift};
    for (int64_t m = 0; m < count; m++) {
        const int64_t first = (here + m) / pixels * pixels;
        const float *q = row_of(t->query, here + m);
        const float *p_i = t->place.at ? row_of(t->place, here + m - first) : NULL;
        find_values(t, here + m, taps, s->neighbours, s->values + m * taps);
        for (int64_t o = 0; o < taps; o++)
            relate(t, relation, q, row_of(t->key, first + s->neighbours[o]), p_i,
                   p_i ? row_of(t->place, s->neighbours[o]) : NULL, row_of(s->related, m * taps + o));
    }
    const int64_t pairs = count * taps;
#if defined(__AVX512F__)
    if (t->eight) {
        multiply8(t->eight, pairs, s->related, s, s->middle);
        multiply8(t->eight + 1, pairs, s->middle, s, s->weights);
    } else
#endif
    {
        multiply_relu(pairs, s->related, t->weight1, inputs, one_row(t->shift2), s->middle, t->hidden);
        multiply(pairs, s->middle, t->weight2, t->hidden_used, one_row(t->bias2), s->weights, t->lanes);
    }
    for (int64_t m = 0; m < count; m++) {
        const struct matrix weights = rows_from(s->weights, m * taps);
        softmax(weights, taps, t->lanes, s->factor);
        weighted_sum(weights.at, s->values + m * taps, taps, t->lanes, t->out, &finish, row_of(t->output, here + m));
    }
}

/* ---- patchwise ---- */

/* Neighbours whose channels are multiplied with weight1 together, so that these and their weights stay in cache. */
INLINE int64_t patchwise_group(const struct task *t) {
    if (t->eight) return (t->eight->inner - t->centre) / t->tap;
    const int64_t taps = t->kernel * t->kernel, group = t->tap ? 512 / t->tap : taps;
    return group < 1 ? 1 : group < taps ? group : taps;
}

INLINE int64_t patchwise_groups(const struct task *t) {
    const int64_t taps = t->kernel * t->kernel, group = patchwise_group(t);
    return (taps + group - 1) / group;
}

/* As pairwise_row. */
INLINE int64_t patchwise_row(const struct task *t) { return t->centre + patchwise_group(t) * t->tap; }

/* The products of a group of taps with weight1, added up in `middle`, with the ReLU after the last; and those with
 * weight2. */
INLINE void patchwise_middle(const struct task *t, int64_t count, int64_t begin, int64_t done, int64_t inputs, int last,
                             struct scratch *s) {
#if defined(__AVX512F__)
    if (t->eight) {
        multiply8(t->eight + begin / patchwise_group(t), count, s->related, s, s->middle);
        return;
    }
#endif
    (last ? multiply_relu : multiply)(count, s->related, rows_from(t->weight1, done), inputs,
                                      begin ? s->middle : one_row(t->shift2), s->middle, t->hidden);
}

INLINE void patchwise_weights(const struct task *t, int64_t count, struct scratch *s) {
#if defined(__AVX512F__)
    if (t->eight) {
        multiply8(t->eight + patchwise_groups(t), count, s->middle, s, s->weights);
        return;
    }
#endif
    multiply(count, s->middle, t->weight2, t->hidden_used, one_row(t->bias2), s->weights, t->kernel * t->kernel * t->lanes);
}

/* The middle of gamma, of pixels whose neighbours have been found. */
INLINE void patchwise_hidden(const struct task *t, int64_t here, int64_t count, struct scratch *s) {
    const int64_t taps = t->kernel * t->kernel, group = patchwise_group(t), pixels = t->height * t->width;
    for (int64_t begin = 0, done = 0; begin < taps; begin += group) {
        const int64_t end = begin + group < taps ? begin + group : taps, centre = begin ? 0 : t->centre;
        const int64_t inputs = centre + (end - begin) * t->tap;
        for (int64_t m = 0; m < count; m++) {
            const int64_t first = (here + m) / pixels * pixels;
            const float *q = row_of(t->query, here + m);
            float *d = row_of(s->related, m);
            if (!begin) relate_centre(t, q, d);
            d += centre;
            for (int64_t o = begin; o < end; o++, d += t->tap)
                relate_tap(t, q, row_of(t->key, first + s->neighbours[m * taps + o]), o, d);
        }
        patchwise_middle(t, count, begin, done, inputs, end == taps && t->part == WHOLE, s);
        done += inputs;
    }
}

INLINE void patchwise_pixels(const struct task *t, int64_t here, int64_t count, struct scratch *s) {
    const int64_t taps = t->kernel * t->kernel, pixels = t->height * t->width;
    const struct finish finish = {s->factor, t->shift};
    if (t->part == TO_HIDDEN) {
        for (int64_t m = 0; m < count; m++) find_neighbours(t, (here + m) % pixels, s->neighbours + m * taps);
        patchwise_hidden(t, here, count, s);
        copy_rows(count, s->middle, rows_from(t->between, here), t->hidden_used);
        return;
    }
    for (int64_t m = 0; m < count; m++)
        find_values(t, here + m, taps, s->neighbours + m * taps, s->values + m * taps);
    if (t->part == WHOLE) patchwise_hidden(t, here, count, s);
    else copy_rows(count, rows_from(t->between, here), s->middle, t->hidden_used);
    patchwise_weights(t, count, s);
    for (int64_t m = 0; m < count; m++)
        weighted_sum(row_of(s->weights, m), s->values + m * taps, taps, t->lanes, t->out, &finish,
                     row_of(t->output, here + m));
}

/* ---- threads ---- */

/* Works on pixels until none is left. Any number of threads may call this with the same task. */
static void work(void *argument) {
    struct task *t = argument;
    const int64_t pairwise = t->form == PAIRWISE, all = t->batch * t->height * t->width, taps = t->kernel * t->kernel;
    const int64_t row = pairwise ? pairwise_row(t) : patchwise_row(t), columns = (pairwise ? 1 : taps) * t->lanes;
    const size_t lines = t->together * (pairwise ? taps : 1);
    const size_t related = 4 * (lines * row + 2 * WIDTH), middle = 4 * lines * t->hidden, weights = 4 * lines * columns;
    const size_t factor = 4 * t->lanes, neighbours = t->together * taps * sizeof(int64_t);
    const size_t values = t->together * taps * sizeof(float *);
    size_t rounded = 0, scales = 0;
#if defined(__AVX512F__)
    if (t->eight) {
        const int64_t first = rounded_row(t->eight), second = rounded_row(t->eight + (pairwise ? 1 : patchwise_groups(t)));
        rounded = lines * (first > second ? first : second), scales = 4 * lines;
    }
#endif
    char *memory = malloc(related + middle + weights + factor + neighbours + values + rounded + 2 * scales + 11 * 64);
    char *from = memory;
    if (!memory) {
        t->failed = NO_MEMORY;
        return;
    }
    from += 64 - (uintptr_t)from % 64;
    struct scratch s;
    s.related = take_matrix(&from, related, row);
    s.middle = take_matrix(&from, middle, t->hidden);
    s.weights = take_matrix(&from, weights, columns);
    s.factor = take(&from, factor);
    s.neighbours = take(&from, neighbours);
    s.values = take(&from, values);
    s.rounded = take(&from, rounded), s.scale = take(&from, scales), s.zero = take(&from, scales);
    for (int64_t l = 0; l < t->lanes; l++) s.factor[l] = 1;
    for (;;) {
        const int64_t here = __atomic_fetch_add(&t->next, t->together, __ATOMIC_RELAXED);
        if (here >= all) break;
        const int64_t count = all - here < t->together ? all - here : t->together;
        if (!pairwise) {
            patchwise_pixels(t, here, count, &s);
            continue;
        }
        switch ((enum pairwise_relation)t->relation) { /* a copy of the loops for each */
#define COPY(code, name) case code: pairwise_pixels(t, code, here, count, &s); break;
            PAIRWISE_RELATIONS(COPY)
#undef COPY
        }
    }
    free(memory);
}

void san_run(struct task *t, parallel_function parallel, unsigned threads) {
    if (!is_known(t)) {
        t->failed = UNKNOWN_CODE;
        return;
    }
    if (t->planes) {
        run_planes(t, parallel, threads);
        return;
    }
    /* Several pixels share a pass over gamma's weights: few with large footprints, whose pairs fill register blocks and
     * the cache; no more than leave every thread something to do. */
    const int64_t pairs = t->form == PAIRWISE ? t->kernel * t->kernel : 1, pixels = t->height * t->width;
    const int64_t most = (pairs > 1 ? 8 * ROWS : 4 * ROWS) / pairs, share = t->batch * pixels / threads;
    t->together = share < most ? share : most;
    if (t->together < 1) t->together = 1;
    run(work, t, parallel, threads);
}

/* Attention weights and the middle of gamma come in multiples of this. */
int64_t san_width(void) { return WIDTH; }

/* The names of the relations of a form, with blanks between them, in the order of their codes; NULL for no form. */
const char *san_relations(int64_t form) {
#define NAME(code, name) name " "
    return form == PAIRWISE ? PAIRWISE_RELATIONS(NAME) : form == PATCHWISE ? PATCHWISE_RELATIONS(NAME) : NULL;
#undef NAME
}

int64_t san_bytes(void) { return sizeof(struct task); }
