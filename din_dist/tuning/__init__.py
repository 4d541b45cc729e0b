"""Searches for better settings: the space, the study that Optuna keeps, and the jobs that are its trials."""
