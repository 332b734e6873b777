"""Measurements: single operations against their references and the card's ceilings, and whole training steps against
ViT-MAE. Nothing is timed before it was found to be right."""
