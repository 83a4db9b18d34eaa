"""`python <folder>/launch/run_module.py ablation.run ...`: as `python -m ablation.run ...`, but of the code in that folder.

`-m` looks into the working directory first. A job of SLURM works in the folder where it was submitted, on a copy of the code.
"""

import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
