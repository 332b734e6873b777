"""What a machine can do: its parts, the kernels that run on it, whether they compute right, and how fast they are."""
