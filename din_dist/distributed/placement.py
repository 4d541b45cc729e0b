"""Decides which rank sums which rows of an embedding table. Integers only, so that it is tested without ranks."""

# From so many ranks on, the owner of a row sums it for all. If few ranks touch each row, an all-gather of all rows then
# takes more bytes, and far more if many ranks do. Each rank also sums fewer rows.
FEWEST_TO_SUM_AT_OWNERS = 4
