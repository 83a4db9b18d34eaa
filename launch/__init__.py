"""Start runs on one machine or many, and check and estimate them beforehand.

ranks.py        the rank of this process, under any launcher
launchers.py    whether the launcher is still alive, whether it told the run to stop, and a port for its ranks;
                calm_launchers.py lets `deepspeed` and `torchrun` wait for their ranks after Ctrl-C, and torchrun.py does so
                where it is not installed
multirun.py     several runs from one command, in sequence
slurm.py        a SLURM job that trains; job_script.py writes scripts of jobs, and sbatch.py submits them, for ablations too;
                corpus.py checks the corpus before, prepare.py submits its preparation by several nodes
estimate/       memory, time and cost of a run before it starts
doctor.py       problems of a machine and how to fix them; collective.py benchmarks its network,
                installed.py lists versions of packages,
                preflight.py checks the hardware of a node for a job, finding.py is a line of their output
run_module.py   `python -m` for a copy of the code
"""
