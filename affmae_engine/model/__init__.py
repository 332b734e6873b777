"""The networks: AFFMAE (`affmae`, `encoder`, `decoder`, `masking`, in reading order) and the ViT-MAE baseline.

The operations that AFFMAE is built of are in `affmae_kernels`, each with a plain PyTorch reference.
"""
