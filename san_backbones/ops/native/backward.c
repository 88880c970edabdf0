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
    int64_t mode, inputs, inputs_padded, slots, parameters, band, odd;
    const float *gradient;              /* of the output; STATISTICS_BACKWARD: d loss / d u = g[0][h] + g[1][h] u[h] */
    const float *weight1_t, *weight2_t; /* [hidden][inputs_padded], [(k * k) lanes][hidden] */
    float *d_query, *d_key, *d_value;
    float *d_place;                     /* one for each image */
    float *d_parameters;                /* [slots][scale1, shift1, weight1, shift2, weight2, bias2] */
    double *sums;                       /* STATISTICS: [slots][2][hidden], sums of u and of u * u */
};

struct work {
    float *related, *d_related, *middle, *d_middle, *weights, *d_weights, *factor, *zero;
    int64_t *neighbours;
    float *d_scale1, *d_shift1, *d_weight1, *d_shift2, *d_weight2, *d_bias2; /* of the slot */
    double *sums;
};

static void product(int64_t rows, const float *a, int64_t a_row, const float *w, int64_t w_row, int64_t inner,
                    const float *zero, float *c, int64_t c_row, int64_t columns) {
    multiply(rows, (struct left){a, a_row, 1}, w, w_row, inner, zero, 0, c, c_row, columns, 0);
}

/* c[i][:] += sum_m a[m][i] b[m][:] */
static void accumulate(int64_t rows, const float *a, int64_t a_row, const float *b, int64_t b_row, int64_t inner,
                       float *c, int64_t c_row, int64_t columns) {
    multiply(rows, (struct left){a, 1, a_row}, b, b_row, inner, c, c_row, c, c_row, columns, 0);
}

/* Gradients of the weights of one neighbour and of its value. */
INLINE void weighted_sum_backward(const float *weight, const float *gradient, const float *value, int64_t lanes,
                                  int64_t out, float *d_weight, float *d_value) {
    int64_t c = 0, l = 0;
    for (int64_t j = 0; j < lanes; j += LANES) *(vec *)(d_weight + j) = (vec){0};
    for (; c + LANES <= out; c += LANES) {
        const vec g = *(const vec *)(gradient + c);
        *(vec *)(d_weight + l) += g * *(const vec *)(value + c);
        *(vec *)(d_value + c) += g * *(const vec *)(weight + l);
        l = l + LANES == lanes ? 0 : l + LANES;
    }
    for (; c < out; c++) {
        d_weight[c % lanes] += gradient[c] * value[c];
        d_value[c] += gradient[c] * weight[c % lanes];
    }
}

/* Sets to zero what the ReLU stopped, and adds the rest up: `sum` gets the gradient of what was added before it. */
INLINE void relu_backward(int64_t rows, int64_t columns, const float *after, float *gradient, float *sum) {
    for (int64_t c = 0; c < columns; c += LANES) {
        vec total = *(vec *)(sum + c);
        for (int64_t m = 0; m < rows; m++) {
            vec *g = (vec *)(gradient + m * columns + c);
            *g = choose(*(const vec *)(after + m * columns + c) > (vec){0}, *g, (vec){0});
            total += *g;
        }
        *(vec *)(sum + c) = total;
    }
}

/* Sums of the hidden vectors and their squares; or, given how the loss depends on those sums, on the vectors. */
INLINE void statistics(const struct backward *b, int64_t rows, struct work *s) {
    const int64_t hidden = b->task.hidden;
    for (int64_t h = 0; h < hidden; h += LANES) {
        vec sum = {0}, squares = {0};
        for (int64_t m = 0; m < rows; m++) {
            const vec u = *(vec *)(s->middle + m * hidden + h);
            if (b->mode == STATISTICS) sum += u, squares += u * u;
            else *(vec *)(s->d_middle + m * hidden + h) =
                     *(const vec *)(b->gradient + h) + *(const vec *)(b->gradient + hidden + h) * u;
        }
        if (b->mode == STATISTICS)
            for (int64_t l = 0; l < LANES; l++) s->sums[h + l] += sum[l], s->sums[hidden + h + l] += squares[l];
    }
}

