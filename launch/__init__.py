"""From a machine to ranks: who am I among the processes of this run (`ranks.py`)."""
