/* Linear maps over the channels of a map, for inference, with what folding leaves around them: a norm and a ReLU
 * before, a sum with what is there, a norm and a ReLU after.
 *
 * Weights come in panels of BLOCKS vectors of columns (the last ones narrower: of 2 and of 1 vector), each [inner][panel]
 * and one behind the other, so that a product reads them in one line. Every output is summed in one order whatever the
 * number of threads and pixels: over the channels, in parts of INNER.
 */
#include "footprint.h"

enum { LINEAR_ROWS = 6, /* with BLOCKS vectors of weights they fill the registers */
       INNER = 512,     /* channels that are in cache together, as a part of a panel and of the pixels */
       TILE = 60 };     /* pixels that a thread takes at most */

struct linear {
    int64_t pixels, inner, columns;
    struct matrix input;                /* [pixels][inner] */
    const float *scale, *shift;         /* of the norm before: [inner]; or NULL: neither norm nor ReLU */
    const float *weight;                /* panels */
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
    _mm512_mask_storeu_ps(to, (1u << used) - 1, (__m512)x);
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

/* One register block: `rows` pixels of input a, the part of a panel that belongs to its `inner` channels. */
INLINE void linear_block(const int rows, const int blocks, const struct linear *t, struct matrix a, const float *w,
                         int64_t inner, struct matrix output, int64_t column, int first, int last, int ahead) {
    const int64_t used = t->columns - column < blocks * WIDTH ? t->columns - column : blocks * WIDTH;
    vec sum[LINEAR_ROWS][BLOCKS], line[BLOCKS];
    if (first) /* the rows of the next block: they come from memory where the map is larger than the caches */
        for (int m = rows; m < rows + ahead; m++)
            for (int b = 0; b < blocks; b++) __builtin_prefetch(row_of(output, m) + b * WIDTH, 1);
    for (int b = 0; b < blocks; b++) line[b] = (vec){0};
    if (first && t->bias) read_some(t->bias + column, used, blocks, line);
    for (int m = 0; m < rows; m++) {
        for (int b = 0; b < blocks; b++) sum[m][b] = (vec){0};
        if (!first || t->add) read_some(row_of(output, m), used, blocks, sum[m]);
        for (int b = 0; b < blocks; b++) sum[m][b] += line[b];
    }
    for (int64_t i = 0; i < inner; i++) {
        for (int b = 0; b < blocks; b++) line[b] = at(w + (i * blocks + b) * WIDTH);
        for (int m = 0; m < rows; m++)
            for (int b = 0; b < blocks; b++) sum[m][b] += a.at[m * a.row + i] * line[b];
    }
    if (last && t->out_scale) {
        vec shift[BLOCKS];
        read_some(t->out_scale + column, used, blocks, line);
        read_some(t->out_shift + column, used, blocks, shift);
        for (int m = 0; m < rows; m++)
            for (int b = 0; b < blocks; b++) sum[m][b] = positive(sum[m][b] * line[b] + shift[b]);
    }
    for (int m = 0; m < rows; m++) write_some(sum[m], used, blocks, row_of(output, m));
}

INLINE void linear_panel(const int blocks, const struct linear *t, int64_t rows, struct matrix a, const float *w,
                         int64_t inner, struct matrix output, int64_t column, int first, int last) {
#define CASE(n) case n: linear_block(n, blocks, t, a, w, inner, output, column, first, last, rows - n < n ? rows - n : n); break;
    for (int64_t parts = (rows + LINEAR_ROWS - 1) / LINEAR_ROWS, some; parts > 0; parts--, rows -= some) {
        some = (rows + parts - 1) / parts;
        switch (some) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
        a = rows_from(a, some), output = rows_from(output, some);
    }
#undef CASE
}

/* Works on tiles of pixels and chunks of columns until none is left. */
static void work_linear(void *argument) {
    struct linear *t = argument;
    const int64_t tiles = (t->pixels + t->tile - 1) / t->tile, chunks = (t->columns + t->chunk - 1) / t->chunk;
    float *scratch = malloc(4 * TILE * INNER);
    if (!scratch) {
        t->failed = NO_MEMORY;
        return;
    }
    for (;;) {
        const int64_t n = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED);
        if (n >= tiles * chunks) break;
        const int64_t here = n / chunks * t->tile, begin = n % chunks * t->chunk;
        const int64_t rows = t->pixels - here < t->tile ? t->pixels - here : t->tile;
        const int64_t end = t->columns - begin < t->chunk ? t->columns : begin + t->chunk;
        for (int64_t k = 0; k < t->inner; k += INNER) {
            const int64_t inner = t->inner - k < INNER ? t->inner - k : INNER;
            const int first = k == 0, last = k + inner == t->inner;
            struct matrix a = columns_from(rows_from(t->input, here), k);
            if (t->scale) {
                for (int64_t m = 0; m < rows; m++)
                    scale_shift_relu(row_of(a, m), t->scale + k, t->shift + k, t->limit, inner, scratch + m * inner);
                a = (struct matrix){scratch, inner};
            }
            for (int64_t j = begin, blocks; j < end; j += blocks * WIDTH) {
                blocks = panel_blocks(t->columns, j);
                const float *w = t->weight + j * t->inner + k * blocks * WIDTH;
                const struct matrix output = columns_from(rows_from(t->output, here), j);
#define PANEL(blocks) linear_panel(blocks, t, rows, a, w, inner, output, j, first, last)
                if (blocks == 1) PANEL(1);
                else if (blocks == 2) PANEL(2);
                else PANEL(BLOCKS);
#undef PANEL
            }
        }
    }
    free(scratch);
}

/* Few pixels are shared out by columns too, so that every thread has something to do. */
void san_linear_run(struct linear *t, parallel_function parallel, unsigned threads) {
    const int64_t panel = BLOCKS * WIDTH, panels = (t->columns + panel - 1) / panel;
    const int64_t tiles = (t->pixels + TILE - 1) / TILE;
    if (tiles == 0) return;
    t->tile = (t->pixels + tiles - 1) / tiles;
    int64_t chunks = threads > 1 && tiles < 4 * threads ? (4 * threads + tiles - 1) / tiles : 1;
    if (chunks > panels) chunks = panels;
    t->chunk = (panels + chunks - 1) / chunks * panel;
    run(work_linear, t, parallel, threads);
}

int64_t san_linear_bytes(void) { return sizeof(struct linear); }

/* Columns of a whole panel. */
int64_t san_panel(void) { return BLOCKS * WIDTH; }
