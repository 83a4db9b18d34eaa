"""`python <folder>/launch/run_module.py ablation.run ...`: like `python -m ablation.run ...` with the code of that folder.

`-m` searches the working directory first. A SLURM job works in the folder it was submitted from, with a copy of the code.
"""

import runpy
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
sys.argv = sys.argv[1:]
if sys.argv[0] == "launch.doctor":
    # Before its imports take time: the first rank to end makes a launcher end the others.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
