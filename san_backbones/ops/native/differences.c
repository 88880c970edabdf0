/* Batch statistics of the differences q_i - k_j over all pairs of a pixel i and a pixel j of its footprint, and their
 * gradients: statistics.py has the mathematics. Sums are float64, over q and k as differences from their first pixel.
 */
#include "footprint.h"

enum differences_mode { DIFFERENCE_SUMS, DIFFERENCE_GRADIENT };
enum { SUMS = 4 }; /* over the batch: of q, of k by its share of all boxes, of q (q - 2 box k), of k^2 by its share */

/* For every pixel of an axis those whose sum is wanted: pixels[starts[x]] to pixels[starts[x + 1]] - 1. */
struct axis {
    const int64_t *starts, *pixels;
};

struct differences {
    int64_t mode, batch, height, width, channels, kernel, slots;
    struct matrix query, key;            /* [batch * height * width][channels] */
    struct axis rows, columns;           /* what every pixel sees, `kernel` pixels each */
    struct axis seeing_rows, seeing_columns; /* which pixels see it */
    double *sums;                        /* [slots][SUMS][channels] */
    const double *slope, *level;         /* [channels]: gradients are slope (q - box k) + level, and for k the like */
    struct matrix d_query, d_key;
    int64_t next, failed;
};

/* sum[x] = sum over what pixel (y, x) sees, by the lists of both axes, of map - first, whose first pixel is of the
 * image; `line`, too, is [width][channels]. */
INLINE void sum_footprints(const struct differences *t, const int64_t channels, struct axis rows, struct axis columns,
                           struct matrix map, const float *first, int64_t y, double *restrict line,
                           double *restrict sum) {
    const int64_t width = t->width;
    memset(line, 0, 8 * width * channels), memset(sum, 0, 8 * width * channels);
    for (int64_t a = rows.starts[y]; a < rows.starts[y + 1]; a++)
        for (int64_t x = 0; x < width; x++) {
            const float *restrict from = row_of(map, rows.pixels[a] * width + x);
            for (int64_t c = 0; c < channels; c++) line[x * channels + c] += (double)from[c] - first[c];
        }
    for (int64_t x = 0; x < width; x++)
        for (int64_t b = columns.starts[x]; b < columns.starts[x + 1]; b++)
            for (int64_t c = 0; c < channels; c++) sum[x * channels + c] += line[columns.pixels[b] * channels + c];
}

/* Row y of an image. `seen`, and `seeing` for gradients: [width][channels]. */
INLINE void row_of_differences(const struct differences *t, const int64_t channels, int64_t image, int64_t y,
                               double *restrict line, double *restrict seen, double *restrict seeing,
                               double *restrict sums) {
    const int64_t width = t->width, start = image * t->height * width;
    const double part = 1. / (t->kernel * t->kernel);
    const float *restrict first_q = t->query.at, *restrict first_k = t->key.at;
    sum_footprints(t, channels, t->rows, t->columns, rows_from(t->key, start), first_k, y, line, seen);
    if (t->mode == DIFFERENCE_GRADIENT)
        sum_footprints(t, channels, t->seeing_rows, t->seeing_columns, rows_from(t->query, start), first_q, y, line,
                       seeing);
    for (int64_t x = 0; x < width; x++) {
        const int64_t here = start + y * width + x, times = (t->seeing_rows.starts[y + 1] - t->seeing_rows.starts[y]) *
                             (t->seeing_columns.starts[x + 1] - t->seeing_columns.starts[x]);
        const double share = times * part;
        const float *restrict q = row_of(t->query, here), *restrict k = row_of(t->key, here);
        const double *restrict box = seen + x * channels, *restrict spread = seeing + x * channels;
        if (t->mode == DIFFERENCE_GRADIENT) {
            float *restrict d_q = row_of(t->d_query, here), *restrict d_k = row_of(t->d_key, here);
            for (int64_t c = 0; c < channels; c++) {
                const double qc = (double)q[c] - first_q[c], kc = (double)k[c] - first_k[c];
                d_q[c] = t->slope[c] * (qc - box[c] * part) + t->level[c];
                d_k[c] = t->slope[c] * (share * kc - spread[c] * part) - share * t->level[c];
            }
        } else
            for (int64_t c = 0; c < channels; c++) {
                const double qc = (double)q[c] - first_q[c], kc = (double)k[c] - first_k[c];
                sums[c] += qc;
                sums[channels + c] += share * kc;
                sums[2 * channels + c] += qc * (qc - 2 * part * box[c]);
                sums[3 * channels + c] += share * kc * kc;
            }
    }
}

/* Works on slots, each a fixed share of the rows, until none is left. */
static void work_differences(void *argument) {
    struct differences *t = argument;
    const int64_t size = t->width * t->channels;
    double *line = malloc(3 * sizeof(double) * size);
    if (!line) {
        t->failed = NO_MEMORY;
        return;
    }
    for (;;) {
        const int64_t slot = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED), rows = t->batch * t->height;
        if (slot >= t->slots) break;
        double *sums = t->mode == DIFFERENCE_GRADIENT ? NULL : t->sums + slot * SUMS * t->channels;
        for (int64_t row = rows * slot / t->slots; row < rows * (slot + 1) / t->slots; row++)
#define ROW(channels) \
    row_of_differences(t, channels, row / t->height, row % t->height, line, line + size, line + 2 * size, sums)
            switch (t->channels) { /* loops over few channels are quick where their number is known */
                case 2: ROW(2); break;
                case 4: ROW(4); break;
                case 16: ROW(16); break;
                default: ROW(t->channels);
            }
#undef ROW
    }
    free(line);
}

void san_differences_run(struct differences *t, parallel_function parallel, unsigned threads) {
    run(work_differences, t, parallel, threads);
}

int64_t san_differences_bytes(void) { return sizeof(struct differences); }
