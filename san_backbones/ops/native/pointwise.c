/* What surrounds the attention: the stem, relu(max_pool_2x2(W x + b)), forwards and backwards, and
 * min(relu(s x + t), limit), with what the gradients of a batch norm before it need.
 *
 * The stem's maps at full resolution are the largest of the network; here they are never in memory.
 */
#include "footprint.h"

struct stem {
    int64_t batch, height, width, inputs, out, out_padded;
    int64_t strides[4];                 /* of the image: batch, channels, rows, columns, in elements */
    int64_t slots, parameters;
    const float *image, *weight, *bias; /* weight: [inputs][out_padded]; bias: [out_padded] */
    float *output;                      /* [batch][height / 2][width / 2][out] */
    const float *gradient;              /* of the output; NULL forwards */
    float *d_image;                     /* [batch][height][width][inputs], or NULL */
    float *d_parameters;                /* [slots][inputs + 1][out_padded]: of the weight and of the bias */
    int64_t next, failed;
};

/* W x of the four pixels that one output pixel pools over, for one vector of channels. */
INLINE void four_pixels(const struct stem *t, const float *const *x, int64_t channel, vec *sum) {
    for (int p = 0; p < 4; p++) sum[p] = (vec){0};
    for (int64_t k = 0; k < t->inputs; k++) {
        const vec w = at(t->weight + k * t->out_padded + channel);
        for (int p = 0; p < 4; p++) sum[p] += x[p][k * t->strides[1]] * w;
    }
}

INLINE void stem_pixel(const struct stem *t, const float *const *x, float *output, float *line) {
    for (int64_t c = 0; c < t->out_padded; c += WIDTH) {
        vec sum[4];
        four_pixels(t, x, c, sum);
        vec top = sum[0];
        for (int p = 1; p < 4; p++) top = choose(sum[p] == sum[p], larger(top, sum[p]), sum[p]); /* NaN wins */
        *(vec *)(line + c) = positive(top + at(t->bias + c));
    }
    memcpy(output, line, 4 * t->out);
}

/* `shares`: room for the gradients of the four pixels' W x. */
INLINE void stem_pixel_backward(const struct stem *t, const float *const *x, const float *gradient, float *d_parameters,
                                float *const *d_image, float *line, float *shares) {
    memcpy(line, gradient, 4 * t->out);
    for (int64_t c = 0; c < t->out_padded; c += WIDTH) {
        vec sum[4];
        four_pixels(t, x, c, sum);
        vec top = sum[0];
        ivec mine[4] = {(ivec){0} - 1};
        for (int p = 1; p < 4; p++) { /* the first of equals and the last NaN, as torch's pooling */
            mine[p] = (sum[p] > top) | (sum[p] != sum[p]);
            top = choose(mine[p], sum[p], top);
            for (int before = 0; before < p; before++) mine[before] &= ~mine[p];
        }
        const vec g = positive_backward(top + at(t->bias + c), at(line + c));
        *(vec *)(d_parameters + t->inputs * t->out_padded + c) += g;
        for (int p = 0; p < 4; p++) *(vec *)(shares + p * t->out_padded + c) = choose(mine[p], g, (vec){0});
        for (int64_t k = 0; k < t->inputs; k++) {
            vec *d_weight = (vec *)(d_parameters + k * t->out_padded + c);
            for (int p = 0; p < 4; p++) *d_weight += at(shares + p * t->out_padded + c) * x[p][k * t->strides[1]];
        }
    }
    if (d_image)
        for (int p = 0; p < 4; p++)
            for (int64_t k = 0; k < t->inputs; k++) {
                float sum = 0;
                for (int64_t c = 0; c < t->out; c++) sum += shares[p * t->out_padded + c] * t->weight[k * t->out_padded + c];
                d_image[p][k] = sum;
            }
}

