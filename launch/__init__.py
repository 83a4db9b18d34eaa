"""From a machine to ranks, and from one machine to many.

ranks.py        who am I among the processes of this run, under any launcher
launchers.py    whether the launcher is still there, and whether it has said to stop
multirun.py     several runs from one command, one after the other
slurm.py        a job of SLURM that trains; sbatch.py writes its script and submits it, for plans of ablations too
estimate/       memory, time and money of a run before it is started
doctor.py       what stands in the way on a machine; collective.py is its test of the network,
                installed.py the versions of packages
run_module.py   `python -m` of a copy of the code
"""
