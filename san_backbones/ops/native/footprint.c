/* Footprint attention forwards. */
#include "footprint.h"

/* ---- the weighted sum ---- */

/* What is left to do to the sum over the footprint. */
struct finish {
    const float *factor, *shift; /* of the weights, [lanes]; of the output, [out], with ReLU, or NULL */
};

INLINE void store(const struct finish *f, int64_t c, int64_t lane, vec sum, float *output) {
    sum *= at(f->factor + lane);
    *(vec *)(output + c) = f->shift ? positive(sum + at(f->shift + c)) : sum;
}

/* output[c] = factor[c mod lanes] * sum_o weights[o][c mod lanes] * value(o)[c] */
static void weighted_sum(const float *weights, const float *const *values, int64_t area, int64_t lanes, int64_t out,
                         const struct finish *f, float *output) {
    int64_t c = 0;
    for (; c + 4 * WIDTH <= out; c += 4 * WIDTH) {
        vec sum[4] = {{0}, {0}, {0}, {0}};
        int64_t lane[4];
        for (int b = 0; b < 4; b++) lane[b] = (c + b * WIDTH) % lanes;
        if (lanes == WIDTH) /* one vector of weights serves several of values */
            for (int64_t o = 0; o < area; o++) {
                const vec w = at(weights + o * WIDTH);
                for (int b = 0; b < 4; b++) sum[b] += w * at(values[o] + c + b * WIDTH);
            }
        else
            for (int64_t o = 0; o < area; o++)
                for (int b = 0; b < 4; b++) sum[b] += at(weights + o * lanes + lane[b]) * at(values[o] + c + b * WIDTH);
        for (int b = 0; b < 4; b++) store(f, c + b * WIDTH, lane[b], sum[b], output);
    }
    for (; c + WIDTH <= out; c += WIDTH) {
        vec sum = {0};
        for (int64_t o = 0; o < area; o++) sum += at(weights + o * lanes + c % lanes) * at(values[o] + c);
        store(f, c, c % lanes, sum, output);
    }
    for (; c < out; c++) {
        float sum = 0;
        for (int64_t o = 0; o < area; o++) sum += weights[o * lanes + c % lanes] * values[o][c];
        sum *= f->factor[c % lanes];
        output[c] = f->shift ? relu(sum + f->shift[c]) : sum;
    }
}

struct scratch {
    float *related, *middle, *weights, *factor;
    const float **keys, **values, **places;
};

/* The neighbours of pixel number `here` of the batch. */
INLINE void find_neighbours(const struct task *t, int64_t here, const float **keys, const float **values,
                            const float **places) {
    const int64_t pixels = t->height * t->width, first = here / pixels * pixels;
    const int64_t y = (here - first) / t->width, x = (here - first) % t->width;
    for (int64_t a = 0, o = 0; a < t->kernel; a++) {
        const int64_t line = t->rows[y + a * t->dilation] * t->width;
        for (int64_t b = 0; b < t->kernel; b++, o++) {
            const int64_t there = line + t->columns[x + b * t->dilation];
            keys[o] = t->key + (first + there) * t->key_row;
            values[o] = t->value + (first + there) * t->value_row;
            places[o] = t->place ? t->place + there * 2 : NULL;
        }
    }
}

/* ---- pairwise ---- */

INLINE int64_t pairwise_row(const struct task *t) { return 2 * t->rel + 3; } /* of `related` */

/* `count` pixels from number `here` of the batch: their pairs are the rows of one product. */
INLINE void pairwise_pixels(const struct task *t, const int relation, int64_t here, int64_t count, struct scratch *s) {
    const int64_t area = t->kernel * t->kernel, row = pairwise_row(t), pixels = t->height * t->width;
    const struct finish finish = {s->factor, t->shift};
    int64_t inputs = 0;
    for (int64_t m = 0; m < count; m++) {
        const float *q = t->query + (here + m) * t->query_row;
        const float *p_i = t->place ? t->place + 2 * ((here + m) % pixels) : NULL;
        find_neighbours(t, here + m, s->keys, s->values + m * area, s->places);
        for (int64_t o = 0; o < area; o++)
            inputs = relate(t, relation, q, s->keys[o], p_i, s->places[o], s->related + (m * area + o) * row);
    }
    multiply_relu(count * area, (struct left){s->related, row, 1}, t->weight1, t->hidden, inputs, t->shift2, 0,
                  s->middle, t->hidden, t->hidden);
    multiply(count * area, (struct left){s->middle, t->hidden, 1}, t->weight2, t->lanes, t->hidden_used, t->bias2, 0,
             s->weights, t->lanes, t->lanes);
    for (int64_t m = 0; m < count; m++) {
        float *weights = s->weights + m * area * t->lanes;
        softmax(weights, area, t->lanes, s->factor);
        weighted_sum(weights, s->values + m * area, area, t->lanes, t->out, &finish, t->output + (here + m) * t->out);
    }
}

/* ---- patchwise ---- */

