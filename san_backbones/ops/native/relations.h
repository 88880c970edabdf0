/* The relations delta that these loops have, forwards and backwards; included by footprint.h, whose legend holds.
 *
 * A relation is a line in the list of its form, and a case in the four switches of that form: without one of them this
 * does not compile (-Werror=switch). Python looks the names up (san_relations), and gives the widths of ops/relations.py:
 * a relation has `centre` channels of phi(x_i) alone, then `tap` of each neighbour, then the position channels.
 */
#ifndef SAN_RELATIONS_H
#define SAN_RELATIONS_H

#define PAIRWISE_RELATIONS(EACH)              \
    EACH(SUBTRACTION, "subtraction")          \
    EACH(SUMMATION, "summation")              \
    EACH(HADAMARD, "hadamard")                \
    EACH(CONCATENATION, "concatenation")      \
    EACH(DOT, "dot")
#define PATCHWISE_RELATIONS(EACH)             \
    EACH(PATCH_CONCATENATION, "concatenation") \
    EACH(PATCH_STAR, "star")

#define CODE(code, name) code,
#define ONE(code, name) +1
enum pairwise_relation { PAIRWISE_RELATIONS(CODE) };
enum patchwise_relation { PATCHWISE_RELATIONS(CODE) };
enum { PAIRWISE_COUNT = PAIRWISE_RELATIONS(ONE), PATCHWISE_COUNT = PATCHWISE_RELATIONS(ONE) };
#undef CODE
#undef ONE

/* Whether the task is of a form and a relation that are here. */
INLINE int is_known(const struct task *t) {
    if (t->form != PAIRWISE && t->form != PATCHWISE) return 0;
    return t->relation >= 0 && t->relation < (t->form == PAIRWISE ? PAIRWISE_COUNT : PATCHWISE_COUNT);
}

/* ---- forwards ---- */

/* `count` channels of x from channel `first` of the relation, normalised, positive part, to d. Whole vectors are
 * written, up to WIDTH - 1 elements beyond the last channel: d is filled in increasing order. */
#define CHANNELS(d, first, count, x)              \
    for (int64_t c = 0; c < (count); c += WIDTH) \
        *(vec *)((d) + c) = positive((x) * at(t->scale1 + (first) + c) + at(t->shift1 + (first) + c))

/* One channel that is the dot product of q and k. */
INLINE void relate_dot(const struct task *t, const float *restrict q, const float *restrict k, int64_t channel,
                       float *restrict d) {
    float product = 0;
    for (int64_t c = 0; c < t->rel; c++) product += q[c] * k[c];
    *d = relu(product * t->scale1[channel] + t->shift1[channel]);
}

/* The channels of a pair, the positions' included: all of d, [inputs]. */
INLINE void relate(const struct task *t, const enum pairwise_relation relation, const float *restrict q,
                   const float *restrict k, const float *restrict p_i, const float *restrict p_j, float *restrict d) {
    const int64_t r = t->rel;
    switch (relation) {
        case SUBTRACTION: CHANNELS(d, 0, r, at(q + c) - at(k + c)); break;
        case SUMMATION: CHANNELS(d, 0, r, at(q + c) + at(k + c)); break;
        case HADAMARD: CHANNELS(d, 0, r, at(q + c) * at(k + c)); break;
        case CONCATENATION:
            CHANNELS(d, 0, r, at(q + c));
            CHANNELS(d + r, r, r, at(k + c));
            break;
        case DOT: relate_dot(t, q, k, 0, d); break;
    }
    if (p_j) {
        const int64_t last = t->centre + t->tap;
        vec p = at(p_j);
        if (!t->absolute) p = at(p_i) - p;
        *(vec *)(d + last) = positive(p * at(t->scale1 + last) + at(t->shift1 + last));
    }
}

/* The channels of a patch that no neighbour has a part in: [centre]. */
INLINE void relate_centre(const struct task *t, const float *restrict q, float *restrict d) {
    CHANNELS(d, 0, t->centre, at(q + c));
}

/* The channels of a patch that neighbour o adds: [tap]. */
INLINE void relate_tap(const struct task *t, const float *restrict q, const float *restrict k, int64_t o,
                       float *restrict d) {
    const int64_t first = t->centre + o * t->tap;
    switch ((enum patchwise_relation)t->relation) {
        case PATCH_CONCATENATION: CHANNELS(d, first, t->rel, at(k + c)); break;
        case PATCH_STAR: relate_dot(t, q, k, first, d); break;
    }
}

