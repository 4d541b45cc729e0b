"""Encodes declared features by the training part alone, and keeps the arrays beside the packed events.

PACKED/features-SPLIT-DIGEST/
    encodings.json           the `Encoding` of each feature
    INDEX-NAME.npy           the arrays of `StoredFeature` that differ from the raw ones

The training part is all events that are not held out (`splits.held_out`), a user's first ones included. An event of it
counts for a feature of users or items if its row told the value, or a table did. So rows that are held out change no
bound, mean or vocabulary.

Letters of shapes: E events, n rows of a feature's owner, K values of a vocabulary, M values of all lists.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from din_dist import progress
from din_dist.config import DataConfig
from din_dist.data.checksums import write_checksums
from din_dist.data.event_store import EventStore, map_array, reading_prepared
from din_dist.data.raw_columns import RawColumn, RawFeature
from din_dist.data.raw_features import open_offers, open_raw, raw_ids
from din_dist.data.splits import Examples, behaviour_counts, held_out, kept_in, split_examples, trained_behaviours
from din_dist.data.walks import parts
from din_dist.errors import InputError
from din_dist.features.encoding import Encoding, FeatureCounts, StoredFeature
from din_dist.features.offers import Offers
from din_dist.features.spec import NUM_TIME_IDS, FeatureSpec, Form, Kind, Owner, Scale, to_text
from din_dist.features.times import TimestampUnit, time_rows, unit_of
from din_dist.files import published_folder, read_record, write_text
from din_dist.tables.values import IdValues, ListValues, NumberValues, VectorValues
from din_dist.text import parse_json

_NAME = "features"
_FILE = "encodings.json"
_AT_ONCE = 10_000_000  # events in memory at once
_LARGEST = float(np.finfo(np.float32).max)
_DTYPES: Mapping[Form, type] = {
    Form.IDS: np.int32,
    Form.LISTS: np.int32,
    Form.NUMBERS: np.float32,
    Form.VECTORS: np.float16,
}

Arrays = dict[str, np.ndarray]  # by the attributes of `StoredFeature`


def encoded_folder(store: EventStore, config: DataConfig) -> Path:
    """Returns the folder of the encoded arrays, whose name follows from the split and the declarations."""
    folder = kept_in(_NAME, store, config)
    key = json.dumps([to_text(config.feature_specs), config.timestamp_unit, config.timezone])
    return folder.with_name(f"{folder.name}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}")


def write_encoded(folder: Path, store: EventStore, config: DataConfig) -> None:
    """Publishes the encoded arrays. The caller must hold a lock, so that they are made once.

    Raises:
        InputError: no event is left to train on, or a feature has no values.
        OSError: the folder cannot be written.
    """
    encoder = _Encoder(store, config)
    with published_folder(folder) as aside:
        encodings = []
        for index, spec in enumerate(config.feature_specs):
            progress.note()
            encoding, arrays = encoder.encode(spec)
            encodings.append(encoding.to_json())
            for name, array in arrays.items():
                np.save(aside / f"{index}-{name}.npy", array)
        write_text(aside / _FILE, json.dumps(encodings) + "\n")
        write_checksums(aside)


def encoded_in_memory(store: EventStore, config: DataConfig) -> dict[str, StoredFeature]:
    """Returns the features as `open_encoded` does, where nothing can be written.

    Raises:
        InputError: no event is left to train on, or a feature has no values.
    """
    encoder = _Encoder(store, config)
    found = {}
    for spec in config.feature_specs:
        encoding, arrays = encoder.encode(spec)
        found[spec.name] = _stored(encoding, arrays, encoder.raw(spec), encoder.offers if spec.by else None)
    return found


def open_encoded(folder: Path, store: EventStore, config: DataConfig) -> dict[str, StoredFeature]:
    """Maps the encoded arrays into memory. The state of each file is noted in the store.

    Raises:
        InputError: a file is missing or damaged.
    """
    with reading_prepared(folder / _FILE) as path:
        encodings = [Encoding.from_json(fields) for fields in parse_json(read_record(path))]
        if [encoding.spec for encoding in encodings] != list(config.feature_specs):
            raise ValueError("its features are others than those declared")
    found = {}
    offers = _open_offers(store) if any(encoding.spec.by for encoding in encodings) else None
    for index, encoding in enumerate(encodings):
        files = {path.name for path in folder.glob(f"{index}-*.npy")}
        names = [name.removeprefix(f"{index}-").removesuffix(".npy") for name in sorted(files)]
        arrays = {name: np.asarray(map_array(folder / f"{index}-{name}.npy", store.files)) for name in names}
        raw = _used_raw(encoding.spec, store)
        found[encoding.spec.name] = stored = _stored(encoding, arrays, raw, offers if encoding.spec.by else None)
        _check(stored, store, folder)
    return found


def _check(feature: StoredFeature, store: EventStore, folder: Path) -> None:
    """Refuses arrays that do not fit the events."""
    spec, facts = feature.encoding.spec, store.facts
    rows = {Owner.USER: facts.num_users, Owner.ITEM: facts.num_items + 1}.get(spec.owner, facts.num_events)
    if spec.owner is Owner.HISTORY:
        rows = 0 if spec.kind is Kind.TIME_SINCE else len(store.behaviour_times)
    if feature.offers is not None:
        rows = feature.offers.num_rows
    found = len(feature.values) if feature.offsets is None else len(feature.offsets) - 1
    ends = feature.offsets is None or int(feature.offsets[-1]) == len(feature.values)
    if found != rows or not ends or feature.values.dtype != _DTYPES[spec.form]:
        raise InputError(
            f"{folder}: feature {spec.name} must have {rows:,} rows of {np.dtype(_DTYPES[spec.form])}. Received: "
            f"{found:,} of {feature.values.dtype}. Delete this folder."
        )


def _used_raw(spec: FeatureSpec, store: EventStore) -> RawFeature | None:
    """Returns the raw values of a feature whose encoded arrays do not replace all of them; see `_stored`."""
    column = RawColumn.of(spec)
    if column is None or column.kind not in (Kind.CATEGORIES, Kind.VECTOR):
        return None
    return open_raw(store.folder, column, store.files)


def _open_offers(store: EventStore) -> Offers:
    return open_offers(store.folder, store.facts.num_items, store.files)


def _stored(
    encoding: Encoding, arrays: Mapping[str, Any], raw: RawFeature | None, offers: Offers | None
) -> StoredFeature:
    """Returns a feature from its encoded arrays, and from those raw ones that are used as they are."""
    values = raw.values if raw else None
    if isinstance(values, ListValues):
        found = StoredFeature(encoding, offsets=values.offsets, weights=values.weights, **arrays)
    elif isinstance(values, VectorValues) and encoding.spec.trained:
        found = StoredFeature(encoding, **{"start": values.vectors, **arrays})
    elif isinstance(values, VectorValues):
        found = StoredFeature(encoding, values.vectors)
    else:
        found = StoredFeature(encoding, **arrays)
    return dataclasses.replace(found, offers=offers)


class _Encoder:
    """Encodes features of one data set by one split.

    Args:
        store: the events.
        config: the split, and how times are read.
    """

    def __init__(self, store: EventStore, config: DataConfig) -> None:
        self._store, self._config = store, config

    @functools.cached_property
    def _splits(self) -> Mapping[str, Examples]:
        return split_examples(self._store, self._config)

    @functools.cached_property
    def _trains(self) -> np.ndarray:
        """Tells of each event if it is of the training part, bool `[E]`."""
        found = np.ones(self._store.facts.num_events, bool)
        for events in held_out(self._splits):
            found[events] = False
        return found

    @functools.cached_property
    def offers(self) -> Offers:
        """The offers of a data set that has a table of them."""
        return _open_offers(self._store)

    @functools.cached_property
    def _rows_of_offers(self) -> np.ndarray:
        """The row of each event's offer, int64 `[E]`."""
        return self.offers.rows(np.arange(self._store.facts.num_events), self._store.item_ids)

    def raw(self, spec: FeatureSpec) -> RawFeature | None:
        """Returns the raw values of a feature; None: it is made from the time."""
        column = RawColumn.of(spec)
        return open_raw(self._store.folder, column, self._store.files) if column else None

    def encode(self, spec: FeatureSpec) -> tuple[Encoding, Arrays]:
        """Returns how a feature is encoded, and the arrays that differ from the raw ones.

        Raises:
            InputError: no event is left to train on, or the feature has no values.
        """
        raw = self.raw(spec)
        if raw is None:
            return self._encode_times(spec)
        missing = ~raw.values.given
        missing = missing[self._rows_of_offers] if spec.by else missing
        num_missing = int(np.count_nonzero(missing)) - (spec.owner is Owner.ITEM)  # item 0 has none
        counts = FeatureCounts(missing=num_missing, extra=raw.extra)
        weights = self._weights(spec, raw.told)
        match raw.values:
            case VectorValues():
                return self._encode_vectors(spec, raw.values, counts)
            case NumberValues():
                return _encode_numbers(spec, raw.values.numbers, weights, counts)
            case IdValues():
                return self._encode_ids(spec, raw.values.codes, weights, counts)
            case ListValues():
                weights = np.repeat(weights, np.diff(raw.values.offsets))
                return self._encode_ids(spec, raw.values.codes, weights, counts)
        raise TypeError(type(raw.values))

    def _weights(self, spec: FeatureSpec, told: np.ndarray | None) -> np.ndarray:
        """Returns how many training events tell the value of each row, int64 `[n]`; of items also the behaviours."""
        counted = self._trains if told is None else self._trains & told
        if spec.by:
            return np.bincount(self._rows_of_offers[counted], minlength=self.offers.num_rows)
        match spec.owner:
            case Owner.USER:
                before = np.zeros(len(counted) + 1, np.int64)
                np.cumsum(counted, out=before[1:])
                return np.diff(before[self._store.user_offsets])
            case Owner.ITEM:
                found = np.zeros(self._store.facts.num_items + 1, np.int64)
                for part in parts(len(counted)):
                    found += np.bincount(self._store.item_ids[part][counted[part]], minlength=len(found))
                return found + behaviour_counts(self._store, self._splits["train"])
            case Owner.HISTORY if self._store.facts.has_behaviours:
                return trained_behaviours(self._store, self._splits["train"]).astype(np.int64)
            case _:
                return counted.astype(np.int64)

    def _encode_ids(
        self, spec: FeatureSpec, codes: np.ndarray, weights: np.ndarray, counts: FeatureCounts
    ) -> tuple[Encoding, Arrays]:
        """Encodes ids of rows, or of lists.

        Args:
            spec: the declaration.
            codes: int32, 1 + the place in the raw vocabulary; 0 where it is missing.
            weights: int64, the number of training events of each.
            counts: what is known so far.
        """
        column = RawColumn.of(spec)
        assert column is not None
        ids = raw_ids(self._store.folder, column).combine_chunks()
        occurring, events = np.zeros(len(ids) + 1, bool), np.zeros(len(ids) + 1, np.int64)
        for part_of in parts(len(codes)):
            part = codes[part_of]
            occurring[part] = True
            trained = weights[part_of]
            events += np.bincount(part, trained, len(events)).astype(np.int64)
        counts = dataclasses.replace(counts, distinct=int(np.count_nonzero(occurring[1:])))
        integers = pa.types.is_integer(ids.type)
        if spec.rows:
            from din_dist.data.hashing import rows_of_ids  # here, because it imports TensorFlow

            row_of_code = np.concatenate([[0], rows_of_ids(ids, spec.rows)]).astype(np.int32)
            counts = dataclasses.replace(counts, colliding=_share_colliding(row_of_code[1:], events[1:]))
            encoding = Encoding(spec, num_rows=spec.rows + 1, integers=integers, counts=counts)
            return encoding, {"values": row_of_code[codes]}
        kept = np.flatnonzero(events[1:] >= spec.min_count)
        kept = kept[pc.array_sort_indices(ids.take(pa.array(kept))).to_numpy()].astype(np.int32)
        row_of_code = np.zeros(len(ids) + 1, np.int32)
        row_of_code[kept + 1] = np.arange(1, len(kept) + 1)
        counts = dataclasses.replace(counts, rare=counts.distinct - len(kept))
        encoding = Encoding(spec, num_rows=len(kept) + 1, integers=integers, counts=counts)
        return encoding, {"values": row_of_code[codes], "vocabulary": kept}

    def _encode_vectors(
        self, spec: FeatureSpec, values: VectorValues, counts: FeatureCounts
    ) -> tuple[Encoding, Arrays]:
        dimension = values.vectors.shape[1]
        if not dimension:
            raise InputError(
                f"--features: a vector needs a value in some row. Received: none of {spec.name}. Drop it, or correct "
                "its column."
            )
        counts = dataclasses.replace(counts, distinct=len(values) - counts.missing - (spec.owner is Owner.ITEM))
        if not spec.trained:
            return Encoding(spec, dimension=dimension, counts=counts), {}
        if spec.owner is Owner.ITEM:
            rows, start = np.arange(len(values), dtype=np.int32), {}
        else:  # item 0 has a row of its own already
            unknown = np.full((1, dimension), np.nan, np.float16)
            rows = np.arange(1, len(values) + 1, dtype=np.int32)
            start = {"start": np.concatenate([unknown, values.vectors])}
        encoding = Encoding(spec, num_rows=int(rows[-1]) + 1, dimension=dimension, counts=counts)
        return encoding, {"values": rows, **start}

    def _encode_times(self, spec: FeatureSpec) -> tuple[Encoding, Arrays]:
        if spec.kind is Kind.TIME_SINCE:  # it depends on the request, so nothing is stored
            encoding = Encoding(spec, NUM_TIME_IDS[spec.kind] + 1, integers=True)
            return encoding, {"values": np.zeros(0, np.int32)}
        unit, zone = self._unit, self._config.timezone
        timestamps = self._store.timestamps
        found = [time_rows(timestamps[part], spec.kind, unit, zone) for part in parts(len(timestamps))]
        rows = np.concatenate(found)
        num_rows = NUM_TIME_IDS[spec.kind] + 1
        counts = FeatureCounts(distinct=int(np.count_nonzero(np.bincount(rows, minlength=num_rows))))
        return Encoding(spec, num_rows, integers=True, unit=unit, timezone=zone, counts=counts), {"values": rows}

    @functools.cached_property
    def _unit(self) -> TimestampUnit:
        if self._config.timestamp_unit is not TimestampUnit.AUTO:
            return self._config.timestamp_unit
        found = self._store.timestamps[self._trains]
        stride = max(1, len(found) // _AT_ONCE)  # a sample is enough, the same one every time
        return unit_of(float(np.median(found[::stride])))


def _share_colliding(rows: np.ndarray, events: np.ndarray) -> float:
    """Returns the share of the training events whose row belongs to several values.

    Args:
        rows: int32 `[K]`, the row of each value.
        events: int64 `[K]`, the number of its training events.
    """
    trained = np.flatnonzero(events)
    if not len(trained):
        return 0.0
    _, row_of, values = np.unique(rows[trained], return_inverse=True, return_counts=True)
    shared = values[row_of] > 1
    return float(events[trained][shared].sum() / events.sum())


def _encode_numbers(
    spec: FeatureSpec, numbers: np.ndarray, weights: np.ndarray, counts: FeatureCounts
) -> tuple[Encoding, Arrays]:
    """Encodes numbers.

    Args:
        spec: the declaration.
        numbers: float32 `[n]`; NaN where they are missing.
        weights: int64 `[n]`, the number of training events of each row.
        counts: what is known so far.
    """
    given = ~np.isnan(numbers)
    counts = dataclasses.replace(counts, distinct=len(np.unique(numbers[given])))
    trained = given & (weights > 0)
    # Sorted, so that sums do not depend on the order of the rows.
    values, value_of = np.unique(numbers[trained].astype(np.float64), return_inverse=True)
    events = np.bincount(value_of, weights[trained], len(values)).astype(np.int64)
    scale = spec.encode.scale
    if scale is Scale.QUANTILES:
        bounds = _quantiles(values, events, spec.encode.bins)
        rows = np.where(given, 1 + np.searchsorted(bounds, numbers, side="right"), 0).astype(np.int32)
        return Encoding(spec, len(bounds) + 2, bounds=tuple(bounds), counts=counts), {"values": rows}
    mean, deviation = (0.0, 1.0) if scale is Scale.NONE else _moments(_scaled(values, scale), events)
    encoded = (_scaled(numbers.astype(np.float64), scale) - mean) / deviation
    encoded = np.clip(encoded, -_LARGEST, _LARGEST).astype(np.float32)
    return Encoding(spec, mean=mean, deviation=deviation, counts=counts), {"values": encoded}


def _scaled(numbers: np.ndarray, scale: Scale) -> np.ndarray:
    return np.sign(numbers) * np.log1p(np.abs(numbers)) if scale is Scale.LOG else numbers


def _moments(values: np.ndarray, events: np.ndarray) -> tuple[float, float]:
    """Returns mean and standard deviation of values that occur `events` times; 1 where the deviation is 0."""
    if len(values) < 2:
        return (float(values[0]) if len(values) else 0.0), 1.0
    total = events.sum()
    mean = float((values * (events / total)).sum())
    deviation = float(np.sqrt((np.square(values - mean) * (events / total)).sum()))
    return mean, deviation or 1.0


def _quantiles(values: np.ndarray, events: np.ndarray, bins: int) -> list[float]:
    """Returns the bounds between bins of equally many events: values that occur (nearest rank), each once.

    Args:
        values: ascending.
        events: how often each occurs.
        bins: the number of bins.
    """
    if not len(values):
        return []
    reached = np.cumsum(events)
    total = int(reached[-1])
    ranks: Sequence[int] = [-(-part * total // bins) for part in range(1, bins)]
    return np.unique(values[np.searchsorted(reached, ranks)]).tolist()
