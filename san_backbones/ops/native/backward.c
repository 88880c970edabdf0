/* Footprint attention backwards, and the batch statistics of its hidden vectors u = weight1 relu(norm1(delta)), the
 * input of norm2, with their backward.
 *
 * Everything of size k x k is computed again, one pixel (patchwise: a few pixels) at a time. Gradients of neighbours
 * are added where they belong, so threads must not meet: the rows of an image are cut into bands at least twice as high
 * as a footprint reaches, and the even bands are worked on before the odd ones. Gradients of parameters are summed in
 * `slots`, each with a fixed share of the bands. Nothing therefore depends on the number of threads or their timing.
 */
#include "footprint.h"

enum mode { ATTENTION, STATISTICS, STATISTICS_BACKWARD };

struct backward {
    struct task task;
    int64_t mode, inputs, inputs_padded, rel_padded, slots, parameters, band, odd;
    const float *gradient;              /* of the output; STATISTICS_BACKWARD: d loss / d u = g[0][h] + g[1][h] u[h] */
    const float *weight1_t, *weight2_t; /* [hidden][inputs_padded], [(k * k) lanes][hidden] */
    float *d_query, *d_key, *d_value;   /* of d_query and d_key a pixel has rel_padded numbers */
    float *d_place;                     /* one for each image */
    float *d_parameters;                /* [slots][scale1, shift1, weight1, shift2, weight2, bias2] */
    double *sums;                       /* STATISTICS: [slots][2][hidden], sums of u and of u * u */
};

struct scratch {
    float *related, *d_related, *middle, *d_middle, *weights, *d_weights, *factor, *zero;
    int64_t *neighbours;
    float *d_scale1, *d_shift1, *d_weight1, *d_shift2, *d_weight2, *d_bias2; /* of the slot */
    double *sums;
};

static void product(int64_t rows, const float *a, int64_t a_row, const float *w, int64_t w_row, int64_t inner,
                    const float *zero, float *c, int64_t c_row, int64_t columns) {
    multiply(rows, (struct left){a, a_row, 1}, w, w_row, inner, zero, 0, c, c_row, columns);
}

