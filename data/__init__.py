"""Text becomes tokens, tokens become shards, shards become batches. This room knows no model and never imports torch.

    documents.py    where text comes from: stdlib, text, jsonl, parquet, hf; what it is known by (its fingerprint)
    files.py        finding and reading the files behind it: globs, folders, .gz, .zst
    tokenizer.py    training and loading a tokenizer; encode and decode
    shards.py       the format on disk: writing a shard, reading tokens across shards
    prepare.py      the command that turns a corpus into a prepared folder
    pool.py         its worker processes; progress.py is what it shows meanwhile
    verify.py       the command that checks a prepared folder, bit by bit
    batches.py      sample number i of a run, and the windows of the held-out text

The format on disk. A prepared folder is `<data.prepared>/<data.name>-<8 hex digits>`; the digits are a hash of all that
decides its content (the corpus, the tokenizer, the held-out share, the version of this format).

    tokenizer.model             the tokenizer (or tokenizer.json), so that the folder is complete in itself
    train-00000.bin             tokens, little-endian uint16 (uint32 for a vocabulary of more than 65536); a document is
                                its tokens, then one end-of-text token; documents never cross a shard
    train-00000.idx             int64, one a document: where it ends in the .bin, in tokens, the end-of-text included
    held_out-00000.bin, .idx    the held-out documents of the same stretch of the corpus, if there are any
    group-00000.json            record of that stretch, written after its shards: what a resumed preparation trusts
    index.json                  written last: there is one exactly when the folder is complete

A blend has parts, each a prepared folder of its own; the blend's folder holds the shared tokenizer and an index that
names the parts and their weights.
"""
