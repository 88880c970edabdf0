/* A linear map over channels, and its products in 8 bits: for linear.c, and for gamma in footprint.c. */
#ifndef SAN_LINEAR_H
#define SAN_LINEAR_H

#include "footprint.h"

enum { LINEAR_ROWS = 6, /* with BLOCKS vectors of weights they fill the registers */
       INNER = 512,     /* channels that are in cache together, as a part of a panel and of the pixels */
       TILE = 60,       /* pixels that a thread takes at most */
       LARGEST = 64 };  /* and with AMX, which takes 16 at a time */

enum weights { FLOAT32, INT8_VNNI, INT8_AMX, BFLOAT16_AMX };

struct linear {
    int64_t kind;                       /* enum weights */
    int64_t pixels, inner, columns;
    struct matrix input;                /* [pixels][inner]; with pooling, four pixels of this map for each */
    int64_t pooled_width, pooled_height; /* of the map's images after 2x2 max pooling; 0: none */
    int64_t from_width, from_height;    /* and before */
    const float *scale, *shift;         /* of the norm before: [inner]; or NULL: neither norm nor ReLU */
    const void *weight;                 /* panels */
    const float *column_scale;          /* of weights of 8 bits: [columns]; or NULL */
    const float *column_sum;            /* of the rounded weights times their scale: [columns] */
    const float *bias;                  /* [columns], or NULL */
    struct matrix output;               /* [pixels][columns] */
    int64_t add;                        /* whether to add to what is there */
    const float *out_scale, *out_shift; /* of the norm after: [columns]; or NULL: neither norm nor ReLU */
    float limit;                        /* of the ReLU before; infinite where there is none */
    int64_t tile, chunk;                /* pixels and columns that a thread takes */
    int64_t next, failed;
};

/* Vectors of the panel that begins at a column. */
INLINE int64_t panel_blocks(int64_t columns, int64_t column) {
    const int64_t left = (columns - column + WIDTH - 1) / WIDTH;
    return left >= BLOCKS ? BLOCKS : left >= 2 ? 2 : 1;
}

/* The first `used` elements of a vector, zeros in the others; and written back. */
INLINE vec read_part(const float *from, int64_t used) {
    if (used == WIDTH) return at(from);
#if defined(__AVX512F__)
    return (vec)_mm512_maskz_loadu_ps((1u << used) - 1, from);
#else
    float line[WIDTH] = {0};
    memcpy(line, from, 4 * used);
    return at(line);
#endif
}

INLINE void write_part(vec x, int64_t used, float *to) {
#if defined(__AVX512F__)
    if (used == WIDTH) *(vec *)to = x;
    else _mm512_mask_storeu_ps(to, (1u << used) - 1, (__m512)x);
#else
    memcpy(to, &x, 4 * used);
#endif
}

/* `vectors` vectors of which the first `used` elements are there, and back. */
INLINE void read_some(const float *from, int64_t used, int vectors, vec *to) {
    for (int b = 0; b < vectors - 1; b++) to[b] = at(from + b * WIDTH);
    const int last = vectors - 1;
    to[last] = used == vectors * WIDTH ? at(from + last * WIDTH) : read_part(from + last * WIDTH, used - last * WIDTH);
}

INLINE void write_some(const vec *from, int64_t used, int vectors, float *to) {
    for (int b = 0; b < vectors - 1; b++) *(vec *)(to + b * WIDTH) = from[b];
    const int last = vectors - 1;
    if (used == vectors * WIDTH) *(vec *)(to + last * WIDTH) = from[last];
    else write_part(from[last], used - last * WIDTH, to + last * WIDTH);
}

/* Channels k to k + count of a pixel: where they are, or in `line` after pooling. */
INLINE const float *input_row(const struct linear *t, int64_t pixel, int64_t k, int64_t count, float *line) {
    if (!t->pooled_width) return row_of(t->input, pixel) + k;
    const int64_t row = pixel / t->pooled_width, image = row / t->pooled_height;
    const int64_t y = 2 * (row % t->pooled_height), x = 2 * (pixel % t->pooled_width);
    const struct matrix above = columns_from(rows_from(t->input, (image * t->from_height + y) * t->from_width + x), k);
    const struct matrix below = rows_from(above, t->from_width);
    const float *from[4] = {above.at, row_of(above, 1), below.at, row_of(below, 1)};
    for (int64_t i = 0; i < count; i += WIDTH) {
        const int64_t used = count - i < WIDTH ? count - i : WIDTH;
        vec top = read_part(from[0] + i, used);
        for (int n = 1; n < 4; n++) {
            const vec other = read_part(from[n] + i, used);
            top = choose(other == other, larger(top, other), other); /* NaN wins */
        }
        write_part(top, used, line + i);
    }
    return line;
}

