// Softmax cross-entropy of rows of logits against one target each, and the gradient in place of the logits: fp32 inside. A row
// is read three times, but comes from memory once.

// A logit x, or cap * tanh(x / cap) of it.
INLINE V capped_DTYPE(V x, float cap) { return cap > 0 ? cap * k_tanh(x / cap) : x; }
// The derivative of `capped` at x.
INLINE V cap_slope_DTYPE(V x, float cap) { return cap > 0 ? k_sech2(k_tanh(x / cap), x / cap) : number(1.0f); }

// n elements of a row from c on, padded with -inf, which affects neither the maximum nor a sum of exponentials.
INLINE V logits_DTYPE(const DTYPE *row, int64_t c, int64_t n, float cap) {
    return n == LANES ? capped_DTYPE(load_DTYPE(row + c), cap)
                      : k_select(lanes_below(n), capped_DTYPE(load_part_DTYPE(row + c, n), cap),
                                 number(-__builtin_inff()));
}

// nats[r] = log(sum(exp(logits[r]))) - logits[r][targets[r]], and lse[r] that logarithm; both 0 where the target is `ignore`.
// With `differentiate` the logits become the gradient of nats + z_loss * lse^2. cap: see `capped`; 0: none.
int cross_entropy_DTYPE(DTYPE *restrict logits, const int64_t *restrict targets, f32 *restrict nats, f32 *restrict lse,
                        int64_t rows, int64_t width, int64_t differentiate, int64_t ignore, float z_loss, float cap) {
    PARALLEL_FOR(rows * width)
    for (int64_t r = 0; r < rows; r++) {
        DTYPE *const row = logits + r * width;
        int64_t c = 0;
        if (targets[r] == ignore) {
            nats[r] = lse[r] = 0;
            if (differentiate) __builtin_memset(row, 0, (size_t)width * sizeof(DTYPE));
            continue;
        }
        V most[2] = {number(-__builtin_inff()), number(-__builtin_inff())}, sums[2] = {};
        for (; c + 2 * LANES <= width; c += 2 * LANES)
            for (int i = 0; i < 2; i++) most[i] = k_max(most[i], capped_DTYPE(load_DTYPE(row + c + i * LANES), cap));
        for (; c < width; c += LANES)
            most[0] = k_max(most[0], logits_DTYPE(row, c, width - c < LANES ? width - c : LANES, cap));
        const float top = largest(k_max(most[0], most[1]));
        const V raw = load_part_DTYPE(row + targets[r], 1);
        const float own = capped_DTYPE(raw, cap)[0];
        for (c = 0; c + 2 * LANES <= width; c += 2 * LANES)
            for (int i = 0; i < 2; i++) sums[i] += k_exp(capped_DTYPE(load_DTYPE(row + c + i * LANES), cap) - top);
        for (; c < width; c += LANES)
            sums[0] += k_exp(logits_DTYPE(row, c, width - c < LANES ? width - c : LANES, cap) - top);
        const float total = sum(sums[0] + sums[1]), logarithm = __builtin_logf(total);
        nats[r] = (top - own) + logarithm;
        lse[r] = top + logarithm;
        if (!differentiate) continue;
        const V share = number((1 + 2 * z_loss * lse[r]) / total);
        for (c = 0; c < width; c += LANES) {
            const int64_t n = width - c < LANES ? width - c : LANES;
            const V x = n == LANES ? load_DTYPE(row + c) : load_part_DTYPE(row + c, n);
            V d = k_exp(capped_DTYPE(x, cap) - top) * share;
            if (cap > 0) d *= cap_slope_DTYPE(x, cap);
            if (n == LANES) store_DTYPE(row + c, d);
            else store_part_DTYPE(row + c, d, n);
        }
        store_part_DTYPE(row + targets[r], (k_exp(number(own - top)) * share - 1.0f) * cap_slope_DTYPE(raw, cap), 1);
    }
    return 0;
}
