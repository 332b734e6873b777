"""Tiled prediction of images and stacks of any size."""