/* ---- forwards, with a vector across pixels (planes.h) ---- */

#define Q(c, b) at(query + (c) * SPAN + (b) * WIDTH)
#define K(c, b) at(key + (c) * pitch + (b) * WIDTH)
/* Channel `channel` of the relation, normalised, positive part, to row `line` of `related`. */
#define RELATED(line, channel, b, x)                                                                    \
    *(vec *)(related + (line) * SPAN + (b) * WIDTH) = positive((x) * scale[channel] + shift[channel])
/* Of `rel` channels that begin at channel `first`. */
#define EACH(line, first, x)                                                                            \
    for (int64_t c = 0; c < rel; c++)                                                                   \
        for (int b = 0; b < blocks; b++) RELATED((line) + c, (first) + c, b, x)
#define DOTTED(line, channel)                                                                           \
    for (int b = 0; b < blocks; b++) {                                                                  \
        vec product = {0};                                                                              \
        for (int64_t c = 0; c < rel; c++) product += Q(c, b) * K(c, b);                                 \
        RELATED(line, channel, b, product);                                                             \
    }

/* The channels of a span, [rel + 2][span], and what it sees at one tap, whose keys begin at `key`: [inputs][span]. */
INLINE void relate_span(const struct task *t, const enum pairwise_relation relation, const int blocks,
                        const float *restrict query, const float *restrict key, int64_t pitch,
                        float *restrict related) {
    const int64_t rel = t->rel, last = t->centre + t->tap;
    const float *restrict scale = t->scale1, *restrict shift = t->shift1;
    switch (relation) {
        case SUBTRACTION: EACH(0, 0, Q(c, b) - K(c, b)); break;
        case SUMMATION: EACH(0, 0, Q(c, b) + K(c, b)); break;
        case HADAMARD: EACH(0, 0, Q(c, b) * K(c, b)); break;
        case CONCATENATION:
            EACH(0, 0, Q(c, b));
            EACH(rel, rel, K(c, b));
            break;
        case DOT: DOTTED(0, 0); break;
    }
    if (t->place.at)
        for (int64_t c = 0; c < 2; c++)
            for (int b = 0; b < blocks; b++) {
                vec x = K(rel + c, b);
                if (!t->absolute) x = Q(rel + c, b) - x;
                RELATED(last + c, last + c, b, x);
            }
}

/* The channels of patches that no tap has a part in: [centre][span]. */
INLINE void relate_centre_span(const struct task *t, const int blocks, const float *restrict query,
                               float *restrict related) {
    const int64_t rel = t->centre;
    const float *restrict scale = t->scale1, *restrict shift = t->shift1;
    EACH(0, 0, Q(c, b));
}

/* The channels of patches that tap o adds: [tap][span]. */
INLINE void relate_tap_span(const struct task *t, const int blocks, const float *restrict query,
                            const float *restrict key, int64_t pitch, int64_t o, float *restrict related) {
    const int64_t rel = t->rel, first = t->centre + o * t->tap;
    const float *restrict scale = t->scale1, *restrict shift = t->shift1;
    switch ((enum patchwise_relation)t->relation) {
        case PATCH_CONCATENATION: EACH(0, first, K(c, b)); break;
        case PATCH_STAR: DOTTED(0, first); break;
    }
}
#undef DOTTED
#undef EACH
#undef RELATED

/* ---- backwards, with a vector across pixels ---- */

#define D_Q(c, b) *(vec *)(d_query + (c) * SPAN + (b) * WIDTH)
#define D_K(c, b) *(vec *)(d_key + (c) * pitch + (b) * WIDTH)
/* For channel `channel` of the relation, row `line` of `related` and `d_related`: e, the gradient of x, of each vector. */
#define RELATED_BACKWARD(line, channel, x, update)                                                      \
    {                                                                                                   \
        vec *of_scale = (vec *)(d_scale + (channel) * WIDTH), *of_shift = (vec *)(d_shift + (channel) * WIDTH); \
        vec by_scale = *of_scale, by_shift = *of_shift;                                                 \
        for (int b = 0; b < blocks; b++) {                                                              \
            vec e = positive_backward(at(related + (line) * SPAN + b * WIDTH),                          \
                                      at(d_related + (line) * SPAN + b * WIDTH));                       \
            by_scale += e * (x), by_shift += e;                                                         \
            e *= scale[channel];                                                                        \
            update;                                                                                     \
        }                                                                                               \
        *of_scale = by_scale, *of_shift = by_shift;                                                     \
    }
