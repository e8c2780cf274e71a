"""tools/embed.py with parts of eight galaxies, so that small surveys have many."""

import runpy

from astropt_ds.embedding import plan

plan.LEAST_ROWS, plan.PARTS = 8, 1000

runpy.run_path("tools/embed.py", run_name="__main__")
