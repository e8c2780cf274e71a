"""tools/preflight.py, with something wrong on its second rank: FAULT, and the tool's arguments."""

import os
import runpy
import sys
import time
from pathlib import Path

from astropt_ds.training import node, preflight


def hang(*_):
    time.sleep(60)


def fail(*_):
    raise RuntimeError("CUDA error: uncorrectable ECC error encountered")


def main():
    fault = sys.argv.pop(1)
    os.environ["SLURMD_NODENAME"] = f"node{os.environ['RANK']}"  # each on a node of its own
    if os.environ["RANK"] == "1":
        if fault == "hang":
            preflight.look = hang
        elif fault == "device":
            node.Pace = fail
        elif fault == "data":
            sys.argv.append("data.path=not-mounted-here")
            os.environ["LOCAL_RANK"] = "0"  # which reads
    runpy.run_path(str(Path(__file__).parents[2] / "tools" / "preflight.py"), run_name="__main__")


if __name__ == "__main__":
    main()
