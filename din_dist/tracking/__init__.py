"""Experiment trackers: MLflow, Weights & Biases and TensorBoard's table of hyperparameters."""
