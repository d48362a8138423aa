/* Rows of float32, multiplied with a matrix of bfloat16 weights and summed up in float32, for the CPU.
 *
 * A bfloat16 is the upper half of the float32 of the same value, so that nothing is lost by it where the
 * weights were published as bfloat16, and half as much is to be read. At the few rows of a decode step reading
 * is most of the work, if the processor computes at the same time. So weights are widened in the registers,
 * those that come next are asked for early, and each thread reads its part from the first byte to the last.
 *
 * The weights are packed in panels of WIDTH rows of the matrix, [in_features][LANES] words each: the word of an
 * input has the weight of row `lane` of the panel in its lower half, and that of row `LANES + lane` in its upper.
 *
 * A row's result does not depend on how many there are beside it: its products are added in the same order.
 */

#include <stdint.h>

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
    DEPTH = 256,     /* so many inputs at a time, and their part of a panel, stay in the nearest cache */
    MOST = 96, /* so many rows at a time stay in the next one */
};

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4)));

const int64_t width = WIDTH;
static const float zeros[WIDTH];

/* Adds the products of `depth` inputs of `rows` rows, [depth][rows], with a panel's weights, [depth][LANES], to
 * what is at `before`, and writes the sums, [rows][WIDTH], to `y`. */
static inline __attribute__((always_inline)) void add_products(
    const int rows, const float *x, const uint32_t *weight, int64_t depth,
    const float *before, int64_t before_stride, float *y, int64_t y_stride)
{
    floats lower[ROWS], upper[ROWS];
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++) lower[row] = upper[row] = (floats){0};
    for (int64_t k = 0; k < depth; k++, x += rows, weight += LANES) {
        __builtin_prefetch(weight + DEPTH * LANES, 0, 2);
        const words pair = *(const words *)weight;
        const floats lower_weight = (floats)(pair << 16), upper_weight = (floats)(pair & 0xffff0000u);
#pragma GCC unroll 16
        for (int row = 0; row < rows; row++) {
            lower[row] += lower_weight * x[row];
            upper[row] += upper_weight * x[row];
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++) {
        const float *from = before + row * before_stride;
        float *to = y + row * y_stride;
        *(floats *)to = *(const floats *)from + lower[row];
        *(floats *)(to + LANES) = *(const floats *)(from + LANES) + upper[row];
    }
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* As `linear`, for at least one row, and at most MOST. */
static void multiply(
    const float *x, const uint32_t *weight, const float *bias, float *y, float *scratch,
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
                    const float *inputs = scratch + tile * in_features + k * count;
                    const uint32_t *part = weight + panel / WIDTH * in_features * LANES + k * LANES;
                    float *sums = y + tile * out_features + panel;
                    const float *before = k ? sums : bias ? bias + panel : zeros;
                    const int64_t before_stride = k ? out_features : 0;
                    switch (count) { /* sums stay in registers where the compiler knows how many there are */
#define CASE(COUNT) \
    case COUNT: add_products(COUNT, inputs, part, depth, before, before_stride, sums, out_features); break;
                        EACH_COUNT(CASE)
                    }
                }
    }
}

/* y = x * weight^T + bias
 *
 * x: [rows][in_features]; weight: [out_features / WIDTH][in_features][LANES]; bias: [out_features], or none;
 * y: [rows][out_features], of which out_features is a multiple of WIDTH; scratch: of x's size. */
void linear(
    const float *x, const uint32_t *weight, const float *bias, float *y, float *scratch,
    int64_t rows, int64_t in_features, int64_t out_features, int threads)
{
    for (int64_t row = 0; row < rows; row += MOST)
        multiply(x + row * in_features, weight, bias, y + row * out_features, scratch,
                 least(MOST, rows - row), in_features, out_features, threads);
}
