"""The owners of features of every form: behaviours have ids alone, and tests of their own."""

from din_dist.features.spec import Owner

OWNERS = tuple(owner for owner in Owner if owner is not Owner.HISTORY)
