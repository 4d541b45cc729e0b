"""The kinds of models: those that rank given candidates, and those that find items among all."""

from din_dist.config import ModelKind

RANKING = tuple(kind for kind in ModelKind if not kind.retrieves)
RETRIEVAL = tuple(kind for kind in ModelKind if kind.retrieves)
