// The ids that SentencePiece gives a text by a BPE model, found without merging the text.
//
// SentencePiece joins the two neighbours whose concatenation is the piece of the highest score, the leftmost on ties, until no
// concatenation is a piece. Neighbours in its result are exactly what it makes of the two alone, because no merge crosses their
// borders. Conversely, pieces that follow each other so that each two neighbours encode to themselves are its result: the first
// merge across a border would happen in the text of those two alone as well. So the result is the only sequence of pieces in
// which each two neighbours encode to themselves, and each prefix of it is the result of that prefix. The search takes the
// longest piece first and goes back where nothing follows. The method is that of github.com/github/rust-gems (crates/bpe), here
// for characters and byte fallback.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LONGEST 256      // bytes of a piece, at most
#define NONE (-1)        // no piece
#define CHARACTER (-1)   // born before any merge
#define NEVER INT32_MAX  // born: SentencePiece encodes the text of the piece as others
#define VERDICTS 16      // log2 of the pairs that are remembered, 8 bytes each: they should stay in a core's cache

// A hash table. An entry is key << bits | value, and 0 is none; `size` is a power of two, at least twice `count`.
typedef struct {
    uint64_t *entries, size, count;
    int bits;
} Table;

typedef struct {
    uint8_t *text;      // of all pieces, one after the other; control and byte pieces have none. A space is 0x20
    int32_t *start;     // [pieces + 1], in `text`
    int32_t *rank;      // [pieces]: the lower is merged first
    int32_t *byte_id;   // [256]: pieces for the bytes of characters that are no piece
    int32_t *piece_at;  // [nodes] of the trie: the piece that ends there, or NONE
    int32_t *shorter;   // [pieces]: the longest piece that one begins with, or NONE
    int32_t *born;      // [pieces]: the rank; of a character CHARACTER, of a piece that is never made NEVER
    int32_t *left;      // [pieces]: the two that SentencePiece makes it of
    int32_t *right;
    uint64_t *verdicts;  // pairs of pieces, and whether they stay apart
    Table edges;         // of the trie, whose root is node 1: node << 8 | byte -> child
    Table pairs;         // two pieces -> their concatenation, of those that are pieces
    int32_t pieces, nodes;
} Bpe;

static inline uint64_t hash_of(uint64_t key) { return key * 0x9E3779B97F4A7C15u >> 32; }

// The value of a key, or 0.
static inline uint64_t get(const Table *table, uint64_t key) {
    for (uint64_t slot = hash_of(key);; slot++) {
        uint64_t entry = table->entries[slot & (table->size - 1)];
        if (entry == 0 || entry >> table->bits == key) return entry & (((uint64_t)1 << table->bits) - 1);
    }
}

static void place(Table *table, uint64_t entry) {
    uint64_t slot = hash_of(entry >> table->bits);
    while (table->entries[slot & (table->size - 1)]) slot++;
    table->entries[slot & (table->size - 1)] = entry;
}

// Add a key that the table does not have. Return 0 where there is no memory.
static int put(Table *table, uint64_t key, uint64_t value) {
    if (2 * (table->count + 1) > table->size) {
        Table larger = {NULL, table->size ? 2 * table->size : 1 << 12, table->count, table->bits};
        if ((larger.entries = calloc(larger.size, sizeof *larger.entries)) == NULL) return 0;
        for (uint64_t i = 0; i < table->size; i++)
            if (table->entries[i]) place(&larger, table->entries[i]);
        free(table->entries);
        *table = larger;
    }
    table->count++;
    place(table, key << table->bits | value);
    return 1;
}

static inline uint32_t child_of(const Bpe *m, uint32_t node, uint8_t byte) {
    return (uint32_t)get(&m->edges, (uint64_t)node << 8 | byte);
}

static inline uint64_t key_of(int32_t left, int32_t right) { return (uint64_t)(left + 1) << 21 | (uint64_t)(right + 1); }

static inline int32_t joint_of(const Bpe *m, int32_t left, int32_t right) {
    return (int32_t)get(&m->pairs, key_of(left, right)) - 1;
}