/* Neighbours whose channels are multiplied with weight1 together, so that these and their weights stay in cache. */
INLINE int64_t patchwise_group(const struct task *t) {
    const int64_t area = t->kernel * t->kernel, group = t->relation == PATCH_STAR ? area : 512 / t->rel;
    return group < 1 ? 1 : group < area ? group : area;
}

INLINE int64_t patchwise_row(const struct task *t) { /* of `related` */
    return t->relation == PATCH_STAR ? patchwise_group(t) : (patchwise_group(t) + 1) * t->rel;
}

INLINE void patchwise_pixels(const struct task *t, int64_t here, int64_t count, struct scratch *s) {
    const int64_t area = t->kernel * t->kernel, columns = area * t->lanes, row = patchwise_row(t);
    const int64_t group = patchwise_group(t), hidden = t->hidden;
    const struct finish finish = {s->factor, t->shift};
    for (int64_t m = 0; m < count; m++)
        find_neighbours(t, here + m, s->keys + m * area, s->values + m * area, s->places + m * area);
    for (int64_t first = 0, done = 0; first < area; first += group) {
        const int64_t last = first + group < area ? first + group : area;
        int64_t inputs = 0;
        for (int64_t m = 0; m < count; m++) {
            const float *q = t->query + (here + m) * t->query_row;
            float *d = s->related + m * row;
            inputs = first ? 0 : relate_centre(t, q, d);
            for (int64_t o = first; o < last; o++)
                inputs += relate_neighbour(t, q, s->keys[m * area + o], o, d + inputs);
        }
        const float *start = first ? s->middle : t->shift2, *weight = t->weight1 + done * hidden;
        const struct left related = {s->related, row, 1};
        (last < area ? multiply : multiply_relu)(count, related, weight, hidden, inputs, start, first ? hidden : 0,
                                                 s->middle, hidden, hidden);
        done += inputs;
    }
    multiply(count, (struct left){s->middle, hidden, 1}, t->weight2, columns, t->hidden_used, t->bias2, 0, s->weights,
             columns, columns);
    for (int64_t m = 0; m < count; m++)
        weighted_sum(s->weights + m * columns, s->values + m * area, area, t->lanes, t->out, &finish,
                     t->output + (here + m) * t->out);
}

/* ---- threads ---- */

/* Works on pixels until none is left. Any number of threads may call this with the same task. */
static void work(void *argument) {
    struct task *t = argument;
    const int64_t pairwise = form_of(t->relation) == PAIRWISE, all = t->batch * t->height * t->width;
    const size_t lines = t->together * (pairwise ? t->kernel * t->kernel : 1); /* of the products */
    const size_t related = 4 * (lines * (pairwise ? pairwise_row(t) : patchwise_row(t)) + 2 * WIDTH);
    const size_t middle = 4 * lines * t->hidden, neighbours = t->together * t->kernel * t->kernel;
    const size_t weights = 4 * neighbours * t->lanes, factor = 4 * t->lanes, pointers = neighbours * sizeof(float *);
    char *memory = malloc(related + middle + weights + factor + 3 * pointers + 8 * 64), *from = memory;
    if (!memory) {
        t->failed = NO_MEMORY;
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
        const int64_t here = __atomic_fetch_add(&t->next, t->together, __ATOMIC_RELAXED);
        if (here >= all) break;
        const int64_t count = all - here < t->together ? all - here : t->together;
        switch (t->relation) {
            case SUBTRACTION: pairwise_pixels(t, SUBTRACTION, here, count, &s); break;
            case SUMMATION: pairwise_pixels(t, SUMMATION, here, count, &s); break;
            case HADAMARD: pairwise_pixels(t, HADAMARD, here, count, &s); break;
            case CONCATENATION: pairwise_pixels(t, CONCATENATION, here, count, &s); break;
            case DOT: pairwise_pixels(t, DOT, here, count, &s); break;
            case PATCH_CONCATENATION: case PATCH_STAR: patchwise_pixels(t, here, count, &s); break;
        }
    }
    free(memory);
}

void san_run(struct task *t, parallel_function parallel, unsigned threads) {
    if (form_of(t->relation) == UNKNOWN) {
        t->failed = UNKNOWN_CODE;
        return;
    }
    /* Several pixels share a pass over gamma's weights: few with large footprints, whose pairs fill register blocks and
     * the cache; no more than leave every thread something to do. */
    const int64_t pairs = form_of(t->relation) == PAIRWISE ? t->kernel * t->kernel : 1, pixels = t->height * t->width;
    const int64_t most = (pairs > 1 ? 8 * ROWS : 4 * ROWS) / pairs, share = t->batch * pixels / threads;
    t->together = share < most ? share : most;
    if (t->together < 1) t->together = 1;
    run(work, t, parallel, threads);
}

/* Attention weights and the middle of gamma come in multiples of this. */
int64_t san_width(void) { return WIDTH; }

int64_t san_bytes(void) { return sizeof(struct task); }
