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
#define VERDICTS 16      // log2 of the pairs that are remembered, 4 bytes each: they should stay in a core's cache

// A hash table. An entry is key << bits | value, and 0 is none; `size` is a power of two, at least twice `count`.
typedef struct {
    uint64_t *entries, size, count;
    int bits;
} Table;

// A node of the trie, in a double array: its child by a byte is node `base ^ byte` if the parent of that is this node.
typedef struct {
    uint32_t base, parent;
    int32_t piece;  // that ends here, or NONE
} Node;

typedef struct {
    int32_t born;         // its rank: the lower is merged first. Of a character CHARACTER, of a piece that is never made NEVER
    int32_t left, right;  // what SentencePiece makes it of
    int32_t shorter;      // the longest piece that it begins with, or NONE
    int32_t length;       // bytes; 0 of control and byte pieces
} Piece;

typedef struct {
    Piece *pieces;
    Node *nodes;         // the root is node 1
    uint32_t *verdicts;  // pairs of pieces, and whether they stay apart
    Table pairs;         // two pieces -> their concatenation, of those that are pieces
    uint32_t node_count, search_from[2];
    int32_t byte_id[256];  // pieces for the bytes of characters that are no piece
} Bpe;

// What a model is made from, of the caller: the pieces' text one after the other, a space as 0x20, and where each begins.
typedef struct {
    const uint8_t *text;
    const int32_t *start, *rank, *order;  // [count + 1], [count], [count]: sorted by text
    int32_t count;
} Vocabulary;

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

static inline uint64_t key_of(int32_t left, int32_t right) { return (uint64_t)left << 20 | (uint64_t)right; }

// The piece that is the text of two, or NONE.
static inline int32_t joint_of(const Bpe *m, int32_t left, int32_t right) {
    return (int32_t)get(&m->pairs, key_of(left, right) + 1) - 1;
}

static inline int continues(uint8_t byte) { return (byte & 0xC0) == 0x80; }  // a character of UTF-8 that began before

// The child of a node by a byte, or 0.
static inline uint32_t child_of(const Bpe *m, uint32_t node, uint8_t byte) {
    uint32_t child = m->nodes[node].base ^ byte;
    return m->nodes[child].parent == node ? child : 0;
}

// The longest piece that a text begins with, or NONE: its first character is none.
static inline int32_t longest(const Bpe *m, const uint8_t *text, const uint8_t *end) {
    int32_t found = NONE;
    for (uint32_t node = 1; text < end && (node = child_of(m, node, *text)) != 0; text++)
        if (m->nodes[node].piece != NONE) found = m->nodes[node].piece;
    return found;
}

// The piece that is exactly this text, or NONE.
static int32_t piece_of(const Bpe *m, const uint8_t *text, const uint8_t *end) {
    uint32_t node = 1;
    for (; text < end; text++)
        if ((node = child_of(m, node, *text)) == 0) return NONE;
    return m->nodes[node].piece;
}

// Have nodes up to the 256 of `base`. Return 0 where there is no memory.
static int reach(Bpe *m, uint32_t base) {
    if ((base | 255) < m->node_count) return 1;
    uint32_t count = 2 * (base | 255) + 2;
    Node *nodes = realloc(m->nodes, count * sizeof *nodes);
    if (nodes == NULL) return 0;
    for (uint32_t i = m->node_count; i < count; i++) nodes[i] = (Node){0, 0, NONE};
    m->nodes = nodes, m->node_count = count;
    return 1;
}

// Find a base for which the nodes of all bytes are free; 0 where there is no memory. Single children fill what others leave.
static uint32_t free_base(Bpe *m, const uint8_t *bytes, int count) {
    uint32_t *from = &m->search_from[count > 1];
    for (uint32_t slot = *from;; slot++) {
        uint32_t base = slot ^ bytes[0];
        if (!reach(m, slot)) return 0;
        int found = 0;
        while (found < count && m->nodes[base ^ bytes[found]].parent == 0) found++;
        if (found < count) continue;
        if (count == 1) *from = slot;
        if (count > 1 && slot > *from + 256) *from = slot - 256;
        return base;
    }
}

