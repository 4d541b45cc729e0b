"""Trains day after day: prepares, evaluates yesterday's model, starts warm, exports; `cli/daily.py` runs it."""
