"""Train a LLaMA-style decoder: `deepspeed train.py ffn=swiglu` (also under torchrun, srun, and plain python).

Parse, validate, train. `python train.py --help` lists every key; the same command again goes on where it stopped.
"""

from __future__ import annotations

from conf.load import load, run_command


def main(argv: list[str]) -> int:
    from launch.launchers import Launchers
    from launch.multirun import FLAGS, multirun
    from launch.ranks import export, find_ranks, take_local_rank

    if any(word in FLAGS for word in argv):
        return multirun([word for word in argv if word not in FLAGS])
    launchers = Launchers()
    launchers.listen()
    argv, local_rank = take_local_rank(argv)
    ranks = find_ranks(local_rank=local_rank)
    export(ranks)
    config = load(argv)
    from training.machine import keep_freed_memory

    keep_freed_memory()
    from training.loop import train

    return train(config, ranks, launchers)


if __name__ == "__main__":
    from launch.ranks import leave

    try:
        run_command(main)
    except SystemExit as end:
        leave(end.code)  # type: ignore[arg-type]
