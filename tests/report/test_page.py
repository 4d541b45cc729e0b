"""The page in the cases that a test job does not meet."""

from __future__ import annotations

import dataclasses
import html
import math
import re
from pathlib import Path

import numpy as np
import pytest

from din_dist.config import Config, ModelConfig, ModelKind
from din_dist.metrics.calibration import calibration
from din_dist.metrics.slices import Slice
from din_dist.report.attention import Averages, Behaviour, ShownExample
from din_dist.report.comparison import Comparison, differing_settings
from din_dist.report.gain import Difference, Gain
from din_dist.report.job import JobRecord, Status
from din_dist.report.page import Findings, render
from din_dist.report.retrieval import FoundAt, Retrieval
from din_dist.report.scoring import Evaluation, Ranking, SliceTable
from din_dist.report.settings_table import Data
from din_dist.schema import DatasetFacts

RECORD = JobRecord(Path("runs/a<b"), [], 0, "--epochs=1", None, Status.FINISHED)
FACTS = DatasetFacts(3, 4, 5, True, {"category_id": 2}, 0, 9, "", {})
EVALUATION = Evaluation(
    split="test",
    num_in_split=4,
    num_examples=4,
    num_positives=1,
    num_users=2,
    num_users_skipped=1,
    gain=Difference("GAUC", 0.05, 0.02, 0.08),
    rankings=[Ranking("model", 0.7, 0.8), Ranking("popularity", 0.6, 0.9), Ranking("brand_repeat", 0.65, 0.5)],
    log_loss=0.4,
    calibration=calibration(np.array([0.2, 0.2, 0.9, 0.9]), np.array([0, 0, 1, 0])),
    corrected=None,
    tables=[
        SliceTable(
            "history length",
            "Events",
            [Slice("1–3", 4, 1, "GAUC", {"model": 0.7, "popularity": 0.6})],
            [Difference("GAUC", 0.1, 0.05, 0.15)],
        )
    ],
)


def example(*weights: float | None, rest: float = 0.0, num_rest: int = 0) -> ShownExample:
    behaviours = [Behaviour(age, f"i{age}", "c", age == 1, True, weight) for age, weight in enumerate(weights, 1)]
    return ShownExample("long history", "u1", "i1", "c", 1, 0.9996, len(weights) + num_rest, behaviours, num_rest, rest)