/* c[i][:] += sum_m a[m][i] b[m][:] */
static void accumulate(int64_t rows, const float *a, int64_t a_row, const float *b, int64_t b_row, int64_t inner,
                       float *c, int64_t c_row, int64_t columns) {
    multiply(rows, (struct left){a, 1, a_row}, b, b_row, inner, c, c_row, c, c_row, columns);
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
INLINE void relu_backward(int64_t rows, int64_t columns, const float *after, float *gradient, float *sum) {
    for (int64_t c = 0; c < columns; c += WIDTH) {
        vec total = *(vec *)(sum + c);
        for (int64_t m = 0; m < rows; m++) {
            vec *g = (vec *)(gradient + m * columns + c);
            *g = positive_backward(*(const vec *)(after + m * columns + c), *g);
            total += *g;
        }
        *(vec *)(sum + c) = total;
    }
}

/* Sums of the hidden vectors and their squares; or, given how the loss depends on those sums, on the vectors. */
INLINE void statistics(const struct backward *b, int64_t rows, struct scratch *s) {
    const int64_t hidden = b->task.hidden;
    for (int64_t h = 0; h < hidden; h += WIDTH) {
        /* of differences from one of the vectors: float32 has no digits for the variance beside a large mean */
        const vec centre = *(vec *)(s->middle + h);
        vec sum = {0}, squares = {0};
        for (int64_t m = 0; m < rows; m++) {
            const vec u = *(vec *)(s->middle + m * hidden + h), v = u - centre;
            if (b->mode == STATISTICS) sum += v, squares += v * v;
            else *(vec *)(s->d_middle + m * hidden + h) =
                     *(const vec *)(b->gradient + h) + *(const vec *)(b->gradient + hidden + h) * u;
        }
        if (b->mode == STATISTICS)
            for (int64_t l = 0; l < WIDTH; l++) {
                const double c = centre[l];
                s->sums[h + l] += rows * c + sum[l];
                s->sums[hidden + h + l] += rows * c * c + 2 * c * sum[l] + squares[l];
            }
    }
}

/* One vector of channels of norm1 and its ReLU: gradient of the relation x, given its positive part d and the gradient
 * g of d. Of the vector `used` channels count, whatever is in the others. */
INLINE vec norm_backward(vec x, int64_t used, const float *d, const float *g, const float *scale, float *d_scale,
                         float *d_shift) {
    ivec counts;
    for (int l = 0; l < WIDTH; l++) counts[l] = -(l < used);
    const vec e = choose(counts, positive_backward(at(d), at(g)), (vec){0});
    *(vec *)d_scale += choose(counts, e * x, (vec){0});
    *(vec *)d_shift += e;
    return choose(counts, e * at(scale), (vec){0});
}

/* For every vector of the r channels that begin at channel `first` of the relation: e, the gradient of x. */
#define CHANNELS_BACKWARD(first, x, update)                                                                        \
    for (int64_t c = 0; c < r; c += WIDTH) {                                                                       \
        const vec e = norm_backward(x, r - c, d + (first) + c, g + (first) + c, t->scale1 + (first) + c,           \
                                    d_scale + (first) + c, d_shift + (first) + c);                                 \
        update;                                                                                                    \
    }
#define ADD(to, x) *(vec *)((to) + c) += (x)

/* One channel that is the dot product of q and k. */
INLINE void dot_backward(const struct task *t, const float *restrict q, const float *restrict k, int64_t channel,
                         float d, float g, float *restrict d_q, float *restrict d_k, float *d_scale, float *d_shift) {
    float x = 0;
    for (int64_t c = 0; c < t->rel; c++) x += q[c] * k[c];
    g = d <= 0 ? 0 : g;
    d_scale[channel] += g * x;
    d_shift[channel] += g;
    g *= t->scale1[channel];
    for (int64_t c = 0; c < t->rel; c++) d_q[c] += g * k[c], d_k[c] += g * q[c];
}

/* d_q and d_k have room for whole vectors. */
INLINE void relate_backward(const struct task *t, const float *restrict q, const float *restrict k, const float *p_i,
                            const float *p_j, const float *restrict d, const float *restrict g,
                            float *restrict d_q, float *restrict d_k, float *d_p_i, float *d_p_j,
                            float *restrict d_scale, float *restrict d_shift) {
    const int64_t r = t->rel;
    int64_t width = r;
    switch (t->relation) {
        case SUBTRACTION: CHANNELS_BACKWARD(0, at(q + c) - at(k + c), ADD(d_q, e); ADD(d_k, -e)); break;
        case SUMMATION: CHANNELS_BACKWARD(0, at(q + c) + at(k + c), ADD(d_q, e); ADD(d_k, e)); break;
        case HADAMARD:
            CHANNELS_BACKWARD(0, at(q + c) * at(k + c), ADD(d_q, e * at(k + c)); ADD(d_k, e * at(q + c)));
            break;
        case CONCATENATION:
            CHANNELS_BACKWARD(0, at(q + c), ADD(d_q, e));
            CHANNELS_BACKWARD(r, at(k + c), ADD(d_k, e));
            width = 2 * r;
            break;
        case DOT:
            dot_backward(t, q, k, 0, d[0], g[0], d_q, d_k, d_scale, d_shift);
            width = 1;
    }
    if (p_j)
        for (int64_t c = 0; c < 2; c++, width++) {
            const float e = d[width] <= 0 ? 0 : g[width], e_p = e * t->scale1[width];
            d_scale[width] += e * (t->absolute ? p_j[c] : p_i[c] - p_j[c]);
            d_shift[width] += e;
            if (t->absolute) d_p_j[c] += e_p;
            else d_p_i[c] += e_p, d_p_j[c] -= e_p;
        }
}

/* Pixel number `pixel` of an image. */
static void pairwise_pixel(const struct backward *b, int64_t image, int64_t pixel, struct scratch *s) {
    const struct task *t = &b->task;
    const int64_t area = t->kernel * t->kernel, first = image * t->height * t->width;
    const int64_t y = pixel / t->width, x = pixel % t->width, here = first + pixel, lanes = t->lanes, hidden = t->hidden;
    const float *q = t->query + here * t->query_row, *p_i = t->place ? t->place + 2 * pixel : NULL;
    for (int64_t a = 0, o = 0; a < t->kernel; a++)
        for (int64_t c = 0; c < t->kernel; c++, o++) {
            const int64_t there = t->rows[y + a * t->dilation] * t->width + t->columns[x + c * t->dilation];
            s->neighbours[o] = there;
            relate(t, t->relation, q, t->key + (first + there) * t->key_row, p_i, t->place ? t->place + 2 * there : NULL,
                   s->related + o * b->inputs_padded);
        }
    const struct left related = {s->related, b->inputs_padded, 1};
    if (b->mode == ATTENTION) {
        multiply_relu(area, related, t->weight1, hidden, b->inputs, t->shift2, 0, s->middle, hidden, hidden);
        multiply(area, (struct left){s->middle, hidden, 1}, t->weight2, lanes, t->hidden_used, t->bias2, 0, s->weights,
                 lanes, lanes);
        softmax(s->weights, area, lanes, s->factor);
        const float *gradient = b->gradient + here * t->out;
        for (int64_t o = 0; o < area; o++) {
            for (int64_t l = 0; l < lanes; l += WIDTH)
                *(vec *)(s->weights + o * lanes + l) *= *(const vec *)(s->factor + l);
            const int64_t there = first + s->neighbours[o];
            weighted_sum_backward(s->weights + o * lanes, gradient, t->value + there * t->value_row, lanes, t->out,
                                  s->d_weights + o * lanes, b->d_value + there * t->out);
        }
        for (int64_t l = 0; l < lanes; l += WIDTH) { /* through the softmax: dl = w (dw - sum w dw) */
            vec dot = {0}, total = *(vec *)(s->d_bias2 + l);
            for (int64_t o = 0; o < area; o++)
                dot += *(vec *)(s->weights + o * lanes + l) * *(vec *)(s->d_weights + o * lanes + l);
            for (int64_t o = 0; o < area; o++) {
                vec *g = (vec *)(s->d_weights + o * lanes + l);
                *g = *(vec *)(s->weights + o * lanes + l) * (*g - dot);
                total += *g;
            }
            *(vec *)(s->d_bias2 + l) = total;
        }
        accumulate(t->hidden_used, s->middle, hidden, s->d_weights, lanes, area, s->d_weight2, lanes, lanes);
        product(area, s->d_weights, lanes, b->weight2_t, hidden, lanes, s->zero, s->d_middle, hidden, hidden);
        relu_backward(area, hidden, s->middle, s->d_middle, s->d_shift2);
    } else {
        multiply(area, related, t->weight1, hidden, b->inputs, s->zero, 0, s->middle, hidden, hidden);
        statistics(b, area, s);
        if (b->mode == STATISTICS) return;
    }
    accumulate(b->inputs, s->related, b->inputs_padded, s->d_middle, hidden, area, s->d_weight1, hidden, hidden);
    product(area, s->d_middle, hidden, b->weight1_t, b->inputs_padded, t->hidden_used, s->zero, s->d_related,
            b->inputs_padded, b->inputs_padded);
    for (int64_t o = 0; o < area; o++) {
        const int64_t there = s->neighbours[o];
        relate_backward(t, q, t->key + (first + there) * t->key_row, p_i, t->place ? t->place + 2 * there : NULL,
                        s->related + o * b->inputs_padded, s->d_related + o * b->inputs_padded, b->d_query + here * b->rel_padded,
                        b->d_key + (first + there) * b->rel_padded, t->place ? b->d_place + 2 * here : NULL,
                        t->place ? b->d_place + 2 * (first + there) : NULL, s->d_scale1, s->d_shift1);
    }
}

/* `count` pixels of an image from number `pixel`. */
static void patchwise_pixels(const struct backward *b, int64_t image, int64_t pixel, int64_t count, struct scratch *s) {
    const struct task *t = &b->task;
    const int64_t area = t->kernel * t->kernel, first = image * t->height * t->width, r = t->rel;
    const int64_t here = first + pixel, lanes = t->lanes, columns = area * lanes, hidden = t->hidden;
    const int64_t star = t->relation == PATCH_STAR, row = b->inputs_padded;
    for (int64_t m = 0; m < count; m++) {
        const float *q = t->query + (here + m) * t->query_row;
        const int64_t y = (pixel + m) / t->width, x = (pixel + m) % t->width;
        float *d = s->related + m * row;
        d += relate_centre(t, q, d);
        for (int64_t a = 0, o = 0; a < t->kernel; a++)
            for (int64_t i = 0; i < t->kernel; i++, o++) {
                const int64_t there = first + t->rows[y + a * t->dilation] * t->width
                                      + t->columns[x + i * t->dilation];
                s->neighbours[m * area + o] = there;
                d += relate_neighbour(t, q, t->key + there * t->key_row, o, d);
            }
    }
    const struct left related = {s->related, row, 1};
    if (b->mode == ATTENTION) {
        multiply_relu(count, related, t->weight1, hidden, b->inputs, t->shift2, 0, s->middle, hidden, hidden);
        multiply(count, (struct left){s->middle, hidden, 1}, t->weight2, columns, t->hidden_used, t->bias2, 0,
                 s->weights, columns, columns);
        for (int64_t m = 0; m < count; m++)
            for (int64_t o = 0; o < area; o++) {
                const int64_t there = s->neighbours[m * area + o];
                weighted_sum_backward(s->weights + m * columns + o * lanes, b->gradient + (here + m) * t->out,
                                      t->value + there * t->value_row, lanes, t->out,
                                      s->d_weights + m * columns + o * lanes, b->d_value + there * t->out);
            }
        for (int64_t j = 0; j < columns; j += WIDTH)
            for (int64_t m = 0; m < count; m++) *(vec *)(s->d_bias2 + j) += *(vec *)(s->d_weights + m * columns + j);
        accumulate(t->hidden_used, s->middle, hidden, s->d_weights, columns, count, s->d_weight2, columns, columns);
        product(count, s->d_weights, columns, b->weight2_t, hidden, columns, s->zero, s->d_middle, hidden, hidden);
        relu_backward(count, hidden, s->middle, s->d_middle, s->d_shift2);
    } else {
        multiply(count, related, t->weight1, hidden, b->inputs, s->zero, 0, s->middle, hidden, hidden);
        statistics(b, count, s);
        if (b->mode == STATISTICS) return;
    }
    accumulate(b->inputs, s->related, row, s->d_middle, hidden, count, s->d_weight1, hidden, hidden);
    product(count, s->d_middle, hidden, b->weight1_t, row, t->hidden_used, s->zero, s->d_related, row, row);
    float *d_scale = s->d_scale1, *d_shift = s->d_shift1;
    for (int64_t m = 0; m < count; m++) {
        const float *q = t->query + (here + m) * t->query_row, *d = s->related + m * row, *g = s->d_related + m * row;
        float *d_q = b->d_query + (here + m) * b->rel_padded;
        if (!star) CHANNELS_BACKWARD(0, at(q + c), ADD(d_q, e));
        for (int64_t o = 0; o < area; o++) {
            const float *k = t->key + s->neighbours[m * area + o] * t->key_row;
            float *d_k = b->d_key + s->neighbours[m * area + o] * b->rel_padded;
            if (star) dot_backward(t, q, k, o, d[o], g[o], d_q, d_k, d_scale, d_shift);
            else CHANNELS_BACKWARD((o + 1) * r, at(k + c), ADD(d_k, e));
        }
    }
}

/* Works on slots until none is left. Any number of threads may call this with the same argument. */
static void work_backward(void *argument) {
    struct backward *b = argument;
    struct task *t = &b->task;
    const int64_t area = t->kernel * t->kernel, patchwise = form_of(t->relation) == PATCHWISE;
    const int64_t together = patchwise ? 4 * ROWS : 1, lines = patchwise ? together : area; /* rows of the products */
    const size_t related = 4 * (lines * b->inputs_padded + 2 * WIDTH), middle = 4 * lines * t->hidden;
    const size_t weights = 4 * together * area * t->lanes, neighbours = 8 * together * area;
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
    s.related = take(&from, related);
    s.d_related = take(&from, related);
    s.middle = take(&from, middle);
    s.d_middle = take(&from, middle);
    s.weights = take(&from, weights);
    s.d_weights = take(&from, weights);
    s.factor = take(&from, 4 * t->lanes);
    s.zero = take(&from, zero);
    s.neighbours = take(&from, neighbours);
    const int64_t bands = (t->height + b->band - 1) / b->band, mine = (bands + 1 - b->odd) / 2;
    for (;;) {
        const int64_t slot = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED);
        if (slot >= b->slots) break;
        if (b->mode == STATISTICS) {
            s.sums = b->sums + 2 * slot * t->hidden;
        } else {
            s.d_scale1 = b->d_parameters + slot * b->parameters;
            s.d_shift1 = s.d_scale1 + b->inputs_padded;
            s.d_weight1 = s.d_shift1 + b->inputs_padded;
            s.d_shift2 = s.d_weight1 + b->inputs * t->hidden;
            s.d_weight2 = s.d_shift2 + t->hidden;
            s.d_bias2 = s.d_weight2 + t->hidden_used * (patchwise ? area : 1) * t->lanes;
        }
        for (int64_t unit = slot; unit < t->batch * mine; unit += b->slots) {
            const int64_t image = unit / mine, top = (2 * (unit % mine) + b->odd) * b->band;
            const int64_t bottom = top + b->band < t->height ? top + b->band : t->height, end = bottom * t->width;
            for (int64_t pixel = top * t->width; pixel < end; pixel += together)
                if (patchwise) patchwise_pixels(b, image, pixel, end - pixel < together ? end - pixel : together, &s);
                else pairwise_pixel(b, image, pixel, &s);
        }
    }
    free(memory);
}

/* The even bands, then the odd ones; on `threads` threads. */
void san_backward_run(struct backward *b, parallel_function parallel, unsigned threads) {
    if (form_of(b->task.relation) == UNKNOWN || b->mode < ATTENTION || b->mode > STATISTICS_BACKWARD) {
        b->task.failed = UNKNOWN_CODE;
        return;
    }
    for (b->odd = 0; b->odd < 2; b->odd++) {
        b->task.next = 0;
        run(work_backward, b, parallel, threads);
    }
}

int64_t san_backward_bytes(void) { return sizeof(struct backward); }