static inline int32_t length_of(const Bpe *m, int32_t piece) { return m->start[piece + 1] - m->start[piece]; }

static inline int continues(uint8_t byte) { return (byte & 0xC0) == 0x80; }  // a character of UTF-8 that began before

// The longest piece that a text begins with, or NONE: its first character is none.
static inline int32_t longest(const Bpe *m, const uint8_t *text, const uint8_t *end) {
    int32_t found = NONE;
    for (uint32_t node = 1; text < end && (node = child_of(m, node, *text)) != 0; text++)
        if (m->piece_at[node] != NONE) found = m->piece_at[node];
    return found;
}

// The piece that is exactly this text, or NONE.
static int32_t piece_of(const Bpe *m, const uint8_t *text, const uint8_t *end) {
    uint32_t node = 1;
    for (; text < end; text++)
        if ((node = child_of(m, node, *text)) == 0) return NONE;
    return m->piece_at[node];
}

static int grow_trie(Bpe *m) {
    m->nodes = 2;
    for (int32_t piece = 0; piece < m->pieces; piece++) {
        uint32_t node = 1, child;
        for (int32_t i = m->start[piece]; i < m->start[piece + 1]; i++, node = child) {
            if ((child = child_of(m, node, m->text[i])) != 0) continue;
            child = (uint32_t)m->nodes++;
            if (!put(&m->edges, (uint64_t)node << 8 | m->text[i], child)) return 0;
        }
        if (length_of(m, piece)) m->piece_at[node] = piece;
    }
    return 1;
}

// Merge the text of a piece as SentencePiece does: set `born`, `left` and `right`.
static void make(Bpe *m, int32_t piece) {
    const uint8_t *text = m->text + m->start[piece];
    int32_t at[LONGEST + 1], joint[LONGEST], symbols = 0;  // where symbols begin; the piece of one and the next
    for (int32_t i = 0; i < length_of(m, piece); i++)
        if (!continues(text[i])) at[symbols++] = i;
    at[symbols] = length_of(m, piece);
    m->born[piece] = symbols == 1 ? CHARACTER : NEVER;
    for (int32_t i = 0; i + 1 < symbols; i++) joint[i] = piece_of(m, text + at[i], text + at[i + 2]);
    while (symbols > 1) {
        int32_t best = NONE;
        for (int32_t i = 0; i + 1 < symbols; i++)
            if (joint[i] != NONE && (best == NONE || m->rank[joint[i]] < m->rank[joint[best]])) best = i;
        if (best == NONE) return;
        if (symbols == 2) {
            m->born[piece] = m->rank[piece];
            m->left[piece] = piece_of(m, text, text + at[1]);
            m->right[piece] = piece_of(m, text + at[1], text + at[2]);
        }
        symbols--;
        memmove(at + best + 1, at + best + 2, sizeof *at * (size_t)(symbols - best));
        memmove(joint + best, joint + best + 1, sizeof *joint * (size_t)(symbols - best));
        if (best) joint[best - 1] = piece_of(m, text + at[best - 1], text + at[best + 1]);
        if (best + 1 < symbols) joint[best] = piece_of(m, text + at[best], text + at[best + 2]);
    }
}

// Make all pieces, and leave those out of the trie that are never made. Return 0 unless every piece is made of pieces that are
// born before it, as in a trained model: `stay_apart` relies on it.
static int make_all(Bpe *m) {
    for (int32_t piece = 0; piece < m->pieces; piece++) make(m, piece);
    for (int32_t piece = 0; piece < m->pieces; piece++) {
        int32_t born = m->born[piece];
        if (born == CHARACTER || born == NEVER) continue;
        if (m->born[m->left[piece]] >= born || m->born[m->right[piece]] >= born) return 0;
    }
    for (int32_t node = 0; node < m->nodes; node++)
        if (m->piece_at[node] != NONE && m->born[m->piece_at[node]] == NEVER) m->piece_at[node] = NONE;
    return 1;
}