/* One channel of norm1 and its ReLU: gradient of the relation x, given its positive part d and the gradient of d. */
INLINE float norm_backward(float x, float d, float g, float scale, float *d_scale, float *d_shift) {
    g = d > 0 ? g : 0;
    *d_scale += g * x;
    *d_shift += g;
    return g * scale;
}

INLINE void relate_backward(const struct task *t, const float *restrict q, const float *restrict k, const float *p_i,
                            const float *p_j, const float *restrict d, const float *restrict g,
                            float *restrict d_q, float *restrict d_k, float *d_p_i, float *d_p_j,
                            float *restrict d_scale, float *restrict d_shift) {
    const int64_t r = t->rel;
    const float *restrict scale = t->scale1;
    int64_t width = r;
#define CHANNEL(x, c) norm_backward(x, d[c], g[c], scale[c], d_scale + (c), d_shift + (c))
    switch (t->relation) {
        case SUBTRACTION:
            for (int64_t c = 0; c < r; c++) {
                const float e = CHANNEL(q[c] - k[c], c);
                d_q[c] += e, d_k[c] -= e;
            }
            break;
        case SUMMATION:
            for (int64_t c = 0; c < r; c++) {
                const float e = CHANNEL(q[c] + k[c], c);
                d_q[c] += e, d_k[c] += e;
            }
            break;
        case HADAMARD:
            for (int64_t c = 0; c < r; c++) {
                const float e = CHANNEL(q[c] * k[c], c);
                d_q[c] += e * k[c], d_k[c] += e * q[c];
            }
            break;
        case CONCATENATION:
            for (int64_t c = 0; c < r; c++) d_q[c] += CHANNEL(q[c], c);
            for (int64_t c = 0; c < r; c++) d_k[c] += CHANNEL(k[c], r + c);
            width = 2 * r;
            break;
        default: {
            float x = 0;
            for (int64_t c = 0; c < r; c++) x += q[c] * k[c];
            const float e = CHANNEL(x, 0);
            for (int64_t c = 0; c < r; c++) d_q[c] += e * k[c], d_k[c] += e * q[c];
            width = 1;
        }
    }
    if (p_j)
        for (int64_t c = 0; c < 2; c++, width++) {
            const float e = CHANNEL(t->absolute ? p_j[c] : p_i[c] - p_j[c], width);
            if (t->absolute) d_p_j[c] += e;
            else d_p_i[c] += e, d_p_j[c] -= e;
        }
#undef CHANNEL
}

