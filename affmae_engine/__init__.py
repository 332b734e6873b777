"""Engine of affmae: data, model, training and prediction. Imports no terminal library."""
