"""Measurements, a command each: `python -m bench.train`. Their output is in `results/`, what was learned in `LOG.md`.

train.py        tokens per second of training, against other libraries' models (contenders.py)
scaling.py      tokens per second over length, vocabulary, parameters and ranks, against what the FLOPs predict
activations.py  the activation kernels on a CPU, against eager PyTorch and torch.compile
fused.py        RMSNorm and rotary embedding, against plain PyTorch
conformance.py  errors of the kernels against float64 (edge_cases.py: NaN, inf, odd widths, strides)
patch.py        Transformers' models with fused feed-forward layers, against unpatched ones
overhead.py     a step under ZeRO, against a plain loop
guards.py       what the default guards add to a step
memory.py       bytes per rank under ZeRO and tensor parallelism, against the formula
estimate.py     `launch.estimate`, against measured memory and published step times
index.py        opening a corpus of 10 billion tokens, in time and memory
telemetry.py    the cost of an activation telemetry sample
tokenize.py     megabytes per second that a core tokenizes, against SentencePiece and Hugging Face's `tokenizers`
verdicts.py     false verdicts of simulated plans, and what they find
faults/         campaigns of faults: runs that are killed, damaged, poisoned, that hang, and whose disks fail
fuzz/           random text and damaged files for whatever reads them, each read or refused in a sentence
gpu.py          checks and times of the Triton kernels on a GPU (gpu.sh runs it, gpu_page.py makes its page)
sm90.py         the Triton kernels compiled for Hopper, without a GPU

formulas.py, huggingface.py, ranks.py, tiny_models.py and traffic.py serve these and the tests.
"""
