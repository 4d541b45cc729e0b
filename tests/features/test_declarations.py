"""The file of `--features`: what it may say, and the one line for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from din_dist.errors import InputError
from din_dist.features.declarations import parse_declarations
from din_dist.features.spec import Encode, FeatureSpec, Form, Kind, Owner, Pooling, Scale, from_text, to_text

FILE = Path("/somewhere/features.toml")
ALL = """
[age_band]
of = "user"
kind = "category"
width = 8
[hour]
of = "context"
from = "timestamp"
kind = "hour_of_day"
[price]
of = "candidate"
kind = "number"
encode = "quantiles:16"
[tags]
of = "item"
kind = "categories"
column = "tag_list"
min_count = 5
separator = ";"
pool = "weighted"
weights = "tag_weights"
[picture]
of = "item"
kind = "vector"
path = "pictures.npy"
ids = "pictures.txt"
[user_id]
of = "user"
kind = "category"
rows = 1_000_000
[wealth]
of = "user"
kind = "number"
encode = "periodic:8,0.1"
"""


def test_every_kind() -> None:
    specs = parse_declarations(ALL, FILE)
    assert specs == (
        FeatureSpec("age_band", Owner.USER, Kind.CATEGORY, "age_band", width=8),
        FeatureSpec("hour", Owner.CONTEXT, Kind.HOUR_OF_DAY),
        FeatureSpec("price", Owner.CANDIDATE, Kind.NUMBER, "price", encode=Encode(Scale.QUANTILES, bins=16)),
        FeatureSpec(
            "tags",
            Owner.ITEM,
            Kind.CATEGORIES,
            "tag_list",
            min_count=5,
            pool=Pooling.WEIGHTED,
            weights="tag_weights",
            separator=";",
        ),
        FeatureSpec("picture", Owner.ITEM, Kind.VECTOR, path="/somewhere/pictures.npy", ids="/somewhere/pictures.txt"),
        FeatureSpec("user_id", Owner.USER, Kind.CATEGORY, "user_id", rows=1_000_000),
        FeatureSpec(
            "wealth", Owner.USER, Kind.NUMBER, "wealth", encode=Encode(Scale.PERIODIC, frequencies=8, sigma=0.1)
        ),
    )
    forms = [Form.IDS, Form.IDS, Form.IDS, Form.LISTS, Form.VECTORS, Form.IDS, Form.NUMBERS]
    assert [spec.form for spec in specs] == forms
    assert from_text(to_text(specs)) == specs


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        (
            'kind = "category"',
            "of must be user, context, candidate, item or history. Received: no of. Write one of these.",
        ),
        ('of = "user"', "Received: no kind."),
        ('of = "user"\nkind = "categorie"', "Received: kind = 'categorie'. Did you mean categories?"),
        ('of = "user"\nkind = "category"\nwdth = 3', "there is no such key. Received: wdth. Did you mean width?"),
        ('of = "user"\nkind = "category"\nbounds = 3', "Write one of of, kind, column, width, min_count, rows, by."),
        (
            'of = "user"\nkind = "category"\nwidth = 0',
            "width must be a whole number from 1 to 4,096. Received: width = 0.",
        ),
        ('of = "user"\nkind = "category"\nwidth = true', "Received: width = True."),
        (
            'of = "user"\nkind = "category"\nencode = "log"',
            "encode belongs to kind = number. Received: encode with kind =",
        ),
        ('of = "user"\nkind = "number"\nencode = "quantiles:1"', "encode must be standard, log, none, quantiles:BINS"),
        ('of = "user"\nkind = "number"\nencode = "periodic:4"', 'Received: encode = "periodic:4".'),
        ('of = "user"\nkind = "number"\nencode = "log:4"', 'Received: encode = "log:4".'),
        ('of = "user"\nkind = "hour_of_day"\nfrom = "timestamp"', "the event's time belongs to the context."),
        ('of = "context"\nkind = "day_of_week"', 'from = None. Write from = "timestamp".'),
        ('of = "history"\nkind = "time_since"', 'time_since is made from = "timestamp". Received: from = None.'),
        (
            'of = "context"\nkind = "time_since"\nfrom = "timestamp"',
            'time_since is the time from a behaviour to the request. Received: of = "context". Write of = "history".',
        ),
        (
            'of = "history"\nkind = "number"\nencode = "log"',
            "a feature of behaviours is a category, a number in quantiles, or time_since. Received: kind = "
            '"number" with encode = "log". Write one of these.',
        ),
        ('of = "history"\nkind = "vector"', 'or time_since. Received: kind = "vector".'),
        ('of = "history"\nkind = "categories"', 'or time_since. Received: kind = "categories".'),
        ('of = "user"\nkind = "category"\nrows = 9\nmin_count = 2', "hashed values are not counted."),
        ('of = "user"\nkind = "categories"\npool = "weighted"', "the column of the weights, belong together."),
        ('of = "user"\nkind = "categories"\nweights = "w"', "the column of the weights, belong together."),
        ('of = "item"\nkind = "vector"\npath = "x.npy"', "belong together. Received: path = '/somewhere/x.npy'"),
        (
            'of = "item"\nkind = "vector"\npath = "x.npy"\nids = "i"\ncolumn = "c"',
            "vectors come from a column or from path",
        ),
        ('of = "context"\nkind = "vector"\ntrained = true', "belong to items or users."),
        ('of = "user"\nkind = "category"\ncolumn = ""', "column must be printable text. Received: column = ''."),
        ('of = "user"\nkind = "category"\ncolumn = 3', "Received: column = 3."),
        (
            'of = "item"\nkind = "number"\nby = ["s"]',
            'Received: by with of = "item". Write of = "candidate", or drop by.',
        ),
        (
            'of = "candidate"\nkind = "number"\nby = "s"',
            "by must be a list of 1 to 8 columns, each once. Received: by = 's'",
        ),
        (
            'of = "candidate"\nkind = "number"\nby = []',
            "by must be a list of 1 to 8 columns, each once. Received: by = []",
        ),
        ('of = "candidate"\nkind = "number"\nby = ["s", "s"]', "by must be a list of 1 to 8 columns, each once."),
        ('of = "context"\nkind = "hour_of_day"\nby = ["s"]', "by belongs to kind = category or number or categories"),
    ],
)
def test_mistakes(declaration: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse_declarations(f"[x]\n{declaration}", FILE)
    text = str(error.value)
    assert text.startswith(f"{FILE}, [x]: ")
    assert message in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[x]\n[x]", "each name once. Received: Cannot declare"),
        ("x = 3", "[x]: a feature is a table. Received: x = 3."),
        ("[x", "must be TOML"),
        ('["a\\nb"]\nof = "user"\nkind = "category"', "a feature's name is printable text"),
        (
            '[a]\nof = "candidate"\nkind = "number"\nby = ["s"]\n[b]\nof = "candidate"\nkind = "number"\nby = ["t"]',
            "[b]: all features of offers have the same by, because they share a table. Received: by = ['t'], and",
        ),
        ('[""]\nof = "user"\nkind = "category"', "a feature's name is printable text"),
    ],
)
def test_files_that_are_no_declarations(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse_declarations(text, FILE)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1