#define EACH_BACKWARD(line, first, x, update) \
    for (int64_t c = 0; c < rel; c++) RELATED_BACKWARD((line) + c, (first) + c, x, update)

INLINE vec dot_span(const float *restrict query, const float *restrict key, int64_t pitch, int64_t rel, int b) {
    vec product = {0};
    for (int64_t c = 0; c < rel; c++) product += Q(c, b) * K(c, b);
    return product;
}

#define DOTTED_BACKWARD(line, channel)                                                                  \
    RELATED_BACKWARD(line, channel, dot_span(query, key, pitch, rel, b),                                \
                     for (int64_t c = 0; c < rel; c++) (D_Q(c, b) += e * K(c, b), D_K(c, b) += e * Q(c, b)))

/* relate_span backwards: `related` and its gradient, [inputs][span]; d_key as `key`; vectors of sums over pixels in
 * d_scale and d_shift. */
INLINE void relate_span_backward(const struct task *t, const enum pairwise_relation relation, const int blocks,
                                 const float *restrict query, const float *restrict key, int64_t pitch,
                                 const float *restrict related, const float *restrict d_related,
                                 float *restrict d_query, float *restrict d_key, float *restrict d_scale,
                                 float *restrict d_shift) {
    const int64_t rel = t->rel, last = t->centre + t->tap;
    const float *restrict scale = t->scale1;
    switch (relation) {
        case SUBTRACTION: EACH_BACKWARD(0, 0, Q(c, b) - K(c, b), (D_Q(c, b) += e, D_K(c, b) -= e)); break;
        case SUMMATION: EACH_BACKWARD(0, 0, Q(c, b) + K(c, b), (D_Q(c, b) += e, D_K(c, b) += e)); break;
        case HADAMARD:
            EACH_BACKWARD(0, 0, Q(c, b) * K(c, b), (D_Q(c, b) += e * K(c, b), D_K(c, b) += e * Q(c, b)));
            break;
        case CONCATENATION:
            EACH_BACKWARD(0, 0, Q(c, b), D_Q(c, b) += e);
            EACH_BACKWARD(rel, rel, K(c, b), D_K(c, b) += e);
            break;
        case DOT: DOTTED_BACKWARD(0, 0); break;
    }
    if (t->place.at)
        for (int64_t c = 0; c < 2; c++) {
            if (t->absolute) RELATED_BACKWARD(last + c, last + c, K(rel + c, b), D_K(rel + c, b) += e)
            else RELATED_BACKWARD(last + c, last + c, Q(rel + c, b) - K(rel + c, b),
                                  (D_Q(rel + c, b) += e, D_K(rel + c, b) -= e))
        }
}

INLINE void relate_centre_span_backward(const struct task *t, const int blocks, const float *restrict query,
                                        const float *restrict related, const float *restrict d_related,
                                        float *restrict d_query, float *restrict d_scale, float *restrict d_shift) {
    const int64_t rel = t->centre;
    const float *restrict scale = t->scale1;
    EACH_BACKWARD(0, 0, Q(c, b), D_Q(c, b) += e);
}

/* `related` and `d_related` begin with the channels of tap o. */
INLINE void relate_tap_span_backward(const struct task *t, const int blocks, const float *restrict query,
                                     const float *restrict key, int64_t pitch, int64_t o,
                                     const float *restrict related, const float *restrict d_related,
                                     float *restrict d_query, float *restrict d_key, float *restrict d_scale,
                                     float *restrict d_shift) {
    const int64_t rel = t->rel, first = t->centre + o * t->tap;
    const float *restrict scale = t->scale1;
    switch ((enum patchwise_relation)t->relation) {
        case PATCH_CONCATENATION: EACH_BACKWARD(0, first, K(c, b), D_K(c, b) += e); break;
        case PATCH_STAR: DOTTED_BACKWARD(0, first); break;
    }
}
#undef DOTTED_BACKWARD
#undef EACH_BACKWARD
#undef RELATED_BACKWARD
#undef D_K
#undef D_Q
#undef K
#undef Q

