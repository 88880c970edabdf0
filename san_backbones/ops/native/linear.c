/* Linear maps over the channels of a map, for inference, with what folding leaves around them: a norm and a ReLU
 * before, a sum with what is there, a norm and a ReLU after.
 *
 * Weights come in panels of BLOCKS vectors of columns (the last ones narrower: of 2 and of 1 vector), each [inner][panel]
 * and one behind the other, so that a product reads them in one line. Every output is summed in one order whatever the
 * number of threads and pixels: over the channels, in parts of INNER.
 *
 * In 8 bits, where the processor has AVX-512 VNNI or, better, AMX: weights are rounded with one scale per column, pixels
 * when they are read, with a scale and a zero of their own; so no pixel's result depends on what else is in the batch.
 * The integer sums are exact, and so the same with either.
 *
 * In bfloat16, with AMX: weights come rounded, pixels are rounded when they are read; sums are float32.
 */
#include "linear.h"
#if defined(__AVX512F__)
#include <cpuid.h>
#if defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_TILES /* the assembler knows them, and the system is asked in the way that we know */
#endif
#endif

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

/* A tile of pixels and a chunk of columns, `rows` and [begin, end), from pixel `here` on; 0 if none is left. */
struct share { int64_t here, rows, begin, end; };

INLINE int take_share(struct linear *t, struct share *s) {
    const int64_t tiles = (t->pixels + t->tile - 1) / t->tile, chunks = (t->columns + t->chunk - 1) / t->chunk;
    const int64_t n = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED);
    if (n >= tiles * chunks) return 0;
    s->here = n / chunks * t->tile, s->begin = n % chunks * t->chunk;
    s->rows = t->pixels - s->here < t->tile ? t->pixels - s->here : t->tile;
    s->end = t->columns - s->begin < t->chunk ? t->columns : s->begin + t->chunk;
    return 1;
}

