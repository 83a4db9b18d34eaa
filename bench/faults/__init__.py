"""Campaigns of faults: runs that are killed, damaged, poisoned, that hang, and whose disks fail (`python -m bench.faults`)."""