// Add the pieces order[low] to order[high - 1], whose first `depth` bytes lead to `node`. Return 0 where there is no memory.
static int grow(Bpe *m, const Vocabulary *v, uint32_t node, int32_t low, int32_t high, int32_t depth) {
    for (; low < high && m->pieces[v->order[low]].length == depth; low++)
        if (depth) m->nodes[node].piece = v->order[low];
    uint8_t bytes[256];
    int count = 0;
    for (int32_t i = low; i < high; i++) {
        uint8_t byte = v->text[v->start[v->order[i]] + depth];
        if (count == 0 || byte != bytes[count - 1]) bytes[count++] = byte;
    }
    if (count == 0) return 1;
    uint32_t base = free_base(m, bytes, count);
    if (base == 0) return 0;
    m->nodes[node].base = base;
    for (int i = 0; i < count; i++) m->nodes[base ^ bytes[i]].parent = node;
    for (int i = 0; i < count; i++) {
        int32_t next = low;
        while (next < high && v->text[v->start[v->order[next]] + depth] == bytes[i]) next++;
        if (!grow(m, v, base ^ bytes[i], low, next, depth + 1)) return 0;
        low = next;
    }
    return 1;
}

// Merge the text of a piece as SentencePiece does: set `born`, `left` and `right`.
static void make(const Bpe *m, const Vocabulary *v, int32_t number) {
    Piece *piece = m->pieces + number;
    const uint8_t *text = v->text + v->start[number];
    int32_t at[LONGEST + 1], joint[LONGEST], symbols = 0;  // where symbols begin; the piece of one and the next
    for (int32_t i = 0; i < piece->length; i++)
        if (!continues(text[i])) at[symbols++] = i;
    at[symbols] = piece->length;
    piece->born = symbols == 1 ? CHARACTER : NEVER;
    for (int32_t i = 0; i + 1 < symbols; i++) joint[i] = piece_of(m, text + at[i], text + at[i + 2]);
    while (symbols > 1) {
        int32_t best = NONE;
        for (int32_t i = 0; i + 1 < symbols; i++)
            if (joint[i] != NONE && (best == NONE || v->rank[joint[i]] < v->rank[joint[best]])) best = i;
        if (best == NONE) return;
        if (symbols == 2) {
            piece->born = v->rank[number];
            piece->left = piece_of(m, text, text + at[1]);
            piece->right = piece_of(m, text + at[1], text + at[2]);
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
static int make_all(const Bpe *m, const Vocabulary *v) {
    for (int32_t i = 0; i < v->count; i++) make(m, v, i);
    for (const Piece *piece = m->pieces; piece < m->pieces + v->count; piece++) {
        if (piece->born == CHARACTER || piece->born == NEVER) continue;
        if (m->pieces[piece->left].born >= piece->born || m->pieces[piece->right].born >= piece->born) return 0;
    }
    for (Node *node = m->nodes; node < m->nodes + m->node_count; node++)
        if (node->piece != NONE && m->pieces[node->piece].born == NEVER) node->piece = NONE;
    return 1;
}

// Fill `shorter` and `pairs`. Return 0 where there is no memory.
static int join_all(Bpe *m, const Vocabulary *v) {
    for (int32_t i = 0; i < v->count; i++) {
        const uint8_t *text = v->text + v->start[i], *end = text + m->pieces[i].length;
        m->pieces[i].shorter = NONE;
        for (uint32_t node = 1; text + 1 < end;) {
            node = child_of(m, node, *text++);
            int32_t left = m->nodes[node].piece, right = left == NONE ? NONE : piece_of(m, text, end);
            if (left != NONE) m->pieces[i].shorter = left;
            if (right == NONE || m->pieces[i].born == NEVER) continue;
            if (!put(&m->pairs, key_of(left, right) + 1, (uint64_t)i + 1)) return 0;
        }
    }
    return 1;
}

void bpe_free(Bpe *m) {
    if (m == NULL) return;
    free(m->pieces), free(m->nodes), free(m->verdicts), free(m->pairs.entries);
    free(m);
}

// Return an encoder; NULL where there is no memory, or where the search would not give SentencePiece's ids. The text of a piece
// has at most LONGEST bytes, and each character of it is a piece. There are fewer than 2^20 pieces.
Bpe *bpe_new(const uint8_t *text, const int32_t *start, const int32_t *rank, const int32_t *order, const int32_t *byte_id,
             int32_t count) {
    Vocabulary v = {text, start, rank, order, count};
    Bpe *m = calloc(1, sizeof *m);
    if (m == NULL) return NULL;
    memcpy(m->byte_id, byte_id, sizeof m->byte_id);
    m->search_from[0] = m->search_from[1] = 256;
    m->pairs.bits = 21;
    m->pieces = calloc((size_t)count, sizeof *m->pieces);
    m->verdicts = calloc((size_t)1 << VERDICTS, sizeof *m->verdicts);
    if (m->pieces && m->verdicts && reach(m, 256) && put(&m->pairs, 0, 0)) {  // nothing has key 0: it makes the table
        for (int32_t i = 0; i < count; i++) m->pieces[i].length = start[i + 1] - start[i];
        if (grow(m, &v, 1, 0, count, 0) && make_all(m, &v) && join_all(m, &v)) return m;
    }
    bpe_free(m);
    return NULL;
}

// Whether SentencePiece encodes the text of two pieces to these two. It merges the text of each as if it stood alone, by rising
// ranks, until it joins the symbols on both sides of the border. So go back in time: unmake the piece that was born last, and see
// whether the two then at the border are joined before it is born. Of equal ranks the left one is merged first.
static int stay_apart(const Bpe *m, int32_t left, int32_t right) {
    const Piece *pieces = m->pieces;
    for (int64_t until = INT64_MAX;;) {
        int32_t joint = joint_of(m, left, right), left_born = pieces[left].born, right_born = pieces[right].born;
        if (joint != NONE && pieces[joint].born < until) return 0;
        if (left_born > right_born) {
            until = left_born;
            left = pieces[left].right;
        } else if (right_born != CHARACTER) {
            until = (int64_t)right_born + 1;
            right = pieces[right].left;
        } else {
            return 1;
        }
    }
}

// The same, remembered. A pair of 40 bits is multiplied by an odd number modulo 2^40, which no two pairs share: the upper bits
// of the product are the entry's number, and the lower ones stand in it. Threads may share the table: an entry is read and
// written at once.
static inline int apart(const Bpe *m, int32_t left, int32_t right) {
    if (left == NONE) return 1;
    uint64_t product = key_of(left, right) * 0x9E3779B97F4A7C15u & (((uint64_t)1 << 40) - 1);
    uint32_t *entry = m->verdicts + (product >> (40 - VERDICTS));
    uint32_t mine = (uint32_t)(product << 2) & (((uint32_t)1 << (42 - VERDICTS)) - 1);
    uint32_t known = __atomic_load_n(entry, __ATOMIC_RELAXED);
    if ((known & ~(uint32_t)1) == (mine | 2)) return known & 1;
    uint32_t verdict = (uint32_t)stay_apart(m, left, right);
    __atomic_store_n(entry, mine | 2 | verdict, __ATOMIC_RELAXED);
    return (int)verdict;
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
            end = at + m->pieces[piece].length;
            if (!(dead[end >> 6] >> (end & 63) & 1) && apart(m, last, piece)) break;
        } while ((piece = m->pieces[piece].shorter) != NONE);
        if (piece != NONE) {
            ids[count++] = last = piece;
            at = end, piece = longest(m, text + at, text + size);
        } else {  // take back the last one, and try a shorter one
            if (last == NONE) return -1;
            dead[at >> 6] |= (uint64_t)1 << (at & 63);
            piece = last, at -= m->pieces[last].length, count--;
            last = count && m->pieces[ids[count - 1]].length ? ids[count - 1] : NONE;  // byte pieces have no text
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
