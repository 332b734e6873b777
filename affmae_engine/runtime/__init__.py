"""What training, prediction and benchmarks stand on: device, processes, signals, memory, GPU figures, text."""
