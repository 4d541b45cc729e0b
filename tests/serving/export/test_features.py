"""Own values inside a SavedModel: encoded as preparation encoded them, and scored as the trainer scores them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

from din_dist.config import BatchNorm, ModelKind, UnknownItem
from din_dist.data.event_store import ITEMS
from din_dist.data.pipeline import ExampleFeatures
from din_dist.data.splits import split_examples
from din_dist.distributed.runtime import Runtime
from din_dist.errors import InputError
from din_dist.evaluation.evaluator import Evaluator
from din_dist.features.encoding import Encoding, Lists, StoredFeature
from din_dist.features.gathering import missing_values
from din_dist.features.spec import FeatureSpec, Kind, Owner
from din_dist.features.times import TimestampUnit, time_rows
from din_dist.schema import Batch
from din_dist.serving.bundle import Bundle, as_tensor, inputs_of
from din_dist.serving.export import ranking_signatures
from din_dist.serving.export.features import Declared, ExampleInputs, TimeEncoder, encoder_of, input_names
from din_dist.serving.export.writer import TrainedModel, described_features, export
from din_dist.serving.own_values import OwnValues, by_owner
from din_dist.serving.scorer import ExportScorer
from tests.support.featured_log import featured_config
from tests.support.owners import OWNERS
from tests.support.patience import PATIENCE
from tests.support.trained_job import write_job


@dataclasses.dataclass(frozen=True)
class Job:
    """A job with a feature of every owner and kind, and its export."""

    trained: TrainedModel
    evaluator: Evaluator
    bundle: Bundle
    folder: Path

    @property
    def users(self) -> np.ndarray:
        """The user of each event."""
        store = self.trained.store
        return np.repeat(np.arange(store.facts.num_users), np.diff(store.user_offsets))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("featured")
    config = featured_config(folder)
    model, store = write_job(config)
    trained = TrainedModel(model, store, config, 7, "", None)
    evaluator = Evaluator(config, store, split_examples(store, config.data), Runtime())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking_signatures, "PAIRS_AT_ONCE", 40)  # so that requests are scored in parts
        export(trained, evaluator, "test", folder / "export")
    return Job(trained, evaluator, Bundle.open(folder / "export"), folder)


def test_values_become_what_preparation_stored(job: Job, tmp_path: Path) -> None:
    """Every kind: ids, bins, lists and vectors exactly, numbers to 1e-6."""
    store = job.trained.store
    events = np.arange(store.facts.num_events)
    own = OwnValues(store).of(job.users, events, store.item_ids)
    stored = ExampleFeatures(store).of(tf.constant(job.users), tf.constant(events), tf.constant(store.item_ids))
    described = {feature.name: feature for feature in described_features(store)}
    for number, encoding in enumerate(job.trained.model.encodings):
        name = encoding.spec.name
        encoder = encoder_of(Declared(store.features[name], store.feature_vocabulary(name)), tmp_path / f"{number}.txt")
        given = inputs_of(described[name], own[encoding.spec.owner][name], len(events)).values()
        tensors = {
            end: as_tensor(value, spec.dtype, name)
            for (end, spec), value in zip(encoder.specs.items(), given, strict=True)
        }
        found, expected = encoder.encode(tensors), stored[name]
        if isinstance(expected, Lists):
            for part, wanted in zip(found, expected, strict=True):
                assert_array_equal(part, wanted)
        elif expected.dtype == tf.float32:
            assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
        else:
            assert found.dtype == expected.dtype
            assert_array_equal(found, expected)
        missing = missing_values([encoding], 3)[name]
        given = inputs_of(described[name], None, 3).values()
        tensors = {
            end: as_tensor(value, spec.dtype, name)
            for (end, spec), value in zip(encoder.specs.items(), given, strict=True)
        }
        for part, wanted in zip(tf.nest.flatten(encoder.encode(tensors)), tf.nest.flatten(missing), strict=True):
            assert_array_equal(part, wanted)


def test_one_or_several_at_a_time_the_logits_are_the_trainers(job: Job) -> None:
    """`score`, `score_padded`, `rank` and `rank_histories`, with several candidates of a history."""
    store, bundle = job.trained.store, job.bundle
    events = np.arange(0, store.facts.num_events, 3)
    users = job.users[events]
    ids = store.vocabulary(ITEMS).to_numpy()
    histories = [ids[store.item_ids[event : event + 4] - 1] for event in events]
    histories[3] = histories[3][:0]
    flat, lengths = np.concatenate(histories), np.array([len(history) for history in histories])
    own = by_owner(OwnValues(store).of(users, events, store.item_ids[events]))
    candidates = ids[store.item_ids[events] - 1]
    rows = ExampleFeatures(store)
    features = rows.of(tf.constant(users), tf.constant(events), tf.constant(store.item_ids[events]))
    expected = trainer_logits(job, flat, lengths, candidates, features)
    assert expected.std() > 0.1
    assert_allclose(bundle.score(flat, lengths, candidates, **own), expected, rtol=1e-5, atol=1e-5)
    none = trainer_logits(job, flat, lengths, candidates, missing_values(job.trained.model.encodings, len(events)))
    assert np.abs(none - expected).max() > 0.1
    assert_allclose(bundle.score(flat, lengths, candidates), none, rtol=1e-5, atol=1e-5)

    # The first two users and contexts, with all candidates each.
    few = first_rows(own, 2)
    few["candidate"] = {name: twice(value) for name, value in own["candidate"].items()}
    end = lengths[:2].sum()
    counts = np.array([len(events)] * 2)
    found = bundle.rank_histories(flat[:end], lengths[:2], np.tile(candidates, 2), counts, **few)
    repeated = np.repeat([0, 1], len(events))
    shown = tf.constant(np.tile(store.item_ids[events], 2))
    features = rows.of(tf.constant(users[repeated]), tf.constant(events[repeated]), shown)
    of_candidates = rows.of(tf.constant(users[repeated]), tf.constant(np.tile(events, 2)), shown)
    features = {
        name: of_candidates[name] if store.features[name].encoding.spec.owner is Owner.CANDIDATE else value
        for name, value in features.items()
    }
    both = [histories[row] for row in repeated]
    lengths_of_both = np.array([len(history) for history in both])
    expected = trainer_logits(job, np.concatenate(both), lengths_of_both, np.tile(candidates, 2), features)
    assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    ranked = bundle.rank(histories[0], candidates, 5, **first_rows(own, 1), candidate=own["candidate"])
    order = np.argsort(-expected[: len(events)], kind="stable")[:5]
    assert_allclose(ranked["logits"], expected[order], rtol=1e-5, atol=1e-5)


def first_rows(own: dict[str, Any], num_rows: int) -> dict[str, Any]:
    """The first values of users and contexts."""
    owners = ("user", "context")
    return {owner: {name: of_rows(value, slice(0, num_rows)) for name, value in own[owner].items()} for owner in owners}


def of_rows(value: Any, rows: slice) -> Any:
    """The values of some rows."""
    if not isinstance(value, Lists):
        return value[rows]
    ends = np.cumsum(value.lengths)
    part = slice(int(ends[rows][0] - value.lengths[rows][0]), int(ends[rows][-1]))
    return Lists(value.values[part], value.lengths[rows], None if value.weights is None else value.weights[part])


def twice(value: Any) -> Any:
    """The values, and then once more."""
    if isinstance(value, Lists):
        return Lists(*(None if part is None else np.concatenate([part, part]) for part in value))
    return np.concatenate([value, value])


def trainer_logits(
    job: Job, flat: np.ndarray, lengths: np.ndarray, candidates: np.ndarray, features: Any
) -> np.ndarray:
    """Returns what the model itself gives."""
    dense = {own: number for number, own in enumerate(job.trained.store.vocabulary(ITEMS).to_pylist(), start=1)}
    batch = Batch(
        candidate_item_ids=tf.constant([dense[own] for own in candidates.tolist()], tf.int32),
        history_item_ids=tf.constant([dense[own] for own in flat.tolist()], tf.int32),
        history_lengths=tf.constant(lengths, tf.int32),
        features=features,
    )
    return job.trained.model(batch, training=False).numpy()


def test_new_items_may_bring_their_categories(job: Job) -> None:
    """An item that is known to the model, given as a new one with its brand, differs by what cannot be given."""
    store, bundle = job.trained.store, job.bundle
    assert bundle.manifest.item_features == {"brand": "string"}
    (item,) = store.vocabulary(ITEMS).to_numpy()[:1]
    history = np.full(3, item)
    plain = bundle.score(history, [3], [item])
    assert_allclose(bundle.score_with_features(history, [3], [item], {}, {}), plain, rtol=1e-6)
    other = bundle.score_with_features(history, [3], [item], {}, {"brand": ["never seen"]})
    assert np.abs(other - plain).max() > 1e-4
    age = {"age": [store.feature_vocabulary("age")[0].as_py()]}
    given = bundle.score_with_features(history, [3], [item], {}, {}, user=age)
    assert_allclose(given, bundle.score(history, [3], [item], user=age), rtol=1e-6)
    assert np.abs(given - plain).max() > 1e-4


def test_an_export_is_evaluated_with_the_own_values(job: Job) -> None:
    examples = job.evaluator.examples("test")
    scorer = ExportScorer(job.bundle, job.trained.store, examples)
    found = job.evaluator.scores("test", scorer.of_batch)
    expected = job.evaluator.scores("test", lambda batch: job.trained.model(batch, training=False))
    assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# Scores where this package cannot be imported.
ALONE = """
import sys
sys.modules["din_dist"] = None
import tensorflow as tf

