"""Train a LLaMA-style decoder: `deepspeed train.py ffn=swiglu` (also under torchrun, srun, and plain python).

Parse, validate, train. `python train.py --help` lists every key. Running the same command again resumes a stopped run.
"""

from __future__ import annotations

from conf.load import load
from kernels.common.commands import run_command


def main(argv: list[str]) -> int:
    """Train with the overrides in `argv`, or once per combination with `--multirun`; return the exit status."""
    from launch.environment import configure_libraries
    from launch.launchers import Launchers
    from launch.multirun import FLAGS, multirun
    from launch.ranks import export, find_ranks, take_local_rank

    if any(argument in FLAGS for argument in argv):
        return multirun([argument for argument in argv if argument not in FLAGS])
    launchers = Launchers()
    launchers.listen()
    argv, local_rank = take_local_rank(argv)
    ranks = find_ranks(local_rank=local_rank)
    export(ranks)
    launchers.choose_port(ranks)
    config = load(argv)
    configure_libraries()
    from training.machine import keep_freed_memory, uses_gpu

    if not uses_gpu():  # where the host's memory holds no activations, keeping its peak would only waste it
        keep_freed_memory()
    from training.run import train

    return train(config, ranks, launchers)


if __name__ == "__main__":
    from kernels.common.streams import outlive_console
    from launch.ranks import leave_after

    outlive_console()
    leave_after(lambda: run_command(main))