def text_of(findings: Findings) -> str:
    page = re.sub("<style>.*?</style>", "", render(findings, now=0), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", page)).split())


def found(**changes: object) -> Findings:
    data = Data(FACTS, {"train": 9, "validation": 0, "test": 4})
    return dataclasses.replace(Findings(RECORD, Config(), data, 7, EVALUATION), **changes)


def test_the_verdict_compares_with_the_best_floor() -> None:
    text = text_of(found())
    assert (
        "On 4 test examples the model reaches GAUC 0.7000, 0.0500 above the best floor, repeats of brand (0.6500)"
        in text
    )
    assert "(0.6500); 95 % interval of the difference +0.0200 to +0.0800." in text
    assert "2 users count, 1 have examples of one label only" in text
    assert "base rate alone 0.5623, nats" in text  # -(1/4 ln 1/4 + 3/4 ln 3/4)


def test_without_gauc_auc_decides() -> None:
    """And a model below a floor is told so."""
    rankings = [dataclasses.replace(ranking, gauc=math.nan) for ranking in EVALUATION.rankings]
    text = text_of(found(evaluation=dataclasses.replace(EVALUATION, rankings=rankings)))
    assert "the model reaches AUC 0.8000, 0.1000 below the best floor, popularity (0.9000)" in text
    assert "no user has examples of both labels" in text


def test_a_gain_that_may_be_chance_is_told_so() -> None:
    unsure = dataclasses.replace(EVALUATION, gain=Difference("GAUC", 0.05, -0.01, 0.11))
    text = text_of(found(evaluation=unsure))
    assert "95 % interval of the difference -0.0100 to +0.1100, which may be chance." in text


def test_only_what_is_certainly_worse_is_red() -> None:
    """In the slices, the track as well as the number; among features; and among lists."""
    gains = [Difference("GAUC", -0.05, -0.08, -0.02), Difference("GAUC", -0.05, -0.12, 0.02)]
    slices = [Slice(name, 4, 1, "GAUC", {"model": 0.7, "popularity": 0.75}) for name in "ab"]
    table = SliceTable("brand", "", slices, gains)
    page = render(found(evaluation=dataclasses.replace(EVALUATION, tables=[table])), now=0)
    assert page.count('class="gain worse"') == page.count('<td class="n worse">') == 1
    assert 'title="95 % interval -0.1200 to +0.0200"' in page
    features = [Gain(name, "user", "GAUC", -0.1, -0.2, high) for name, high in (("a", -0.1), ("b", 0.1))]
    assert render(found(gains=features), now=0).count('<td class="n worse">') == 1
    rows = [FoundAt(1, 0.1, 0.2, -0.2, -0.05), FoundAt(10, 0.1, 0.2, -0.2, 0.05)]
    retrieval = Retrieval(4, 4, 9, 0.0, True, rows)
    assert render(found(retrieval=retrieval), now=0).count('<td class="n worse">') == 1


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [
        ([(-0.2, -0.1), (0.1, 0.2), (0.1, 0.2)], "Popularity finds more than the model among the first 1."),
        (
            [(-0.2, -0.1), (-0.2, -0.1), (-0.1, 0.2)],
            "Popularity finds more than the model among the first 1 and 10; among the first 50 the two cannot be told "
            "apart.",
        ),
        ([(-0.1, 0.1)] * 3, "Among the first 1, 10 and 50 the two cannot be told apart."),
        ([(0.1, 0.2)] * 3, "The model finds more than popularity at every length."),
    ],
)
def test_what_is_said_of_the_first_places(bounds: list[tuple[float, float]], verdict: str) -> None:
    rows = [FoundAt(k, 0.25, 0.125, *each) for k, each in zip((1, 10, 50), bounds, strict=True)]
    text = text_of(found(retrieval=Retrieval(4, 8, 9, 0.5, False, rows)))
    assert verdict in text
    assert "25.00 % 12.50 % +0.1250" in text
    assert "4 of 8 events, each against all 9 items." in text
    assert "are candidates too, because 50 % of the events are repeats" in text
    assert "Finding the item among all" not in text_of(found())


def test_another_job_beside_this_one() -> None:
    theirs = dataclasses.replace(RECORD, folder=Path("runs/b<i>"), flags="--epochs=3\n--noresample\n--output_dir=x")
    ours = dataclasses.replace(RECORD, flags="--epochs=1\n--resample\n--output_dir=y")
    gain = Difference("GAUC", -0.02, -0.05, 0.01)
    text = text_of(dataclasses.replace(found(), record=ours, comparison=Comparison(theirs, 1200, gain)))
    assert (
        "On the same examples, this job's GAUC is 0.0200 below that of b<i> (update 1,200); 95 % interval of the "
        "difference -0.0500 to +0.0100, which may be chance."
    ) in text
    assert "Setting This job The other epochs 1 3 resample resample noresample" in text
    other = Comparison(theirs, problem="--compare: must be a job on the same prepared data.")
    assert "must be a job on the same prepared data." in text_of(found(comparison=other))


def test_a_setting_whose_name_begins_like_a_negation() -> None:
    found = differing_settings(
        "--normalize_vectors\n--resample_negatives", "--nonormalize_vectors\n--noresample_negatives"
    )
    assert found == [
        ("normalize_vectors", "normalize_vectors", "nonormalize_vectors"),
        ("resample_negatives", "resample_negatives", "noresample_negatives"),
    ]


def test_nothing_to_rank() -> None:
    rankings = [Ranking(ranking.name, math.nan, math.nan) for ranking in EVALUATION.rankings]
    text = text_of(found(evaluation=dataclasses.replace(EVALUATION, rankings=rankings, tables=[])))
    assert "The test split has no examples of both labels: there is nothing to rank." in text


def test_a_slice_by_auc_is_marked() -> None:
    slices = [
        Slice("1–3", 4, 1, "GAUC", {"model": 0.7, "popularity": 0.75}),
        Slice("4", 2, 1, "AUC", {"model": 1.0, "popularity": 0.5}),
        Slice("5", 2, 0, "AUC", {"model": math.nan, "popularity": math.nan}),
    ]
    gains = [Difference("GAUC", -0.05, -0.1, 0.0), Difference("AUC", 0.5, 0.5, 0.5), Difference("AUC", *[math.nan] * 3)]
    text = text_of(found(evaluation=dataclasses.replace(EVALUATION, tables=[SliceTable("brand", "", slices, gains)])))
    assert "1–3 4 popularity: 0.7500 model: 0.7000 0.7000 -0.050" in text
    assert "1.0000 * +0.500" in text
    assert "– * –" in text
    assert "* AUC, where no user has examples of both labels." in text


