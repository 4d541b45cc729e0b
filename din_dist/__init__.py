"""Trains the Deep Interest Network (Zhou et al. 2018, arXiv:1706.06978) data-parallel over Horovod."""

__version__ = "0.1.0"
