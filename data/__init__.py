"""From text to tokens to shards to batches. This package knows no model and never imports torch.

    documents.py    the readers of every source: stdlib, text, jsonl, parquet, hf; the fingerprint of a corpus
    files.py        finding and reading the files behind it: globs, folders, .gz, .zst; remote.py those behind URLs
    held_out.py     which documents are held out, what of each counts, and what nearly repeats one; blend.py over its parts
    tokenizer.py    loading a tokenizer; encode and decode; train_tokenizer.py trains one, ends.py has the ends of documents
    bpe.py          SentencePiece's BPE in C (bpe.c), for documents
    shards.py       the format on disk: writing a shard, reading tokens across shards
    prepare.py      the command that turns a corpus into a prepared folder, whose name folder.py gives
    groups.py       which documents become a shard; plan.py keeps that for parts on several machines
    pool.py         its worker processes; progress.py reports progress on standard error, lock.py is the folder's lock
    verify.py       the command that checks every byte of a prepared folder; usage.py lists the keys of both commands
    baselines.py    the command that predicts the held-out text by token frequencies, a bigram model and xz
    ready.py        the command that `launch` calls before it submits a job: are the corpora there, and long enough?
    batches.py      sample number i of a run, and the windows of the held-out text

The format on disk. A prepared folder is `<data.prepared>/<data.name>-<8 hex digits>`; the digits are a hash of
everything that determines its content (the corpus, the tokenizer, the held-out fraction, the version of this format).

    tokenizer.model             the tokenizer (or tokenizer.json), so that the folder is complete in itself
    train-00000.bin             tokens, little-endian uint16 (uint32 for a vocabulary of more than 65536); a document is
                                its tokens, then one end-of-text token; documents never cross a shard
    train-00000.idx             int64, one per document: where it ends in the .bin, in tokens, the end-of-text included
    held_out-00000.bin, .idx    the held-out documents of the same group, if there are any
    group-00000.json            record of a group, written after its shards: a resumed preparation skips what it lists
    plan.json                   what the parts of a preparation on several machines have in common; removed at its end
    index.json                  written last: it exists exactly when the folder is complete

A blend has parts, each a prepared folder of its own; the blend's folder holds the shared tokenizer and an index that
names the parts and their weights.
"""
