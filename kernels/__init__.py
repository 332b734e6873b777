"""The operations that AFFMAE is made of: torch and triton only; nothing here knows of models, data or training.

Installed as `affmae_kernels` (`kernels` is another project's import name). One folder per operation: `__init__.py` is
the contract (formula, shapes, dtypes, gradients, checks, choice of the backend), `reference.py` the operation in plain
PyTorch (specification, CPU path and test oracle), `triton.py` its kernels, and `cases.py` the shapes that tests, doctor
and bench call.

Reading order: `cases.OPERATIONS` lists the operations. The method is in `neighbourhoods` (clusters of points on a
canvas, and which are near each other), `cluster_attention`, `token_merging` and `point_attention`; `encoder_blocks` and
`decoder_step` combine them with projections, norms and MLPs. Then `dispatch` (which implementation runs, and why),
`precision` (dtypes) and `precompile` (kernels are compiled in parallel before they are needed).

Axes: B batch, N tokens, C channels, H heads, D head width, m cluster size, K clusters or survivors, M neighbors,
Q queries, S samples, T = h * w canvas cells. Positions are integer cells (x, y); a canvas index is y * w + x.
"""