scorer = tf.saved_model.load(sys.argv[1]).signatures["score"]
specs = scorer.structured_input_signature[1]
missing = {tf.string: "", tf.int64: tf.int64.min, tf.float32: float("nan")}
inputs = {
    name: tf.zeros([1], tf.int64) if name.endswith("_lengths") else
    tf.zeros([0], spec.dtype) if f"{name.removesuffix('_weights')}_lengths" in specs else
    tf.fill([1, *spec.shape[1:]], tf.constant(missing[spec.dtype], spec.dtype))
    for name, spec in specs.items()
}
inputs["candidate_item_ids"] = tf.constant([101], tf.int64)
inputs["history_item_ids"], inputs["history_lengths"] = tf.zeros([0], tf.int64), tf.zeros([1], tf.int64)
print(scorer(**inputs)["logits"].numpy()[0])
"""


def test_it_needs_nothing_but_tensorflow(job: Job, tmp_path: Path) -> None:
    words = [sys.executable, "-c", ALONE, str(job.folder / "export")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert_allclose(float(done.stdout), job.bundle.score([], [0], [101])[0], rtol=1e-5)


EXAMPLES = (Owner.USER, Owner.CONTEXT, Owner.CANDIDATE)
OTHER_JOBS: dict[str, dict[str, Any]] = {
    "items": {"owners": (Owner.ITEM,)},
    "users": {"owners": (Owner.USER,)},
    "candidates": {"owners": (Owner.CANDIDATE,)},
    "drawn negatives": {"owners": OWNERS, "labels": False},
    "mean pooling": {"owners": EXAMPLES, "model": ModelKind.MEAN_POOLING, "batch_norm": BatchNorm.FROZEN},
    "items by their features": {
        **{"owners": (Owner.ITEM,), "labels": False},
        **{"unknown_item": UnknownItem.FEATURES, "item_features": ("maker",)},
    },
}


@pytest.mark.thorough(unless=lambda case: case["name"] in ("candidates", "mean pooling", "items by their features"))
@pytest.mark.parametrize("name", OTHER_JOBS)
def test_other_jobs_are_exported(tmp_path: Path, name: str) -> None:
    """The comparison with the trainer is part of the export."""
    config = featured_config(tmp_path, **OTHER_JOBS[name])
    model, store = write_job(config)
    evaluator = Evaluator(config, store, split_examples(store, config.data), Runtime())
    manifest = export(TrainedModel(model, store, config, 7, "", None), evaluator, "test", tmp_path / "export")
    assert manifest.num_compared > 30
    assert {feature.owner for feature in manifest.features} == set(OTHER_JOBS[name]["owners"])
    if name.startswith("items"):
        bundle = Bundle.open(tmp_path / "export")
        assert set(bundle.signature("score").structured_input_signature[1]) == {
            *("history_item_ids", "history_lengths", "candidate_item_ids")
        }


WRONG_HOURS = {"split\\.": lambda rows: rows % 7 + 1, "features missing": lambda rows: tf.where(rows == 0, 5, rows)}


@pytest.mark.thorough(unless=lambda case: case["message"] == "features missing")
@pytest.mark.parametrize("message", WRONG_HOURS)
def test_another_encoding_is_not_published(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    """The comparison sees an hour that is wrong, and a wrong value for what is missing."""
    encode = TimeEncoder.encode
    monkeypatch.setattr(TimeEncoder, "encode", lambda self, given: WRONG_HOURS[message](encode(self, given)))
    with pytest.raises(FloatingPointError, match=f"trainer's logits.*{message}.*Nothing was published"):
        export(job.trained, job.evaluator, "test", tmp_path / "export")
    assert not (tmp_path / "export").exists()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a name": ({"user": {"hour": [1]}}, "user features: must be features of the model. Received: 'hour'. Choose among"),
    "too few": ({"user": {"age": ["x", "y"]}}, "user_age must have one value for each"),
    "another type": ({"user": {"age": [3]}}, "user_age: must be strings. Received: 3"),
    "text": ({"user": {"income": ["much"]}}, "user_income: must be numbers"),
    "infinite": ({"user": {"income": [np.inf]}}, "user_income: numbers must be finite and fit float32. Received: inf"),
    "a list": ({"user": {"interests": [["a"]]}}, "interests: lists are given as Lists"),
    "no weights": ({"user": {"interests": Lists(["a"], [1], None)}}, "interests: each value needs a weight"),
    "weights": ({"user": {"interests": Lists(["a"], [1], [])}}, "user_interests_weights and user_interests must be"),
    "lengths": ({"user": {"interests": Lists(["a"], [2], [1.0])}}, "user_interests_lengths must not be negative and"),
    "dimension": ({"user": {"taste": [[1.0, 2.0]]}}, "user_taste: must be vectors of 3 numbers. Received: shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_one_line(job: Job, case: str) -> None:
    given, message = WRONG[case]
    with pytest.raises(InputError, match=message) as caught:
        job.bundle.score([100], [1], [101], **given)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.thorough(unless=lambda case: case["zone"] in ("UTC", "Africa/Casablanca"))
@pytest.mark.parametrize("zone", ["UTC", "Europe/Vienna", "America/New_York", "Asia/Kathmandu", "Africa/Casablanca"])
@pytest.mark.parametrize("kind", [Kind.HOUR_OF_DAY, Kind.DAY_OF_WEEK])
def test_times_of_any_zone_and_century(zone: str, kind: Kind) -> None:
    """As preparation finds them: changes of the clock, times before 1970, and such that no calendar has."""
    random = np.random.default_rng(0)
    times = np.concatenate(
        [
            random.integers(-6_000_000_000, 20_000_000_000, 3000),
            random.integers(0, 2_500_000_000, 5000),
            1_711_846_800 + np.arange(-40, 40) * 300,  # the end of winter in 2024
            np.array([-(2**63) + 1, 2**63 - 1, -(10**13), 10**13]),
        ]
    )
    encoding = Encoding(FeatureSpec("t", Owner.CONTEXT, kind), 25, integers=True, unit="seconds", timezone=zone)
    found = TimeEncoder(encoding).encode({"": tf.constant(times)})
    assert_array_equal(found, time_rows(times, kind, TimestampUnit.SECONDS, zone))
    assert TimeEncoder(encoding).encode({"": tf.constant([-(2**63)], tf.int64)}).numpy().tolist() == [0]


def test_names_of_inputs_are_each_there_once() -> None:
    names = input_names(["tags_lengths", "tags", "größe", "counts", "feature_2", "TAGS"], ["tags", "größe"])
    assert names["tags_lengths"] == "tags_lengths"
    assert names["tags"] != "tags"  # its lengths would have the name of another feature
    assert len({name.lower() for name in names.values()}) == len(names)


def test_without_features_of_examples_there_are_no_inputs() -> None:
    assert ExampleInputs([], {}).specs == {}
    assert ExampleInputs([], {}).encode({}, OWNERS, tf.constant(3), "candidate") == {}


def test_lists_lose_ids_that_are_missing(tmp_path: Path) -> None:
    spec = FeatureSpec("t", Owner.USER, Kind.CATEGORIES)
    feature = Declared(StoredFeature(Encoding(spec, 3), np.zeros(0, np.int32)), pa.array(["a", "b"]))
    given = {"": tf.constant(["b", "", "new", "a"]), "_lengths": tf.constant([2, 0, 2], tf.int64)}
    found = encoder_of(feature, tmp_path / "ids.txt").encode(given)
    assert [part.numpy().tolist() for part in found] == [[2, 0, 1], [1, 0, 2], []]


def test_the_manifest_describes_each_feature(job: Job) -> None:
    manifest = job.bundle.manifest
    described = {feature.name: feature for feature in manifest.features}
    assert set(described) == set(job.trained.store.features)
    assert described["interests"].inputs == ["user_interests", "user_interests_lengths", "user_interests_weights"]
    hour = described["hour"]
    assert (hour.type, hour.unit, hour.missing) == ("integer", "seconds", -(2**63))
    assert described["brand"].inputs == ["history_brand", "candidate_brand"]
    assert (described["picture"].inputs, described["picture"].dimension) == ([], 4)
    assert described["style"].type == "string"
    specs = job.bundle.signature("rank").structured_input_signature[1]
    own = {name for feature in manifest.features if feature.owner != "item" for name in feature.inputs}
    assert set(specs) == own | {"history_item_ids", "candidate_item_ids", "k"}
