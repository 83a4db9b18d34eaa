"""Training: one loop and its components.

`run.py` takes a command from its configuration to its exit status, and `loop.py` is the training loop. `engine.py` turns the
configuration into a DeepSpeed engine, with `mpu.py` and `zero.py` as its typed interface to DeepSpeed. `optimizers/` holds the
updates of the optimizers. `schedule.py` is the learning rate. `checkpoint.py` saves and loads; `saves.py` reports what became
of each save. `evaluation.py` measures the held-out loss. `telemetry.py` samples what happens inside the layers.
`runfolder.py` owns the run folder and its files, `metrics_file.py` the largest of them. `recorder.py` writes the record of a
run, `loggers.py` copies it to W&B and TensorBoard. `console.py` prints. `signals.py` turns signals into a decision that all
ranks share. `machine.py` covers devices, dtypes and memory allocation.
"""
