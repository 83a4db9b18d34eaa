"""Estimates of memory, time and cost from a configuration alone, without torch.

counts.py       parameters, FLOPs, bytes sent and bytes kept
step_time.py    the time of a step on a cluster's hardware
search.py       memory, time and cost of a configuration; a search for the fastest one that fits
console.py      the console output of `python -m launch.estimate`; plot.py draws its figure
"""
