"""`python launch/torchrun.py ...`: torchrun that lets its ranks save for as long as they take, where nothing is installed.

By itself torchrun kills its ranks 30 seconds after a signal. `launch.calm_launchers` changes that in an environment that it was
set up in, which that of a container or of another interpreter is not.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose names hide those of other packages

if __name__ == "__main__":
    from torch.distributed.run import main

    from launch.calm_launchers import SignalsToChildren, quieten_torchrun

    SignalsToChildren(keeps_own=False)
    quieten_torchrun()
    main()
