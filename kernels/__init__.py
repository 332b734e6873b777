"""The operations that AFFMAE is made of: torch (and triton) only, no knowledge of models, data or training.

Installed as `affmae_kernels` (`kernels` is another project's import name). One folder per operation: `__init__.py` is
the contract (shapes, dtypes, gradients, checks, choice of backend), `reference.py` the operation in plain PyTorch,
which is specification, CPU path and test oracle in one.

Reading order: `neighbourhoods` (clusters of points on a canvas and who is near whom), `cluster_attention`,
`token_merging`, `point_attention`; `residual_norm`, `bias_gelu` and `linear_relu`, the seams between them; then
`dispatch` (which implementation runs and why).

Axes: B batch, N tokens, C channels, A heads, D head width, m cluster size, K clusters or survivors, M neighbours,
Q queries, S samples, T = h * w canvas cells. Positions are integer cells (x, y); a canvas index is y * w + x.
"""
