// The rotation of pairs of channels (i, i + half) of heads, by the angles of a token's position: fp32 inside, one rounding at
// each store.

// `direction` is 1 for the rotation and -1 for the inverse rotation.
INLINE void pair_DTYPE(const DTYPE *x, DTYPE *y, const f32 *cosine, const f32 *sine, float direction, int64_t half, int64_t c,
                       int64_t n) {
    const V first = load_part_DTYPE(x + c, n), second = load_part_DTYPE(x + half + c, n);
    const V along = load_part_f32(cosine + c, n), across = direction * load_part_f32(sine + c, n);
    store_part_DTYPE(y + c, first * along - second * across, n);
    store_part_DTYPE(y + half + c, second * along + first * across, n);
}

// x (batch, length, heads, 2 half) with strides of the first three dimensions, y the same and contiguous,
// cosine and sine (length, half).
int rotate_DTYPE(const DTYPE *restrict x, DTYPE *restrict y, const f32 *restrict cosine, const f32 *restrict sine,
                 int64_t batch, int64_t length, int64_t heads, int64_t half, int64_t batch_stride, int64_t token_stride,
                 int64_t head_stride, float direction) {
    PARALLEL_FOR(batch * length * heads * half)
    for (int64_t token = 0; token < batch * length; token++) {
        const int64_t position = token % length;
        const DTYPE *const from = x + token / length * batch_stride + position * token_stride;
        DTYPE *const to = y + token * heads * 2 * half;
        const f32 *const along = cosine + position * half, *const across = sine + position * half;
        for (int64_t head = 0; head < heads; head++) {
            const DTYPE *const h = from + head * head_stride;
            DTYPE *const t = to + head * 2 * half;
            int64_t c = 0;
            for (; c + LANES <= half; c += LANES) pair_DTYPE(h, t, along, across, direction, half, c, LANES);
            if (c < half) pair_DTYPE(h, t, along, across, direction, half, c, half - c);
        }
    }
    return 0;
}
