"""Experiment trackers: what a job tells MLflow, Weights & Biases or TensorBoard's table of hyperparameters."""