/* Works on slots, each a fixed share of the output rows, until none is left. */
static void work_stem(void *argument) {
    struct stem *t = argument;
    const int64_t height = t->height / 2, width = t->width / 2;
    float *memory = calloc(5 * t->out_padded + 16, sizeof(float)), *line = memory, *shares = memory + t->out_padded;
    if (!memory) {
        t->failed = NO_MEMORY;
        return;
    }
    for (;;) {
        const int64_t slot = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED);
        if (slot >= t->slots) break;
        for (int64_t row = slot; row < t->batch * height; row += t->slots) {
            const int64_t image = row / height, y = 2 * (row % height);
            for (int64_t column = 0; column < width; column++) {
                const float *x[4];
                float *d_image[4] = {NULL};
                for (int p = 0; p < 4; p++) {
                    const int64_t yp = y + p / 2, xp = 2 * column + p % 2;
                    x[p] = t->image + image * t->strides[0] + yp * t->strides[2] + xp * t->strides[3];
                    if (t->d_image)
                        d_image[p] = t->d_image + ((image * t->height + yp) * t->width + xp) * t->inputs;
                }
                const int64_t here = (row * width + column) * t->out;
                if (t->gradient)
                    stem_pixel_backward(t, x, t->gradient + here, t->d_parameters + slot * t->parameters,
                                        t->d_image ? d_image : NULL, line, shares);
                else
                    stem_pixel(t, x, t->output + here, line);
            }
        }
    }
    free(memory);
}

void san_stem_run(struct stem *t, parallel_function parallel, unsigned threads) { run(work_stem, t, parallel, threads); }

int64_t san_stem_bytes(void) { return sizeof(struct stem); }

struct scaled {
    int64_t pixels, channels;
    const float *x, *scale, *shift; /* x: [pixels][channels] */
    float *output;
    float limit;                    /* infinite where there is none */
    int64_t next, failed;
};

static void work_scaled(void *argument) {
    struct scaled *t = argument;
    const int64_t some = 64;
    for (;;) {
        const int64_t first = __atomic_fetch_add(&t->next, some, __ATOMIC_RELAXED);
        if (first >= t->pixels) break;
        const int64_t last = first + some < t->pixels ? first + some : t->pixels;
        for (int64_t p = first; p < last; p++)
            scale_shift_relu(t->x + p * t->channels, t->scale, t->shift, t->limit, t->channels,
                             t->output + p * t->channels);
    }
}

void san_scaled_run(struct scaled *t, parallel_function parallel, unsigned threads) {
    run(work_scaled, t, parallel, threads);
}

int64_t san_scaled_bytes(void) { return sizeof(struct scaled); }

/* ---- min(relu(norm(x)), limit) in training ---- */

enum normed_mode { MOMENTS, GRADIENT_SUMS, GRADIENT };
enum { GROUP = 64 }; /* pixels whose sums are float32 */

struct normed {
    int64_t mode, pixels, channels;      /* channels: a multiple of WIDTH */
    const float *x, *gradient;           /* of the output; both [pixels][channels] */
    const float *beside;                 /* GRADIENT: what x gets from elsewhere, [pixels][channels], or NULL */
    const float *mean, *scale, *shift;   /* the norm is scale x + shift; each [channels], as the two below */
    const float *by_x, *by_one;          /* GRADIENT: d_x = scale e + by_x (x - mean) + by_one + beside, e being what of
                                            the gradient passes the ReLU */
    float *d_x;
    double *sums;                        /* [slots][2][channels]: of x and x * x, or of e and e (x - mean) */
    int64_t slots;
    float limit;                         /* infinite where there is none */
    int64_t next, failed;
};

/* What passes the ReLU of a vector of gradients, given the norm's input. */
INLINE vec passes(const struct normed *t, vec x, vec gradient, int64_t c) {
    const vec z = x * at(t->scale + c) + at(t->shift + c);
    return choose((z <= (vec){0}) | (z >= (vec){0} + t->limit), (vec){0}, gradient);
}

