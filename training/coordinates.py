"""Check whether what training changes depends on width: `python -m training.coordinates arms=relu,swiglu`.

    arms=a,b     arms of conf/ffn
    widths=a,b   values of d_model, multiples of 16
    optim=adamw  or muon, normuon
    lr=1e-4      learning rate at the smallest width
    steps=8      on one batch of random tokens

The coordinate check of Yang et al. 2022 (arXiv 2203.03466): how far a few steps move the last layer's output, before the head,
as a root mean square per coordinate. Under `optim.scaling=mup` it should not depend on the width; without, it grows until the
step is too large. A row per arm and scaling: the movement at each width, and its exponent, the slope of log movement over log
width. Whether the best learning rate transfers is another question, which `python -m ablation.transfer` answers from runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from rich.table import Table

from conf.load import load
from conf.schema import Config
from conf.shape import shape_of
from conf.terminal import SafeConsole
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.options import read_options
from model.decoder import Decoder
from model.initialise import initialise
from model.scaling import scaling_of
from training.optimizers import UPDATES, MatrixOptimizer
from training.optimizers.groups import parameter_groups
from training.optimizers.layout import layout_of_module

_VOCABULARY, _LAYERS, _HEAD_DIM, _SEQUENCES, _LENGTH = 256, 2, 16, 8, 32


def movement(config: Config, steps: int, seed: int = 0) -> float:
    """Return how far some steps on one batch of random tokens move the output before the head, per coordinate."""
    shape = shape_of(config, _VOCABULARY)
    scaling = scaling_of(config.optim, shape)
    decoder = Decoder(shape, config.model, "sdpa")
    initialise(decoder, shape, seed, config.model.init_std, scaling)
    optimizer = UPDATES[config.optim.name](parameter_groups(decoder, config.optim, scaling), config.optim)
    if isinstance(optimizer, MatrixOptimizer):
        optimizer.attach(layout_of_module(decoder, config.optim, shape.head_dim))
    generator = torch.Generator().manual_seed(seed + 1)
    tokens = torch.randint(0, _VOCABULARY, (_SEQUENCES, _LENGTH + 1), generator=generator)
    outputs: list[torch.Tensor] = []
    decoder.head.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0].detach().clone()))
    for _ in range(steps):
        loss, *_ = decoder(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        decoder(tokens[:, :-1], tokens[:, 1:])
    return float((outputs[-1] - outputs[0]).square().mean().sqrt())


def config_of(
    arm: str, width: int, scaling: str, lr: float, base_width: int, layers: int = _LAYERS, optim: str = "adamw"
) -> Config:
    """Return a small model's configuration; the ratio of d_ff to d_model and the width of a head are always the same."""
    base = [f"optim.base_width={base_width}", f"optim.base_layers={_LAYERS}"] if scaling == "mup" else []
    model = {"d_model": width, "n_layers": layers, "n_heads": width // _HEAD_DIM, "d_ff_gated": 2 * width}
    words = [f"model.{key}={value}" for key, value in model.items()]
    words += [f"optim={optim}", "optim.beta2=0.95", f"optim.lr={lr!r}", f"optim.scaling={scaling}", *base]
    return load([f"ffn={arm}", "model=nano", *words])


def exponent(widths: Sequence[int], movements: Sequence[float]) -> float:
    """Return the slope of log movement over log width."""
    return float(np.polyfit(np.log(widths), np.log(movements), 1)[0])


def main(argv: list[str]) -> int:
    defaults = {"arms": "swiglu,relu", "widths": "32,64,128,256", "lr": 1e-4, "steps": 8, "optim": "adamw"}
    options = read_options(argv, defaults, {"steps": 1})
    try:
        widths = sorted({int(width) for width in options["widths"].split(",")})
    except ValueError as error:
        raise UserError(f"widths={options['widths']} must be whole numbers, such as widths=32,64,128") from error
    if len(widths) < 2 or any(width < 1 or width % _HEAD_DIM for width in widths):
        raise UserError(f"widths={options['widths']} must be two or more multiples of {_HEAD_DIM}")
    table = Table("arm", "scaling", *map(str, widths), "exponent", box=None)
    for arm in options["arms"].split(","):
        for scaling in ("none", "mup"):
            chosen = {"scaling": scaling, "lr": options["lr"], "base_width": widths[0], "optim": options["optim"]}
            configs = [config_of(arm, width, **chosen) for width in widths]
            found = [movement(config, options["steps"]) for config in configs]
            table.add_row(arm, scaling, *(f"{value:.3f}" for value in found), f"{exponent(widths, found):+.2f}")
    SafeConsole(file=sys.stdout, highlight=False, markup=False).print(table)
    return 0


if __name__ == "__main__":
    run_command(main, __doc__)