def test_mean_pooling_says_that_it_looks_at_nothing() -> None:
    text = text_of(found(shown=[example(None, None)]))
    assert "This model has no attention:" in text
    assert "i2" in text


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (ModelKind.DIN, "Deep Interest Network"),
        (ModelKind.MEAN_POOLING, "mean pooling of the history (no attention)"),
        (ModelKind.SR_GNN, "SR-GNN, which finds items"),
    ],
)
def test_a_model_is_called_by_its_name(model: ModelKind, name: str) -> None:
    assert f"Kind {name} Embeddings" in text_of(found(config=Config(model=ModelConfig(model=model))))


def test_weights_that_are_no_shares() -> None:
    config = Config(model=ModelConfig(attention_normalization="none"))
    findings = found(config=config, shown=[example(-2.5, 1.0, rest=12.25, num_rest=3)])
    assert "Weights are not normalised here" in text_of(findings)
    assert "3 others, together 12.2" in text_of(findings)
    page = render(findings)
    assert 'class="bar negative"' in page
    assert "weight -2.5" in page
    assert 'class="tick"' not in page


def test_bars_of_shares_are_to_scale() -> None:
    """The heaviest fills its place; the line of the equal share, 1/3, stands at 1/3 of 1/2."""
    averages = Averages(5, [("1", 1.5, 9), ("2", 0.5, 4)], [("item", 3, 0.1, 0.4)])
    page = render(found(shown=[example(0.5, 0.3, 0.2)], averages=[averages]))
    assert re.findall(r'class="fill" width="([\d.]+)%"', page)[-3:] == ["100.00", "60.00", "40.00"]
    assert set(re.findall(r'class="tick" x1="([\d.]+)%"', page)) == {"66.67", "10.00"}
    text = text_of(found(shown=[example(0.5, 0.3, 0.2)], averages=[averages]))
    for words in ("> 99.9 %", "50.0 %", "1.50", "40.0 % of the attention on 10.0 % of the history"):
        assert words in text, words


@pytest.mark.parametrize("status", Status)
def test_a_job_of_which_nothing_is_known(status: Status) -> None:
    findings = Findings(dataclasses.replace(RECORD, status=status, flags=None), problems=["no <settings>"])
    text = text_of(findings)
    assert f"a<b {status}" in text
    assert "Left out: no <settings>" in text
    assert "Nothing was logged yet" in text


def test_strange_lines_do_no_harm() -> None:
    """Strings where numbers belong, missing fields, an event that is an object."""
    lines = [
        {"kind": "train"},
        {"kind": "train", "step": "x", "time": "y", "loss": []},
        {"kind": "train", "step": 3, "time": 5.0, "loss": 0.5, "examples_per_second": 10.0},
        {"kind": "elastic", "time": 6.0, "event": {"a": "<b>"}},
        {"kind": ["end"], "seconds_by_phase": 3},
        {"kind": "end", "seconds_by_phase": {"training": "long"}},
    ]
    text = text_of(Findings(dataclasses.replace(RECORD, lines=lines, summary={"seconds": 3, "versions": []})))
    assert "{'a': '<b>'}" in text


def test_the_policy_allows_the_style_sheet_and_nothing_else() -> None:
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', render(found()))
    assert html.unescape(policy).startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


def test_the_page_orders_features_by_their_gain() -> None:
    rows = [
        Gain("h<b>our", "context", "GAUC", 0.01, -0.001, 0.02),
        Gain("age", "user", "GAUC", 0.25, 0.2, 0.3),
        Gain("noise", "user", "GAUC", -0.002, -0.004, 0.001),
    ]
    page = render(dataclasses.replace(found(), gains=rows), now=0)
    section = page.split("What each feature is worth")[1].split("</section>")[0]
    assert section.index("age") < section.index("h&lt;b&gt;our") < section.index("noise")
    assert "+0.2500" in section
    assert "-0.0040 to +0.0010" in section
    assert "What each feature is worth" not in render(found(), now=0)