#if defined(__AVX512F__)
enum { GROUP = 4,      /* channels of 8 bits whose products one instruction adds up */
       LINE = 64,      /* bytes of channels that come together: a row of a tile of AMX */
       TILE_ROWS = 16 };

/* Bytes of a column, filled up with weights of zero; and of a rounded pixel, one line more, so that pixels do not meet in
 * one place of the cache. */
INLINE int64_t filled(const struct linear *t) { return (t->inner + LINE - 1) / LINE * LINE; }
INLINE int64_t rounded_row(const struct linear *t) { return filled(t) + LINE; }

/* Channels i and following of a pixel, after the norm and the ReLU before, if there are any. */
INLINE vec read_input(const struct linear *t, const float *from, int64_t i, int64_t used) {
    const vec x = read_part(from + i, used);
    return t->scale ? smaller(positive(x * read_part(t->scale + i, used) + read_part(t->shift + i, used)),
                              (vec){0} + t->limit) : x;
}

/* What a row's elements reach. */
struct range { __m512 low, high, check; };

/* Of a row that is `positive`, high alone, in bits, which come in the order of the numbers: not finite ones last. */
INLINE struct range widen(struct range r, const int positive, __m512 x) {
    if (positive) {
        const __m512i bits = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(INT32_MAX)); /* 0 for -0 */
        r.high = _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(r.high), bits));
        return r;
    }
    return (struct range){_mm512_min_ps(r.low, x), _mm512_max_ps(r.high, x),
                          _mm512_fmadd_ps(x, _mm512_setzero_ps(), r.check)};
}

/* Rounds a row to 8 bits: x = zero + scale q, q in 0..255, zero <= 0. NaN for a scale where the row is not finite. Where
 * there is a norm before, that and its ReLU come first; `line` has room for a row. Of a row that is `positive`, by that
 * ReLU or another, zero is 0. */
INLINE void quantise(const struct linear *t, const int positive, const float *from, float *line, uint8_t *to, float *scale,
                     float *zero) {
    enum { VECTORS = 4 }; /* that fill a vector of bytes */
    const int64_t inner = t->inner;
    const struct range none = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    struct range r[VECTORS] = {none, none, none, none};
    int64_t i = 0;
#define READ(v, used)                                                             \
    const vec x = read_input(t, from, i + v * WIDTH, used);                        \
    if (t->scale) write_part(x, used, line + i + v * WIDTH);                        \
    r[v] = widen(r[v], positive, (__m512)x)
    for (; i + VECTORS * WIDTH <= inner; i += VECTORS * WIDTH)
        for (int v = 0; v < VECTORS; v++) { READ(v, WIDTH); }
    for (; i < inner; i += WIDTH) {
        const int64_t used = inner - i < WIDTH ? inner - i : WIDTH;
        READ(0, used);
    }
#undef READ
    for (int v = 1; v < VECTORS; v++) {
        r[0].low = _mm512_min_ps(r[0].low, r[v].low), r[0].check = _mm512_add_ps(r[0].check, r[v].check);
        r[0].high = positive ? widen(r[0], 1, r[v].high).high : _mm512_max_ps(r[0].high, r[v].high);
    }
    if (t->scale) from = line;
    if (positive) {
        const uint32_t bits = _mm512_reduce_max_epu32(_mm512_castps_si512(r[0].high));
        float high;
        memcpy(&high, &bits, 4);
        *zero = 0, *scale = (high + 0 * high) / 255;
    } else {
        *zero = _mm512_reduce_min_ps(r[0].low);
        *scale = (_mm512_reduce_max_ps(r[0].high) - *zero) / 255 + _mm512_reduce_add_ps(r[0].check);
    }
    const __m512 by = _mm512_set1_ps(*scale > 0 ? 1 / *scale : 0), offset = _mm512_set1_ps(*zero);
#define ROUNDED(x) \
    _mm512_cvtps_epi32(_mm512_mul_ps(positive ? (__m512)(x) : _mm512_sub_ps((__m512)(x), offset), by))
    /* packing takes quarters of vectors in turns: here they come back into line */
    const __m512i quarters = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (i = 0; i + VECTORS * WIDTH <= inner; i += VECTORS * WIDTH) {
        __m512i q[VECTORS];
        for (int v = 0; v < VECTORS; v++) q[v] = ROUNDED(at(from + i + v * WIDTH));
        const __m512i bytes = _mm512_packus_epi16(_mm512_packus_epi32(q[0], q[1]), _mm512_packus_epi32(q[2], q[3]));
        _mm512_storeu_si512(to + i, _mm512_permutexvar_epi32(quarters, bytes));
    }
    for (; i < inner; i += WIDTH) {
        const int64_t used = inner - i < WIDTH ? inner - i : WIDTH;
        _mm512_mask_cvtusepi32_storeu_epi8(to + i, (1u << used) - 1, ROUNDED(read_part(from + i, used)));
    }
#undef ROUNDED
}

