"""How long tests wait for what must come: far more than it takes, because other tests may have the cores for minutes.

Only what hangs reaches it. So a slow machine fails no test.
"""

PATIENCE = 600.0  # seconds
