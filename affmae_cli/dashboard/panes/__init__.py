"""The tabs of a run, in the order of their keys."""
