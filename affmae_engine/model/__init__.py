"""The network: encoder of off-grid tokens, decoder of points asking points, and the two models made of them.

Reading order: `autoencoder` (pretraining), `encoder`, `block`, `merging`, `decoder`, `segmenter`. The operations
themselves are in `affmae_kernels`.
"""
