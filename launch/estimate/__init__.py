"""What a run needs and costs, before it is started, from its configuration alone and without torch.

counts.py       parameters, FLOPs and bytes: of the model's shape, of what ranks send, of what they keep
step_time.py    the time of a step on a cluster's hardware
search.py       memory, time and money of a configuration; which others would fit and be fastest
console.py      what `python -m launch.estimate` prints; plot.py draws it
"""