// Fill `shorter` and `pairs`. Return 0 where there is no memory.
static int join_all(Bpe *m) {
    for (int32_t piece = 0; piece < m->pieces; piece++) {
        m->shorter[piece] = NONE;
        uint32_t node = 1;
        for (int32_t i = m->start[piece]; i < m->start[piece + 1] - 1; i++) {
            node = child_of(m, node, m->text[i]);
            int32_t left = m->piece_at[node];
            if (left == NONE) continue;
            m->shorter[piece] = left;
            int32_t right = piece_of(m, m->text + i + 1, m->text + m->start[piece + 1]);
            if (right != NONE && m->born[piece] != NEVER && !put(&m->pairs, key_of(left, right), (uint64_t)piece + 1)) return 0;
        }
    }
    return 1;
}

void bpe_free(Bpe *m) {
    if (m == NULL) return;
    void *arrays[] = {m->text, m->start, m->rank,     m->byte_id,       m->piece_at,      m->shorter,
                      m->born, m->left,  m->right,    m->verdicts,      m->edges.entries, m->pairs.entries};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) free(arrays[i]);
    free(m);
}

static void *copy_of(const void *from, size_t bytes) {
    void *copy = malloc(bytes ? bytes : 1);
    if (copy) memcpy(copy, from, bytes);
    return copy;
}

// Return an encoder; NULL where there is no memory, or where the search would not give SentencePiece's ids. The arrays are
// those of `Bpe`; fewer than 2^20 pieces of fewer than 2^23 bytes.
Bpe *bpe_new(const uint8_t *text, const int32_t *start, const int32_t *rank, const int32_t *byte_id, int32_t pieces) {
    Bpe *m = calloc(1, sizeof *m);
    if (m == NULL) return NULL;
    size_t size = (size_t)start[pieces], column = (size_t)pieces * sizeof(int32_t);
    m->pieces = pieces, m->edges.bits = 24, m->pairs.bits = 21;
    m->text = copy_of(text, size);
    m->start = copy_of(start, column + sizeof *start);
    m->rank = copy_of(rank, column);
    m->byte_id = copy_of(byte_id, 256 * sizeof *byte_id);
    m->piece_at = malloc((size + 2) * sizeof *m->piece_at);
    m->shorter = malloc(column), m->born = malloc(column), m->left = malloc(column), m->right = malloc(column);
    m->verdicts = calloc((size_t)1 << VERDICTS, sizeof *m->verdicts);
    int there = m->text && m->start && m->rank && m->byte_id && m->piece_at && m->shorter && m->born && m->left && m->right;
    if (there) memset(m->piece_at, 0xFF, (size + 2) * sizeof *m->piece_at);
    // Key 0 is nothing's: it makes the tables, which every search reads.
    there = there && m->verdicts && put(&m->edges, 0, 0) && put(&m->pairs, 0, 0);
    if (there && grow_trie(m) && make_all(m) && join_all(m)) return m;
    bpe_free(m);
    return NULL;
}

// Whether SentencePiece encodes the text of two pieces to these two. It merges the text of each as if it stood alone, by rising
// ranks, until it joins the symbols on both sides of the border. So go back in time: unmake the piece that was born last, and see
// whether the two then at the border are joined before it is born. Of equal ranks the left one is merged first.
static int stay_apart(const Bpe *m, int32_t left, int32_t right) {
    for (int64_t until = INT64_MAX;;) {
        int32_t joint = joint_of(m, left, right);
        if (joint != NONE && m->rank[joint] < until) return 0;
        if (m->born[left] > m->born[right]) {
            until = m->born[left];
            left = m->right[left];
        } else if (m->born[right] != CHARACTER) {
            until = (int64_t)m->born[right] + 1;
            right = m->left[right];
        } else {
            return 1;
        }
    }
}

// The same, remembered. Threads may share the table: an entry is read and written at once.
static inline int apart(const Bpe *m, int32_t left, int32_t right) {
    if (left == NONE) return 1;
    uint64_t key = key_of(left, right), *entry = m->verdicts + (hash_of(key) & ((1 << VERDICTS) - 1));
    uint64_t known = __atomic_load_n(entry, __ATOMIC_RELAXED);
    if (known >> 1 == key) return known & 1;
    int verdict = stay_apart(m, left, right);
    __atomic_store_n(entry, key << 1 | (uint64_t)verdict, __ATOMIC_RELAXED);
    return verdict;
}

