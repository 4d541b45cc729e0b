"""Settings as checkpoints and flags.txt keep them: the same bytes and digests for the same flags, for ever.

The expected values were computed at commit 6fa4467, when the settings of a job were four classes.
"""

from __future__ import annotations

import hashlib
import json

import pytest
from absl import flags

from din_dist.cli.flags import config_from_flags, define_flags, to_flagfile
from din_dist.config import differences, digest_of

DATA = (
    *("--dataset=event_log", "--data_path=/data/my log.csv", "--item_features=brand,category"),
    *("--label_column=clicked", "--negatives_per_positive=3", "--unknown_item=features", "--unknown_item_rate=0.2"),
    *("--split=temporal", "--validation_from=-5", "--test_from=9223372036854775807"),
)
LEARNING = (
    *("--model=mean_pooling", "--embedding_dim=32,8", "--hidden_units=200,80", "--dropout=0.5"),
    *("--optimizer=adagrad", "--adagrad_row_wise", "--wire_dtype=bfloat16", "--learning_rate=0.25"),
    *("--learning_rate_schedule=warmup_cosine", "--warmup_steps=7", "--global_batch_size=32", "--seed=4294967295"),
)
FREE = (
    *("--noxla", "--nonative", "--compute_dtype=bfloat16", "--checkpoint_every_steps=9"),
    *("--rejoin_timeout_seconds=7.5", "--skip_nonfinite_steps=3", "--keep_checkpoints=4", "--evaluate_every_steps=11"),
    *("--evaluation_batch_size=12", "--log_every_steps=13", "--log_format=json", "--metrics_port=-1"),
    *("--pushgateway=http://gateway:9091", "--output_dir=/runs/a", "--epochs=5", "--max_steps=100"),
    *("--baseline_examples_per_second=5.5", "--data_dir=/prepared"),
)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@pytest.mark.parametrize(
    ("given", "saved", "flagfile", "digest"),
    [
        ((), "4c20c6a05a1c37bf", "dcb393a9bd05370c", 1356451736695033105),
        (DATA, "332989fd7bdf7e6a", "f01ff010b2401281", 6664036451462831531),
        (LEARNING, "464184d94ef7f2fe", "2dcf63162e9b93f6", 6333957701466079826),
        (FREE, "0d7cf26b7f4d63ac", "a04893209fc184f5", 1356451736695033105),
    ],
    ids=["none", "data", "learning", "free"],
)
def test_what_is_saved_keeps_its_bytes(given: tuple[str, ...], saved: str, flagfile: str, digest: int) -> None:
    values = flags.FlagValues()
    define_flags(values)
    values(["program", *given])
    config = config_from_flags(values)
    assert list(config.to_json()) == ["data", "model", "optimizer", "job"]
    assert _hash(json.dumps(config.to_json())) == saved
    assert _hash(to_flagfile(values)) == flagfile
    assert digest_of(config, "of the data") == digest


def test_only_settings_that_decide_what_is_learned_differ() -> None:
    values = flags.FlagValues()
    define_flags(values)
    values(["program", *LEARNING, *FREE, "--data_path=", "--evaluation_negatives_per_positive=5"])
    current = json.loads(json.dumps(config_from_flags(values).to_json()))
    assert differences({}, current) == [
        "--model: din, now mean_pooling",
        "--embedding_dim: [64], now [32, 8]",
        "--hidden_units: [80, 40], now [200, 80]",
        "--dropout: 0.0, now 0.5",
        "--optimizer: lazy_adam, now adagrad",
        "--adagrad_row_wise: False, now True",
        "--learning_rate: 0.001, now 0.25",
        "--learning_rate_schedule: constant, now warmup_cosine",
        "--warmup_steps: 0, now 7",
        "--global_batch_size: 1024, now 32",
        "--seed: 1234, now 4294967295",
    ]