/* ---- backwards ---- */

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

/* For every vector of the `count` channels that begin at channel `first` of the relation: e, the gradient of x. */
#define CHANNELS_BACKWARD(first, count, x, update)                                                                 \
    for (int64_t c = 0; c < (count); c += WIDTH) {                                                                 \
        const vec e = norm_backward(x, (count) - c, d + (first) + c, g + (first) + c, t->scale1 + (first) + c,     \
                                    d_scale + (first) + c, d_shift + (first) + c);                                 \
        update;                                                                                                    \
    }
#define ADD(to, x) *(vec *)((to) + c) += (x)

INLINE void relate_dot_backward(const struct task *t, const float *restrict q, const float *restrict k,
                                int64_t channel, float d, float g, float *restrict d_q, float *restrict d_k,
                                float *d_scale, float *d_shift) {
    float x = 0;
    for (int64_t c = 0; c < t->rel; c++) x += q[c] * k[c];
    g = d <= 0 ? 0 : g;
    d_scale[channel] += g * x;
    d_shift[channel] += g;
    g *= t->scale1[channel];
    for (int64_t c = 0; c < t->rel; c++) d_q[c] += g * k[c], d_k[c] += g * q[c];
}

/* d and g: the relation's positive part and its gradient, [inputs]. d_q and d_k have room for whole vectors. */
INLINE void relate_backward(const struct task *t, const float *restrict q, const float *restrict k, const float *p_i,
                            const float *p_j, const float *restrict d, const float *restrict g,
                            float *restrict d_q, float *restrict d_k, float *d_p_i, float *d_p_j,
                            float *restrict d_scale, float *restrict d_shift) {
    const int64_t r = t->rel;
    switch ((enum pairwise_relation)t->relation) {
        case SUBTRACTION: CHANNELS_BACKWARD(0, r, at(q + c) - at(k + c), ADD(d_q, e); ADD(d_k, -e)); break;
        case SUMMATION: CHANNELS_BACKWARD(0, r, at(q + c) + at(k + c), ADD(d_q, e); ADD(d_k, e)); break;
        case HADAMARD:
            CHANNELS_BACKWARD(0, r, at(q + c) * at(k + c), ADD(d_q, e * at(k + c)); ADD(d_k, e * at(q + c)));
            break;
        case CONCATENATION:
            CHANNELS_BACKWARD(0, r, at(q + c), ADD(d_q, e));
            CHANNELS_BACKWARD(r, r, at(k + c), ADD(d_k, e));
            break;
        case DOT: relate_dot_backward(t, q, k, 0, d[0], g[0], d_q, d_k, d_scale, d_shift); break;
    }
    if (p_j)
        for (int64_t c = 0, i = t->centre + t->tap; c < 2; c++, i++) {
            const float e = d[i] <= 0 ? 0 : g[i], e_p = e * t->scale1[i];
            d_scale[i] += e * (t->absolute ? p_j[c] : p_i[c] - p_j[c]);
            d_shift[i] += e;
            if (t->absolute) d_p_j[c] += e_p;
            else d_p_i[c] += e_p, d_p_j[c] -= e_p;
        }
}

INLINE void relate_centre_backward(const struct task *t, const float *restrict q, const float *restrict d,
                                   const float *restrict g, float *restrict d_q, float *restrict d_scale,
                                   float *restrict d_shift) {
    CHANNELS_BACKWARD(0, t->centre, at(q + c), ADD(d_q, e));
}

/* d and g: of the whole patch. */
INLINE void relate_tap_backward(const struct task *t, const float *restrict q, const float *restrict k, int64_t o,
                                const float *restrict d, const float *restrict g, float *restrict d_q,
                                float *restrict d_k, float *restrict d_scale, float *restrict d_shift) {
    const int64_t first = t->centre + o * t->tap;
    switch ((enum patchwise_relation)t->relation) {
        case PATCH_CONCATENATION: CHANNELS_BACKWARD(first, t->rel, at(k + c), ADD(d_k, e)); break;
        case PATCH_STAR: relate_dot_backward(t, q, k, first, d[first], g[first], d_q, d_k, d_scale, d_shift); break;
    }
}

#endif