/* Works on shares until none is left. */
static void work_linear(void *argument) {
    struct linear *t = argument;
    float *scratch = malloc(4 * TILE * INNER);
    if (!scratch) {
        t->failed = NO_MEMORY;
        return;
    }
    for (struct share s; take_share(t, &s);) {
        const int64_t rows = s.rows;
        for (int64_t k = 0; k < t->inner; k += INNER) {
            const int64_t inner = t->inner - k < INNER ? t->inner - k : INNER;
            const int first = k == 0, last = k + inner == t->inner;
            struct matrix a = columns_from(rows_from(t->input, s.here), k);
            if (t->scale || t->pooled_width) {
                for (int64_t m = 0; m < rows; m++) {
                    float *line = scratch + m * inner;
                    const float *x = input_row(t, s.here + m, k, inner, line);
                    if (t->scale) scale_shift_relu(x, t->scale + k, t->shift + k, t->limit, inner, line);
                }
                a = (struct matrix){scratch, inner};
            }
            for (int64_t j = s.begin, blocks; j < s.end; j += blocks * WIDTH) {
                blocks = panel_blocks(t->columns, j);
                const float *w = (const float *)t->weight + j * t->inner + k * blocks * WIDTH;
                const struct matrix output = columns_from(rows_from(t->output, s.here), j);
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

#if defined(__AVX512F__)
#if defined(HAS_TILES)
/* Registers of AMX: 0 to 3 for sums, [rows][columns], 4 and 5 for pixels, 6 and 7 for weights. The compiler uses none. */
#define LOAD(tile, from, row) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"((int64_t)(row)) : "memory")
#define STORE(tile, to, row) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"((int64_t)(row)) : "memory")
#define CLEAR(tile) __asm__ volatile("tilezero %tmm" #tile)
#define MULTIPLY(pixels, weights, sums) \
    do { \
        if (kind == INT8_AMX) __asm__ volatile("tdpbusd %tmm" #weights ", %tmm" #pixels ", %tmm" #sums); \
        else __asm__ volatile("tdpbf16ps %tmm" #weights ", %tmm" #pixels ", %tmm" #sums); \
    } while (0)

static void configure_tiles(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } all = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) all.bytes[tile] = LINE, all.rows[tile] = TILE_ROWS;
    __asm__ volatile("ldtilecfg %0" : : "m"(all));
}

/* The sums of up to 2 tiles of pixels, `row` bytes apart, and `blocks`, 1 or 2, vectors of a panel of `panel`; `inner`
 * bytes of channels. */
INLINE void tile_sums(const int kind, const int tiles, const int blocks, const uint8_t *a, int64_t row, int64_t inner,
                      const int8_t *w, int64_t panel, int32_t (*sums)[2 * WIDTH]) {
    CLEAR(0);
    CLEAR(1);
    CLEAR(2);
    CLEAR(3);
    for (int64_t i = 0; i < inner; i += LINE) {
        LOAD(4, a + i, row);
        LOAD(6, w + i * panel * WIDTH, panel * LINE);
        MULTIPLY(4, 6, 0);
        if (blocks == 2) {
            LOAD(7, w + i * panel * WIDTH + LINE, panel * LINE);
            MULTIPLY(4, 7, 1);
        }
        if (tiles == 2) {
            LOAD(5, a + TILE_ROWS * row + i, row);
            MULTIPLY(5, 6, 2);
            if (blocks == 2) MULTIPLY(5, 7, 3);
        }
    }
    STORE(0, sums, sizeof *sums);
    if (blocks == 2) STORE(1, *sums + WIDTH, sizeof *sums);
    if (tiles == 2) STORE(2, sums + TILE_ROWS, sizeof *sums);
    if (tiles == 2 && blocks == 2) STORE(3, sums[TILE_ROWS] + WIDTH, sizeof *sums);
}

INLINE void tile_panel(const int kind, const int blocks, const struct linear *t, int64_t rows, const uint8_t *a, int64_t row,
                       int64_t inner, const int8_t *w, int64_t panel, const float *scale, const float *zero,
                       struct matrix output, int64_t column) {
    int32_t sums[2 * TILE_ROWS][2 * WIDTH];
    for (int64_t here = 0; here < rows; here += 2 * TILE_ROWS) {
        const int64_t some = rows - here < 2 * TILE_ROWS ? rows - here : 2 * TILE_ROWS;
        if (some > TILE_ROWS) tile_sums(kind, 2, blocks, a + here * row, row, inner, w, panel, sums);
        else tile_sums(kind, 1, blocks, a + here * row, row, inner, w, panel, sums);
        for (int64_t m = 0; m < some; m++) {
            __m512i sum[1][BLOCKS];
            vec y[1][BLOCKS];
            for (int b = 0; b < blocks; b++) {
                sum[0][b] = _mm512_loadu_si512(sums[m] + b * WIDTH);
                y[0][b] = (vec)_mm512_castsi512_ps(sum[0][b]);
            }
            if (kind == INT8_AMX)
                finish8(1, blocks, t, sum, scale + here + m, zero + here + m, rows_from(output, here + m), column);
            else finish(1, blocks, t, y, rows_from(output, here + m), column);
        }
    }
}

INLINE void tiles(const int kind, const struct linear *t, int64_t rows, const uint8_t *a, int64_t row, int64_t inner,
                  const int8_t *w, int64_t panel, const float *scale, const float *zero, struct matrix output,
                  int64_t column) {
    if (panel == 1) {
        tile_panel(kind, 1, t, rows, a, row, inner, w, panel, scale, zero, output, column);
        return;
    }
    for (int64_t b = 0; b < panel; b += 2)
        tile_panel(kind, 2, t, rows, a, row, inner, w + b * LINE, panel, scale, zero, columns_from(output, b * WIDTH),
                   column + b * WIDTH);
}

/* Rounds a row to bfloat16, to nearest even. */
INLINE void to_bfloat16(const struct linear *t, const float *from, uint8_t *to) {
    for (int64_t i = 0; i < t->inner; i += WIDTH) {
        const int64_t used = t->inner - i < WIDTH ? t->inner - i : WIDTH;
        const vec x = read_input(t, from, i, used);
        __m256i y;
        __asm__("vcvtneps2bf16 %1, %0" : "=v"(y) : "v"((__m512)x));
        _mm256_mask_storeu_epi16(to + 2 * i, (1u << used) - 1, y);
    }
}

/* As work_linear, in bfloat16. */
static void work_bfloat16(void *argument) {
    struct linear *t = argument;
    const int64_t inner = (2 * t->inner + LINE - 1) / LINE * LINE;
    const int64_t row = inner + LINE; /* so that pixels do not meet in one place of the cache */
    uint8_t *scratch = calloc(LARGEST * row + LINE + 4 * t->inner, 1), *a = scratch + LINE - (uintptr_t)scratch % LINE;
    uint8_t *pooled = a + LARGEST * row;
    if (!scratch) {
        t->failed = NO_MEMORY;
        return;
    }
    configure_tiles();
    for (struct share s; take_share(t, &s);) {
        for (int64_t m = 0; m < s.rows; m++)
            to_bfloat16(t, input_row(t, s.here + m, 0, t->inner, (float *)pooled), a + m * row);
        for (int64_t j = s.begin, blocks; j < s.end; j += blocks * WIDTH) {
            blocks = panel_blocks(t->columns, j);
            tiles(BFLOAT16_AMX, t, s.rows, a, row, inner, (const int8_t *)t->weight + j * inner, blocks, NULL, NULL,
                  columns_from(rows_from(t->output, s.here), j), j);
        }
    }
    __asm__ volatile("tilerelease");
    free(scratch);
}

/* Whether the processor has AMX for 8 bits and bfloat16, and the system lets this process use it. */
static int allows_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    unsigned a, b, c, d, extra;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 3) == 3 &&
           __get_cpuid_count(7, 1, &extra, &b, &c, &d) && (extra >> 5 & 1) &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

/* As work_linear, in 8 bits. */
static void work_linear8(void *argument) {
    struct linear *t = argument;
    const int64_t row = rounded_row(t);
    float *scratch = malloc(4 * (t->inner + 2 * LARGEST) + LARGEST * row + LINE);
    if (!scratch) {
        t->failed = NO_MEMORY;
        return;
    }
    float *scale = scratch + t->inner, *zero = scale + LARGEST;
    uint8_t *a = (uint8_t *)(zero + LARGEST); /* what lies behind a pixel's channels meets weights of zero */
    a += LINE - (uintptr_t)a % LINE;
#if defined(HAS_TILES)
    if (t->kind == INT8_AMX) configure_tiles();
#endif
    for (struct share s; take_share(t, &s);) {
        for (int64_t m = 0; m < s.rows; m++) {
            const float *x = input_row(t, s.here + m, 0, t->inner, scratch);
            if (t->scale) quantise(t, 1, x, scratch, a + m * row, scale + m, zero + m);
            else quantise(t, 0, x, scratch, a + m * row, scale + m, zero + m);
        }
        const struct matrix output = rows_from(t->output, s.here);
#if defined(HAS_TILES)
        if (t->kind == INT8_AMX) {
            for (int64_t j = s.begin, blocks; j < s.end; j += blocks * WIDTH) {
                blocks = panel_blocks(t->columns, j);
                tiles(INT8_AMX, t, s.rows, a, row, filled(t), (const int8_t *)t->weight + j * filled(t), blocks, scale, zero,
                      columns_from(output, j), j);
            }
            continue;
        }
#endif
        linear8(t, s.rows, a, row, scale, zero, output, s.begin, s.end);
    }
#if defined(HAS_TILES)
    if (t->kind == INT8_AMX) __asm__ volatile("tilerelease");
#endif
    free(scratch);
}

/* What this build and this processor compute 8 bits with: 0 nothing, 1 VNNI, 2 AMX too. */
int64_t san_int8(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(c >> 11 & 1)) return 0;
#if defined(HAS_TILES)
    if (allows_tiles()) return 2;
#endif
    return 1;
}
#else
static void work_linear8(void *argument) { ((struct linear *)argument)->failed = UNKNOWN_CODE; } /* linear.py does not ask */
int64_t san_int8(void) { return 0; }
#endif
#if !defined(HAS_TILES)
static void work_bfloat16(void *argument) { ((struct linear *)argument)->failed = UNKNOWN_CODE; }
#endif

/* Few pixels are shared out by columns too, so that every thread has something to do. */
void san_linear_run(struct linear *t, parallel_function parallel, unsigned threads) {
    const int64_t panel = BLOCKS * WIDTH, panels = (t->columns + panel - 1) / panel;
    const int amx = t->kind == INT8_AMX || t->kind == BFLOAT16_AMX;
    const int64_t most = amx ? LARGEST : TILE, tiles = (t->pixels + most - 1) / most;
    if (tiles == 0) return;
    t->tile = amx ? most : (t->pixels + tiles - 1) / tiles;
    int64_t chunks = threads > 1 && tiles < 4 * threads ? (4 * threads + tiles - 1) / tiles : 1;
    if (chunks > panels) chunks = panels;
    t->chunk = (panels + chunks - 1) / chunks * panel;
    run(t->kind == FLOAT32 ? work_linear : t->kind == BFLOAT16_AMX ? work_bfloat16 : work_linear8, t, parallel, threads);
}

int64_t san_linear_bytes(void) { return sizeof(struct linear); }

/* Columns of a whole panel. */
int64_t san_panel(void) { return BLOCKS * WIDTH; }
