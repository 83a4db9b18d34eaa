"""From question to verdict: `python examples/question_to_verdict.py [FOLDER]`. One to three minutes on two CPU cores.

Is `silu(gate)*tanh(up)` better than ReLU at equal FFN parameters? The model is far too small and trained for far too short, so
the answer means nothing; the steps are those of a real plan. Each is one command, which is printed: `ablation.run` sweeps each
arm's learning rate and trains three seeds at the best one, `ablation.report` compares them.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(module: str, *arguments: str) -> None:
    """Run one of the project's commands, and end with it if it fails."""
    print(f"\n$ {shlex.join(['python', '-m', module, *arguments])}\n", flush=True)
    status = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT).returncode
    if status:
        raise SystemExit(status)


def main(folder: Path) -> None:
    text = Path(sysconfig.get_path("stdlib")) / "asyncio" / "*.py"  # some text that every Python has
    run(
        "ablation.run",
        "ablation=smoke",
        "ablation.question=Is a gate worth its third matrix?",
        "ablation.baseline=relu",
        "ablation.arms={relu: ffn=relu, mine: ffn=custom ffn.formula=silu(gate)*tanh(up)}",
        "ablation.sizes={tiny: model=nano model.d_model=64 model.n_layers=2 model.n_heads=1 model.d_ff_gated=128}",
        "ablation.rates=[0.5, 1.0, 2.0]",  # of optim.lr
        "ablation.rate_extensions=2",  # and beyond, where the best one lies at an edge
        "ablation.seeds=[0, 1, 2]",
        "tokens=40000",
        "optim.lr=0.008",
        "sequence_length=64",
        "data=text",
        f"data.path={text}",
        "data.held_out=0.2",
        f"data.prepared={folder / 'prepared'}",
        "tokenizer.vocab_size=512",
        "eval_every=0",
        "save_every=0",
        "logger=none",
        "jobs=2",
        "yes=true",
        f"folder={folder}",
    )
    run("ablation.report", str(folder / "smoke"))
    print(
        "\nThat is the verdict of 40,000 tokens, three seeds and a model of some 150,000 parameters: it shows the machinery,\n"
        "not the activations. The same plan at a size that means more: python -m ablation.run ablation=glu_variants"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", help="for the runs and the report; default: a new temporary folder")
    main(Path(parser.parse_args().folder or tempfile.mkdtemp(prefix="question-")).resolve())