/* Writes what follows from the products y of `rows` pixels and `blocks` vectors of columns. */
INLINE void finish(const int rows, const int blocks, const struct linear *t, vec (*y)[BLOCKS], struct matrix output,
                   int64_t column) {
    const int64_t used = t->columns - column < blocks * WIDTH ? t->columns - column : blocks * WIDTH;
    vec by[BLOCKS], plus[BLOCKS];
    if (t->bias) {
        read_some(t->bias + column, used, blocks, plus);
        for (int m = 0; m < rows; m++)
            for (int b = 0; b < blocks; b++) y[m][b] += plus[b];
    }
    if (t->add)
        for (int m = 0; m < rows; m++) {
            read_some(row_of(output, m), used, blocks, plus);
            for (int b = 0; b < blocks; b++) y[m][b] += plus[b];
        }
    if (t->out_scale) {
        read_some(t->out_scale + column, used, blocks, by);
        read_some(t->out_shift + column, used, blocks, plus);
        for (int m = 0; m < rows; m++)
            for (int b = 0; b < blocks; b++) y[m][b] = positive(y[m][b] * by[b] + plus[b]);
    }
    for (int m = 0; m < rows; m++) write_some(y[m], used, blocks, row_of(output, m));
}

/* The same of sums in 8 bits. */
INLINE void finish8(const int rows, const int blocks, const struct linear *t, __m512i (*sum)[BLOCKS],
                    const float *scale, const float *zero, struct matrix output, int64_t column) {
    const int64_t used = t->columns - column < blocks * WIDTH ? t->columns - column : blocks * WIDTH;
    vec y[LINEAR_ROWS][BLOCKS], by[BLOCKS], plus[BLOCKS];
    read_some(t->column_scale + column, used, blocks, by);
    read_some(t->column_sum + column, used, blocks, plus);
    for (int m = 0; m < rows; m++)
        for (int b = 0; b < blocks; b++)
            y[m][b] = (vec)_mm512_cvtepi32_ps(sum[m][b]) * (by[b] * scale[m]) + plus[b] * zero[m];
    finish(rows, blocks, t, y, output, column);
}

/* One register block, as linear_block: `rows` rounded pixels a, `row` bytes apart, and a whole panel of `inner`. */
INLINE void linear8_block(const int rows, const int blocks, const struct linear *t, const uint8_t *a, int64_t row,
                          int64_t inner, const int8_t *w, const float *scale, const float *zero,
                          struct matrix output, int64_t column) {
    __m512i sum[LINEAR_ROWS][BLOCKS], line[BLOCKS];
    for (int m = 0; m < rows; m++)
        for (int b = 0; b < blocks; b++) sum[m][b] = _mm512_setzero_si512();
    for (int64_t i = 0; i < inner; i += GROUP) {
        for (int b = 0; b < blocks; b++) line[b] = _mm512_loadu_si512(w + (i * blocks + GROUP * b) * WIDTH);
        for (int m = 0; m < rows; m++) {
            int32_t four;
            memcpy(&four, a + m * row + i, GROUP);
            const __m512i x = _mm512_set1_epi32(four);
            for (int b = 0; b < blocks; b++) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum[m][b]) : "v"(x), "v"(line[b]));
        }
    }
    finish8(rows, blocks, t, sum, scale, zero, output, column);
}

INLINE void linear8_panel(const int blocks, const struct linear *t, int64_t rows, const uint8_t *a, int64_t row,
                          int64_t inner, const int8_t *w, const float *scale, const float *zero,
                          struct matrix output, int64_t column) {
#define CASE(n) case n: linear8_block(n, blocks, t, a, row, inner, w, scale, zero, output, column); break;
    for (int64_t parts = (rows + LINEAR_ROWS - 1) / LINEAR_ROWS, some; parts > 0; parts--, rows -= some) {
        some = (rows + parts - 1) / parts;
        switch (some) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
        a += some * row, scale += some, zero += some, output = rows_from(output, some);
    }
#undef CASE
}

/* Columns [begin, end) of `rows` rounded pixels a, `row` bytes apart. */
INLINE void linear8(const struct linear *t, int64_t rows, const uint8_t *a, int64_t row, const float *scale,
                    const float *zero, struct matrix output, int64_t begin, int64_t end) {
    const int64_t inner = filled(t);
    for (int64_t j = begin, blocks; j < end; j += blocks * WIDTH) {
        blocks = panel_blocks(t->columns, j);
        const int8_t *w = (const int8_t *)t->weight + j * inner;
#define PANEL(blocks) linear8_panel(blocks, t, rows, a, row, inner, w, scale, zero, columns_from(output, j), j)
        if (blocks == 1) PANEL(1);
        else if (blocks == 2) PANEL(2);
        else PANEL(BLOCKS);
#undef PANEL
    }
}
#endif

#endif
