"""Reading electron microscopy, the dataset store, and the samples that training draws from it."""
