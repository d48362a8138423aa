/* Rows of float32, multiplied with a matrix of bfloat16 or int8 weights, and summed up in float32, on a CPU.
 *
 * At the few rows of a decode step the time goes into reading the weights, if the processor computes
 * meanwhile. So they become float32 in the registers only, those that come next are asked for early, and each
 * thread reads its part of them from the first byte to the last.
 *
 * They are packed in panels of WIDTH rows of the matrix, a word for each lane: of one input, as bfloat16, the
 * weight of the panel's row `lane` in the lower half, and that of row `LANES + lane` in the upper; or of two
 * inputs, as int8, those of the first in the lower half likewise, and those of the second in the upper.
 *
 * A row's result does not depend on how many there are beside it: its products are added in the same order.
 */

#include <stdint.h>

#ifndef INPUTS
#error "how many a word has weights for: 1 of bfloat16, or 2 of int8"
#endif

#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 14 }; /* 2 x 14 sums, 2 weights and an input: there are 32 registers */
#define EACH_COUNT(_) _(1) _(2) _(3) _(4) _(5) _(6) _(7) _(8) _(9) _(10) _(11) _(12) _(13) _(14)
#elif defined(__AVX2__) && defined(__FMA__)
enum { LANES = 8, ROWS = 6 }; /* there are 16 */
#define EACH_COUNT(_) _(1) _(2) _(3) _(4) _(5) _(6)
#else
#error "measured with AVX2 and AVX-512 only"
#endif

enum {
    WIDTH = 2 * LANES,
    DEPTH = 256, /* so many inputs at a time, and their part of a panel, stay in the nearest cache */
    MOST = 96,   /* so many rows at a time stay in the next one */
};

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

/* The same where they lie in memory, among others of their kind. */
typedef floats floats_there __attribute__((aligned(4), may_alias));
typedef words words_there __attribute__((aligned(4), may_alias));

const int64_t width = WIDTH;
static const float zeros[WIDTH], ones[WIDTH] = {[0 ... WIDTH - 1] = 1};

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* Of one of the inputs that words are for, the weights of the lower rows, or of the upper ones, as float32. */
ALWAYS_INLINE floats widen(const words word, const int input, const int upper)
{
    if (INPUTS == 1) /* a bfloat16 is the upper half of the float32 of the same value */
        return upper ? (floats)(word & 0xffff0000u) : (floats)(word << 16);
    return __builtin_convertvector((ints)(word << (24 - 16 * input - 8 * upper)) >> 24, floats);
}

/* Adds the products of `depth` inputs of `rows` rows, x, with a panel's weights to what is at `before`.
 *
 * x: [depth][rows]; weight: [depth / INPUTS][LANES], each to be multiplied with the scale of its row, [WIDTH];
 * before, y: [rows][WIDTH], rows being a stride apart. */
ALWAYS_INLINE void add_products(
    const int rows, const float *x, const uint32_t *weight, const float *scale, int64_t depth,
    const float *before, int64_t before_stride, float *y, int64_t y_stride)
{
    floats lower[ROWS], upper[ROWS];
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++) lower[row] = upper[row] = (floats){0};
    for (int64_t k = 0; k < depth; k += INPUTS, weight += LANES) {
        __builtin_prefetch(weight + DEPTH / INPUTS * LANES, 0, 2);
        const words word = *(const words_there *)weight;
#pragma GCC unroll 2
        for (int input = 0; input < INPUTS; input++, x += rows) {
            const floats lower_weight = widen(word, input, 0), upper_weight = widen(word, input, 1);
#pragma GCC unroll 16
            for (int row = 0; row < rows; row++) {
                lower[row] += lower_weight * x[row];
                upper[row] += upper_weight * x[row];
            }
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++) {
        const floats_there *from = (const floats_there *)(before + row * before_stride);
        const floats_there *factor = (const floats_there *)scale;
        floats_there *to = (floats_there *)(y + row * y_stride);
        to[0] = from[0] + factor[0] * lower[row];
        to[1] = from[1] + factor[1] * upper[row];
    }
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* As `linear`, for at least one row, and at most MOST. */
static void multiply(
    const float *x, const uint32_t *weight, const float *scale, const float *bias, float *y, float *scratch,
    int64_t rows, int64_t in_features, int64_t out_features, int threads)
{
    const int64_t tiles = (rows + ROWS - 1) / ROWS, height = (rows + tiles - 1) / tiles;
#pragma omp parallel num_threads(threads)
    {
        /* The inputs of a tile's rows side by side, as they are read: [tiles][in_features][rows of the tile] */
#pragma omp for collapse(2)
        for (int64_t k = 0; k < in_features; k += DEPTH)
            for (int64_t row = 0; row < rows; row++) {
                const int64_t tile = row / height * height, count = least(height, rows - tile);
                float *to = scratch + tile * in_features + (row - tile);
                for (int64_t i = k; i < least(k + DEPTH, in_features); i++)
                    to[i * count] = x[row * in_features + i];
            }
#pragma omp for
        for (int64_t panel = 0; panel < out_features; panel += WIDTH)
            for (int64_t k = 0; k < in_features; k += DEPTH)
                for (int64_t tile = 0; tile < rows; tile += height) {
                    const int64_t count = least(height, rows - tile), depth = least(DEPTH, in_features - k);
                    const float *from = scratch + tile * in_features + k * count;
                    const uint32_t *part = weight + (panel / WIDTH * in_features + k) / INPUTS * LANES;
                    const float *scales = scale ? scale + panel : ones;
                    float *sums = y + tile * out_features + panel;
                    const float *before = k ? sums : bias ? bias + panel : zeros;
                    const int64_t stride = k ? out_features : 0;
                    switch (count) { /* sums stay in registers where the compiler knows how many there are */
#define CASE(COUNT) \
    case COUNT: add_products(COUNT, from, part, scales, depth, before, stride, sums, out_features); break;
                        EACH_COUNT(CASE)
                    }
                }
    }
}

/* y = x * (scale * weight)^T + bias
 *
 * x: [rows][in_features], a multiple of INPUTS; weight: [out_features / WIDTH][in_features / INPUTS][LANES];
 * scale, bias: [out_features], or none; y: [rows][out_features], a multiple of WIDTH; scratch: of x's size. */
void linear(
    const float *x, const uint32_t *weight, const float *scale, const float *bias, float *y, float *scratch,
    int64_t rows, int64_t in_features, int64_t out_features, int threads)
{
    for (int64_t row = 0; row < rows; row += MOST)
        multiply(x + row * in_features, weight, scale, bias, y + row * out_features, scratch,
                 least(MOST, rows - row), in_features, out_features, threads);
}