/* Sums over the pixels of a group, added to `sums`: of x, as differences from the first pixel, or of e. */
INLINE void sum_group(const struct normed *t, const enum normed_mode mode, int64_t begin, int64_t end, float *group,
                      double *restrict sums) {
    const struct normed n = *t; /* once: whatever is written to might be it */
    const int64_t channels = n.channels;
    const float *first = n.x + begin * channels;
    memset(group, 0, 8 * channels);
    for (int64_t p = begin; p < end; p++)
        for (int64_t c = 0, i = p * channels; c < channels; c += WIDTH, i += WIDTH) {
            vec *a = (vec *)(group + c), *b = (vec *)(group + channels + c);
            if (mode == MOMENTS) {
                const vec v = at(n.x + i) - at(first + c);
                *a += v, *b += v * v;
            } else {
                const vec e = passes(&n, at(n.x + i), at(n.gradient + i), c);
                *a += e, *b += e * (at(n.x + i) - at(n.mean + c));
            }
        }
    for (int64_t c = 0; c < channels; c++) {
        const double centre = mode == MOMENTS ? first[c] : 0, a = group[c], b = group[channels + c];
        sums[c] += a + (end - begin) * centre;
        sums[channels + c] += b + 2 * centre * a + (end - begin) * centre * centre;
    }
}

INLINE void normed_gradient(const struct normed *t, const int beside, int64_t begin, int64_t end) {
    const struct normed n = *t;
    for (int64_t p = begin; p < end; p++)
        for (int64_t c = 0, i = p * n.channels; c < n.channels; c += WIDTH, i += WIDTH) {
            vec sum = at(n.scale + c) * passes(&n, at(n.x + i), at(n.gradient + i), c) +
                      at(n.by_x + c) * (at(n.x + i) - at(n.mean + c)) + at(n.by_one + c);
            if (beside) sum += at(n.beside + i);
            *(vec *)(n.d_x + i) = sum;
        }
}

/* Works on slots, each a fixed share of the pixels, until none is left. */
static void work_normed(void *argument) {
    struct normed *t = argument;
    float *group = malloc(8 * t->channels);
    if (!group) {
        t->failed = NO_MEMORY;
        return;
    }
    for (;;) {
        const int64_t slot = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED);
        if (slot >= t->slots) break;
        const int64_t begin = t->pixels * slot / t->slots, end = t->pixels * (slot + 1) / t->slots;
        double *sums = t->sums + 2 * slot * t->channels;
        if (t->mode == GRADIENT && t->beside) normed_gradient(t, 1, begin, end);
        else if (t->mode == GRADIENT) normed_gradient(t, 0, begin, end);
        for (int64_t p = begin, last; t->mode != GRADIENT && p < end; p = last) {
            last = p + GROUP < end ? p + GROUP : end;
            if (t->mode == MOMENTS) sum_group(t, MOMENTS, p, last, group, sums);
            else sum_group(t, GRADIENT_SUMS, p, last, group, sums);
        }
    }
    free(group);
}

void san_normed_run(struct normed *t, parallel_function parallel, unsigned threads) {
    run(work_normed, t, parallel, threads);
}

int64_t san_normed_bytes(void) { return sizeof(struct normed); }

struct vector { /* `count` elements of `size` bytes, `stride` elements apart */
    const char *at;
    int64_t stride, count, size;
};

/* Whether the elements of all vectors have the bits that are expected, one vector behind the other. */
int64_t san_unchanged(const struct vector *vectors, int64_t count, const char *expected) {
    for (const struct vector *v = vectors; v < vectors + count; expected += v->count * v->size, v++)
        if (v->stride == 1) {
            if (memcmp(v->at, expected, v->count * v->size)) return 0;
        } else
            for (int64_t i = 0; i < v->count; i++)
                if (memcmp(v->at + i * v->stride * v->size, expected + i * v->size, v->size)) return 0;
    return 1;
}
