"""From class maps and boundary maps to objects: made, measured and scored, in volumes larger than memory.

Read first: `make.py` (the passes of a run), `decode.py` (what happens inside one block), `job.py` (blocks that are
computed once, by any number of processes, and survive a kill). `measure.py` and `scores.py` stand alone: they need
label volumes only. `targets.py` is what a network that learns objects is trained on.

Axes in this package: Z Y X voxels, N objects or pairs, D directions.
"""
