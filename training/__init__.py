"""One loop and what it leans on.

`loop.py` is the run from its first line to its last. `engine.py` turns the configuration into a DeepSpeed engine,
`schedule.py` is the learning rate, `checkpoint.py` saves and loads, `evaluation.py` measures held-out text, `runfolder.py`
owns the run folder and its files, `loggers.py` mirrors them to W&B and TensorBoard, `console.py` is what a person sees,
`signals.py` turns signals into a decision that all ranks share, `machine.py` knows devices, dtypes and memory allocation.
"""
