// Softmax cross-entropy of rows of logits against one target each, and the gradient in place of the logits: fp32 inside. A row
// is read three times, but comes from memory once.

// n elements of a row from c on, padded with -inf, which affects neither the maximum nor a sum of exponentials.
INLINE V logits_DTYPE(const DTYPE *row, int64_t c, int64_t n) {
    return n == LANES ? load_DTYPE(row + c)
                      : k_select(lanes_below(n), load_part_DTYPE(row + c, n), number(-__builtin_inff()));
}

// nats[r] = log(sum(exp(logits[r]))) - logits[r][targets[r]], and lse[r] that logarithm. With `differentiate` the logits
// become the gradient of nats + z_loss * lse^2.
int cross_entropy_DTYPE(DTYPE *restrict logits, const int64_t *restrict targets, f32 *restrict nats, f32 *restrict lse,
                        int64_t rows, int64_t width, int64_t differentiate, float z_loss) {
    PARALLEL_FOR(rows * width)
    for (int64_t r = 0; r < rows; r++) {
        DTYPE *const row = logits + r * width;
        V most[2] = {number(-__builtin_inff()), number(-__builtin_inff())}, sums[2] = {};
        int64_t c = 0;
        for (; c + 2 * LANES <= width; c += 2 * LANES)
            for (int i = 0; i < 2; i++) most[i] = k_max(most[i], load_DTYPE(row + c + i * LANES));
        for (; c < width; c += LANES)
            most[0] = k_max(most[0], logits_DTYPE(row, c, width - c < LANES ? width - c : LANES));
        const float top = largest(k_max(most[0], most[1])), own = load_part_DTYPE(row + targets[r], 1)[0];
        for (c = 0; c + 2 * LANES <= width; c += 2 * LANES)
            for (int i = 0; i < 2; i++) sums[i] += k_exp(load_DTYPE(row + c + i * LANES) - top);
        for (; c < width; c += LANES)
            sums[0] += k_exp(logits_DTYPE(row, c, width - c < LANES ? width - c : LANES) - top);
        const float total = sum(sums[0] + sums[1]), logarithm = __builtin_logf(total);
        nats[r] = (top - own) + logarithm;
        lse[r] = top + logarithm;
        if (!differentiate) continue;
        const V share = number((1 + 2 * z_loss * lse[r]) / total);
        for (c = 0; c + LANES <= width; c += LANES) store_DTYPE(row + c, k_exp(load_DTYPE(row + c) - top) * share);
        if (c < width) store_part_DTYPE(row + c, k_exp(load_part_DTYPE(row + c, width - c) - top) * share, width - c);
        store_part_DTYPE(row + targets[r], k_exp(number(own - top)) * share - 1.0f, 1);
    }
    return 0;
}
