// RMSNorm of rows of a width: fp32 inside, one rounding at each store. Row r of a tensor with runs of `run` rows begins
// at r / run * stride + r % run * width; without a run, rows are contiguous.

#define BLOCKS_OF_ROWS 64  // each with partial sums of the weight's gradient: the order depends on the shape alone
#define UNROLLED 4         // independent sums, to hide the latency of additions

// s = x + residual for n elements from c on, as it was rounded; x itself without a residual.
INLINE V stream_DTYPE(const DTYPE *x, const DTYPE *residual, DTYPE *s, int64_t c, int64_t n) {
    if (!residual) return load_part_DTYPE(x + c, n);
    store_part_DTYPE(s + c, load_part_DTYPE(x + c, n) + load_part_DTYPE(residual + c, n), n);
    return load_part_DTYPE(s + c, n);
}

INLINE void forward_row_DTYPE(const DTYPE *x, const DTYPE *residual, const f32 *weight, DTYPE *y, DTYPE *s, f32 *rstd,
                              int64_t width, float eps) {
    V squares[UNROLLED] = {};
    int64_t c = 0;
    for (; c + UNROLLED * LANES <= width; c += UNROLLED * LANES)
#pragma GCC unroll 4
        for (int i = 0; i < UNROLLED; i++) {
            const V v = stream_DTYPE(x, residual, s, c + i * LANES, LANES);
            squares[i] += v * v;
        }
    for (; c < width; c += LANES) {
        const V v = stream_DTYPE(x, residual, s, c, width - c < LANES ? width - c : LANES);
        squares[0] += v * v;
    }
    // Once per row: in double, so that it is rounded once.
    const double total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    *rstd = 1 / __builtin_sqrt(total / width + eps);
    const DTYPE *from = residual ? s : x;
    const V scale = number(*rstd);
    for (c = 0; c + LANES <= width; c += LANES) store_DTYPE(y + c, load_DTYPE(from + c) * scale * load_f32(weight + c));
    const int64_t n = width - c;
    if (n) store_part_DTYPE(y + c, load_part_DTYPE(from + c, n) * scale * load_part_f32(weight + c, n), n);
}

int forward_DTYPE(const DTYPE *restrict x, const DTYPE *restrict residual, const f32 *restrict weight, DTYPE *restrict y,
                  DTYPE *restrict s, f32 *restrict rstd, int64_t rows, int64_t width, int64_t run, int64_t stride,
                  float eps) {
    PARALLEL_FOR(rows * width)
    for (int64_t r = 0; r < rows; r++) {
        const DTYPE *const row = x + r / run * stride + r % run * width;
        if (residual)
            forward_row_DTYPE(row, residual + r * width, weight, y + r * width, s + r * width, rstd + r, width, eps);
        else
            forward_row_DTYPE(row, 0, weight, y + r * width, 0, rstd + r, width, eps);
    }
    return 0;
}

// Accumulates the gradient of the weight; the lanes of the returned vector sum to that of dy * weight * s.
INLINE V products_DTYPE(const DTYPE *dy, const DTYPE *s, const f32 *weight, f32 *dweight, V rstd, int64_t c, int64_t n) {
    const V product = load_part_DTYPE(dy + c, n) * load_part_DTYPE(s + c, n);
    add_f32(dweight + c, product * rstd);
    return product * load_part_f32(weight + c, n);
}

INLINE void gradient_DTYPE(const DTYPE *dy, const DTYPE *ds, const DTYPE *s, const f32 *weight, DTYPE *dx, V rstd, V slope,
                           int64_t c, int64_t n) {
    V d = (load_part_DTYPE(dy + c, n) * load_part_f32(weight + c, n) - load_part_DTYPE(s + c, n) * slope) * rstd;
    if (ds) d += load_part_DTYPE(ds + c, n);
    store_part_DTYPE(dx + c, d, n);
}

INLINE void backward_row_DTYPE(const DTYPE *dy, const DTYPE *ds, const DTYPE *s, const f32 *weight, f32 rstd, DTYPE *dx,
                               f32 *dweight, int64_t width) {
    V sums[UNROLLED] = {};
    const V scale = number(rstd);
    int64_t c = 0;
    for (; c + UNROLLED * LANES <= width; c += UNROLLED * LANES)
#pragma GCC unroll 4
        for (int i = 0; i < UNROLLED; i++)
            sums[i] += products_DTYPE(dy, s, weight, dweight, scale, c + i * LANES, LANES);
    for (; c < width; c += LANES)
        sums[0] += products_DTYPE(dy, s, weight, dweight, scale, c, width - c < LANES ? width - c : LANES);
    const float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    const V slope = number(total / width * rstd * rstd);
    for (c = 0; c + LANES <= width; c += LANES) gradient_DTYPE(dy, ds, s, weight, dx, scale, slope, c, LANES);
    if (c < width) gradient_DTYPE(dy, ds, s, weight, dx, scale, slope, c, width - c);
}

int backward_DTYPE(const DTYPE *restrict dy, const DTYPE *restrict ds, const DTYPE *restrict s, const f32 *restrict weight,
                   const f32 *restrict rstd, DTYPE *restrict dx, f32 *restrict dweight, int64_t rows, int64_t width,
                   int64_t run, int64_t dy_stride, int64_t s_stride) {
    const int64_t blocks = rows < BLOCKS_OF_ROWS ? rows : BLOCKS_OF_ROWS, space = (width + LANES - 1) / LANES * LANES;
    f32 *const partial = calloc(blocks * space, sizeof(f32));
    if (!partial) return 1;
    PARALLEL_FOR(rows * width)
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t r = rows * block / blocks; r < rows * (block + 1) / blocks; r++) {
            const DTYPE *const dy_row = dy + r / run * dy_stride + r % run * width;
            const DTYPE *const s_row = s + r / run * s_stride + r % run * width;
            f32 *const mine = partial + block * space;
            if (ds)
                backward_row_DTYPE(dy_row, ds + r * width, s_row, weight, rstd[r], dx + r * width, mine, width);
            else
                backward_row_DTYPE(dy_row, 0, s_row, weight, rstd[r], dx + r * width, mine, width);
        }
    for (int64_t c = 0; c < width; c += LANES) {
        D total = {};
        for (int64_t block = 0; block < blocks; block++)
            total += __builtin_convertvector(load_f32(partial + block * space + c), D);
        store_part_f32(dweight + c, __builtin_convertvector(total, V), width - c < LANES ? width - c : LANES);
    }
    free(partial);
    return 0;
}