static void pairwise_pixel(const struct backward *b, int64_t image, int64_t y, int64_t x, struct work *s) {
    const struct task *t = &b->task;
    const int64_t area = t->kernel * t->kernel, first = image * t->height * t->width, r = t->rel;
    const int64_t at = y * t->width + x, here = first + at, lanes = t->lanes, hidden = t->hidden;
    const float *q = t->query + here * r, *p_i = t->place ? t->place + 2 * at : NULL;
    for (int64_t a = 0, o = 0; a < t->kernel; a++)
        for (int64_t c = 0; c < t->kernel; c++, o++) {
            const int64_t there = t->rows[y + a * t->dilation] * t->width + t->columns[x + c * t->dilation];
            s->neighbours[o] = there;
            relate(t, q, t->key + (first + there) * r, t->scale1, t->shift1, p_i,
                   t->place ? t->place + 2 * there : NULL, s->related + o * b->inputs_padded);
        }
    const struct left related = {s->related, b->inputs_padded, 1};
    if (b->mode == ATTENTION) {
        multiply(area, related, t->weight1, hidden, b->inputs, t->shift2, 0, s->middle, hidden, hidden, 1);
        multiply(area, (struct left){s->middle, hidden, 1}, t->weight2, lanes, t->hidden_used, t->bias2, 0, s->weights,
                 lanes, lanes, 0);
        softmax(s->weights, area, lanes, s->factor);
        const float *gradient = b->gradient + here * t->out;
        for (int64_t o = 0; o < area; o++) {
            for (int64_t l = 0; l < lanes; l += LANES)
                *(vec *)(s->weights + o * lanes + l) *= *(const vec *)(s->factor + l);
            const int64_t there = (first + s->neighbours[o]) * t->out;
            weighted_sum_backward(s->weights + o * lanes, gradient, t->value + there, lanes, t->out,
                                  s->d_weights + o * lanes, b->d_value + there);
        }
        for (int64_t l = 0; l < lanes; l += LANES) { /* through the softmax: dl = w (dw - sum w dw) */
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
        multiply(area, related, t->weight1, hidden, b->inputs, s->zero, 0, s->middle, hidden, hidden, 0);
        statistics(b, area, s);
        if (b->mode == STATISTICS) return;
    }
    accumulate(b->inputs, s->related, b->inputs_padded, s->d_middle, hidden, area, s->d_weight1, hidden, hidden);
    product(area, s->d_middle, hidden, b->weight1_t, b->inputs_padded, t->hidden_used, s->zero, s->d_related,
            b->inputs_padded, b->inputs_padded);
    for (int64_t o = 0; o < area; o++) {
        const int64_t there = s->neighbours[o];
        relate_backward(t, q, t->key + (first + there) * r, p_i, t->place ? t->place + 2 * there : NULL,
                        s->related + o * b->inputs_padded, s->d_related + o * b->inputs_padded, b->d_query + here * r,
                        b->d_key + (first + there) * r, t->place ? b->d_place + 2 * here : NULL,
                        t->place ? b->d_place + 2 * (first + there) : NULL, s->d_scale1, s->d_shift1);
    }
}

static void patchwise_pixels(const struct backward *b, int64_t image, int64_t y, int64_t x, int64_t count,
                             struct work *s) {
    const struct task *t = &b->task;
    const int64_t area = t->kernel * t->kernel, first = image * t->height * t->width, r = t->rel;
    const int64_t here = first + y * t->width + x, lanes = t->lanes, columns = area * lanes, hidden = t->hidden;
    const int64_t star = t->relation == PATCH_STAR, row = b->inputs_padded;
    for (int64_t m = 0; m < count; m++) {
        const float *restrict q = t->query + (here + m) * r;
        float *restrict d = s->related + m * row;
        if (!star)
            for (int64_t c = 0; c < r; c++) d[c] = relu(q[c] * t->scale1[c] + t->shift1[c]);
        for (int64_t a = 0, o = 0; a < t->kernel; a++)
            for (int64_t i = 0; i < t->kernel; i++, o++) {
                const int64_t there = first + t->rows[y + a * t->dilation] * t->width
                                      + t->columns[x + m + i * t->dilation];
                const float *restrict k = t->key + there * r;
                s->neighbours[m * area + o] = there;
                if (star) {
                    float product = 0;
                    for (int64_t c = 0; c < r; c++) product += q[c] * k[c];
                    d[o] = relu(product * t->scale1[o] + t->shift1[o]);
                } else {
                    const float *restrict scale = t->scale1 + (o + 1) * r, *restrict shift = t->shift1 + (o + 1) * r;
                    for (int64_t c = 0; c < r; c++) d[(o + 1) * r + c] = relu(k[c] * scale[c] + shift[c]);
                }
            }
    }
    const struct left related = {s->related, row, 1};
    if (b->mode == ATTENTION) {
        multiply(count, related, t->weight1, hidden, b->inputs, t->shift2, 0, s->middle, hidden, hidden, 1);
        multiply(count, (struct left){s->middle, hidden, 1}, t->weight2, columns, t->hidden_used, t->bias2, 0,
                 s->weights, columns, columns, 0);
        for (int64_t m = 0; m < count; m++)
            for (int64_t o = 0; o < area; o++) {
                const int64_t there = s->neighbours[m * area + o] * t->out;
                weighted_sum_backward(s->weights + m * columns + o * lanes, b->gradient + (here + m) * t->out,
                                      t->value + there, lanes, t->out, s->d_weights + m * columns + o * lanes,
                                      b->d_value + there);
            }
        for (int64_t j = 0; j < columns; j += LANES)
            for (int64_t m = 0; m < count; m++) *(vec *)(s->d_bias2 + j) += *(vec *)(s->d_weights + m * columns + j);
        accumulate(t->hidden_used, s->middle, hidden, s->d_weights, columns, count, s->d_weight2, columns, columns);
        product(count, s->d_weights, columns, b->weight2_t, hidden, columns, s->zero, s->d_middle, hidden, hidden);
        relu_backward(count, hidden, s->middle, s->d_middle, s->d_shift2);
    } else {
        multiply(count, related, t->weight1, hidden, b->inputs, s->zero, 0, s->middle, hidden, hidden, 0);
        statistics(b, count, s);
        if (b->mode == STATISTICS) return;
    }
    accumulate(b->inputs, s->related, row, s->d_middle, hidden, count, s->d_weight1, hidden, hidden);
    product(count, s->d_middle, hidden, b->weight1_t, row, t->hidden_used, s->zero, s->d_related, row, row);
    for (int64_t m = 0; m < count; m++) {
        const float *restrict q = t->query + (here + m) * r, *restrict d = s->related + m * row;
        const float *restrict g = s->d_related + m * row;
        float *restrict d_q = b->d_query + (here + m) * r;
        if (!star)
            for (int64_t c = 0; c < r; c++)
                d_q[c] += norm_backward(q[c], d[c], g[c], t->scale1[c], s->d_scale1 + c, s->d_shift1 + c);
        for (int64_t o = 0; o < area; o++) {
            const float *restrict k = t->key + s->neighbours[m * area + o] * r;
            float *restrict d_k = b->d_key + s->neighbours[m * area + o] * r;
            if (star) {
                float x_o = 0;
                for (int64_t c = 0; c < r; c++) x_o += q[c] * k[c];
                const float e = norm_backward(x_o, d[o], g[o], t->scale1[o], s->d_scale1 + o, s->d_shift1 + o);
                for (int64_t c = 0; c < r; c++) d_q[c] += e * k[c], d_k[c] += e * q[c];
            } else {
                const int64_t at = (o + 1) * r;
                const float *restrict scale = t->scale1 + at, *restrict d_o = d + at, *restrict g_o = g + at;
                float *restrict d_scale = s->d_scale1 + at, *restrict d_shift = s->d_shift1 + at;
                for (int64_t c = 0; c < r; c++)
                    d_k[c] += norm_backward(k[c], d_o[c], g_o[c], scale[c], d_scale + c, d_shift + c);
            }
        }
    }
}

/* Works on slots until none is left. Any number of threads may call this with the same argument. */
void san_backward_work(void *argument) {
    struct backward *b = argument;
    struct task *t = &b->task;
    const int64_t area = t->kernel * t->kernel, patchwise = t->relation >= PATCH_CONCATENATION;
    const int64_t together = patchwise ? ROWS : 1, lines = patchwise ? ROWS : area; /* rows of the products */
    const size_t related = 4 * lines * b->inputs_padded, middle = 4 * lines * t->hidden;
    const size_t weights = 4 * together * area * t->lanes, neighbours = 8 * together * area;
    size_t zero = t->hidden > b->inputs_padded ? t->hidden : b->inputs_padded;
    zero = 4 * (zero > (size_t)t->lanes ? zero : (size_t)t->lanes);
    const size_t all = 2 * (related + middle + weights) + 4 * t->lanes + zero + neighbours + 10 * 64;
    char *memory = calloc(1, all), *from = memory;
    if (!memory) {
        t->failed = 1;
        return;
    }
    from += 64 - (uintptr_t)from % 64;
    struct work s;
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
            const int64_t bottom = top + b->band < t->height ? top + b->band : t->height;
            for (int64_t y = top; y < bottom; y++)
                if (patchwise)
                    for (int64_t x = 0; x < t->width; x += ROWS)
                        patchwise_pixels(b, image, y, x, t->width - x < ROWS ? t->width - x : ROWS, &s);
                else
                    for (int64_t x = 0; x < t->width; x++) pairwise_pixel(b, image, y, x, &s);
        }
    }
    free(memory);
}

typedef void (*parallel_function)(void (*)(void *), void *, unsigned, unsigned);

/* The even bands, then the odd ones; threads as in san_run. */
void san_backward_run(struct backward *b, parallel_function parallel, unsigned threads) {
    for (b->odd = 0; b->odd < 2; b->odd++) {
        b->task.next = 0;
        if (parallel && threads > 1) parallel(san_backward_work, b, threads, 0);
        else san_backward_work(b);
    }
}

int64_t san_backward_bytes(void) { return sizeof(struct backward); }