static int64_t write_bytes(const Bpe *m, const uint8_t *text, int64_t size, int32_t *ids) {
    for (int64_t i = 0; i < size; i++) ids[i] = m->byte_id[text[i]];
    return size;
}

// Encode what SentencePiece is given at once. `dead` has a zero bit for each place up to `size`, set where no piece follows.
// Return the number of ids; -1 where there is no result, which no model has that `bpe_new` accepts.
static int64_t encode_stretch(const Bpe *m, const uint8_t *text, int64_t size, uint64_t *dead, int32_t *ids) {
    int64_t at = 0, count = 0;
    int32_t last = NONE, piece = longest(m, text, text + size);
    while (at < size) {
        if (piece == NONE) {  // a character without a piece is merged with nothing
            int64_t end = at + 1;
            while (end < size && continues(text[end])) end++;
            count += write_bytes(m, text + at, end - at, ids + count);
            at = end, last = NONE, piece = longest(m, text + at, text + size);
            continue;
        }
        int64_t end;
        do {
            end = at + length_of(m, piece);
            if (!(dead[end >> 6] >> (end & 63) & 1) && apart(m, last, piece)) break;
        } while ((piece = m->shorter[piece]) != NONE);
        if (piece != NONE) {
            ids[count++] = last = piece;
            at = end, piece = longest(m, text + at, text + size);
        } else {  // take back the last one, and try a shorter one
            if (last == NONE) return -1;
            dead[at >> 6] |= (uint64_t)1 << (at & 63);
            piece = last, at -= length_of(m, last), count--;
            last = count && length_of(m, ids[count - 1]) ? ids[count - 1] : NONE;  // byte pieces have no text
        }
    }
    return count;
}

// Where the stretch ends that begins at `text`: at `end`, or after the last line end in `most` characters, or after these.
static const uint8_t *stretch_end(const uint8_t *text, const uint8_t *end, int64_t most) {
    if (end - text <= most) return end;
    const uint8_t *limit = text;
    for (int64_t characters = 0; limit < end; limit++)
        if (!continues(*limit) && characters++ == most) break;
    if (limit == end) return end;
    for (const uint8_t *line = limit; line > text; line--)
        if (line[-1] == '\n') return line;
    return limit;
}

// Where the next U+2581 begins, or `end`.
static const uint8_t *next_mark(const uint8_t *text, const uint8_t *end) {
    while ((text = memchr(text, 0xE2, (size_t)(end - text))) != NULL) {
        if (end - text >= 3 && text[1] == 0x96 && text[2] == 0x81) return text;
        text++;
    }
    return end;
}

// Encode a text of UTF-8 in stretches of at most `most` characters, and U+2581 between them as its bytes.
// `ids` has a place for each byte. Return the number of ids; -1 where there is no memory, or no result.
int64_t bpe_encode(const Bpe *m, const uint8_t *text, int64_t size, int64_t most, int32_t *ids) {
    int64_t count = 0, bytes = most < size / 4 ? 4 * most : size;
    uint64_t *dead = malloc((size_t)(bytes / 64 + 1) * sizeof *dead);
    if (dead == NULL) return -1;
    for (const uint8_t *end = text + size; text < end;) {
        const uint8_t *mark = next_mark(text, end);
        while (text < mark) {
            const uint8_t *stop = stretch_end(text, mark, most);
            memset(dead, 0, (size_t)((stop - text) / 64 + 1) * sizeof *dead);
            int64_t written = encode_stretch(m, text, stop - text, dead, ids + count);
            if (written < 0) {
                free(dead);
                return -1;
            }
            count += written, text = stop;
        }
        if (text < end) {
            count += write_bytes(m, text, 3, ids + count);
            text += 3;
        }
    }
    free(dead);
    return count;
}
