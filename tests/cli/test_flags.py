"""Flags are the settings, and every flagfile is a job that would start."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from absl import flags

from din_dist.cli.flags import config_from_flags, define_flags, problem_of, to_flagfile, with_our_flagfiles
from din_dist.config import Config, OptimizerKind, differences
from din_dist.errors import InputError
from din_dist.features.spec import shorthand
from tests.support.repository import ROOT

FLAGFILES = sorted((ROOT / "launch" / "flags").glob("*.flags"))


def parse(*arguments: str) -> Config:
    values = flags.FlagValues()
    define_flags(values)
    values(["program", *arguments])
    return config_from_flags(values)


def test_no_flags_are_the_defaults() -> None:
    assert parse() == Config()


def test_a_data_path_alone_means_your_own_files() -> None:
    assert parse("--data_path=one.csv").data.dataset == "event_log"
    values = flags.FlagValues()
    define_flags(values)
    values(["program", "--data_path=one.csv"])
    assert "--dataset=event_log\n" in to_flagfile(values)
    with pytest.raises(InputError, match="--data_path: --dataset=synthetic reads no files of yours"):
        parse("--data_path=one.csv", "--dataset=synthetic")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--epoch=2", "Unknown command line flag 'epoch'. Did you mean --epochs? See --help."),
        ("--zzz=2", "Unknown command line flag 'zzz'. See --help."),
        ("--epochs=ten", "--epochs: must be a whole number. Received: 'ten'. See --help."),
        ("--dropout=a: b", "--dropout: must be a number. Received: 'a: b'. See --help."),
        ("--xla=maybe", "--xla: must be true or false. Received: 'maybe'. See --help."),
        ("--split=all", "--split: must be one of leave_one_out, leave_two_out, temporal, users. Received: 'all'. See"),
        ("--epochs", "Missing value for flag --epochs. See --help."),
        ("--data_dir=s3://b/x", "--data_dir: must be a path of this machine. Received: 's3://b/x'"),
        (
            "--flagfile=/nowhere.flags",
            "--flagfile: must be a file that can be read. Received: '/nowhere.flags', No such file or directory.",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line(argument: str, expected: str) -> None:
    values = flags.FlagValues()
    define_flags(values)
    flags.DEFINE_string("flagfile", "", "A file.", flag_values=values)
    with pytest.raises(flags.Error) as error:
        values(["program", argument])
    assert problem_of(error.value, list(values)).startswith(expected)


def test_each_setting_has_a_flag_with_a_help_text() -> None:
    values = flags.FlagValues()
    define_flags(values)
    for _, part in Config().parts():
        for field in dataclasses.fields(part):
            if not field.name.endswith("_required"):
                assert len(values[field.name].help) > 20, field.name


def test_values_arrive_with_their_types() -> None:
    config = parse("--optimizer=sgd", "--embedding_dim=32,8", "--item_features=", "--dropout=0.5", "--presorted")
    assert config.optimizer.optimizer is OptimizerKind.SGD
    assert config.model.embedding_dim == (32, 8)
    assert config.data.item_features == ()
    assert config.data.item_features_required
    assert not config.data.label_column_required
    assert config.model.dropout == 0.5
    assert config.data.presorted


FEATURES = '[age]\nof = "user"\nkind = "category"\n[hour]\nof = "context"\nfrom = "timestamp"\nkind = "hour_of_day"\n'


def test_declared_features_are_kept_in_the_settings(tmp_path: Path) -> None:
    """A saved job must not depend on a file that may change, even while the job starts."""
    path = tmp_path / "features.toml"
    path.write_text(FEATURES)
    values = flags.FlagValues()
    define_flags(values)
    values(["program", f"--features={path}", "--timezone=Europe/Vienna", "--timestamp_unit=seconds"])
    config = config_from_flags(values)
    path.unlink()
    assert [spec.name for spec in config.data.feature_specs] == ["age", "hour"]
    assert config_from_flags(values) == config
    saved = to_flagfile(values)
    assert "--features" not in saved
    again = parse(*saved.splitlines())
    assert again.data == dataclasses.replace(config.data, features="")
    assert differences(config.to_json(), again.to_json()) == []
    assert differences(config.to_json(), Config().to_json()) == [
        f"--feature_declarations: {config.data.feature_declarations}, now ",
        "--timestamp_unit: seconds, now auto",
        "--timezone: Europe/Vienna, now UTC",
    ]


def test_item_features_are_a_shorthand() -> None:
    (spec,) = shorthand(Config().data.item_features)
    assert (spec.name, spec.owner, spec.kind, spec.column) == ("category_id", "item", "category", "category_id")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--items_path=items.csv"], "--items_path: belongs to --dataset=event_log. Received: "),
        (
            ["--dataset=event_log", "--data_path=x.csv", "--users_path=u.csv"],
            "--users_path: only declared features are",
        ),
        (["--offers_path=o.csv"], "--offers_path: belongs to --dataset=event_log. Received: "),
        (
            ["--dataset=event_log", "--data_path=x.csv", "--features=FILE", "--offers_path=o.csv"],
            "--offers_path: only features with by are read from it. Received: ",
        ),
        (
            ["--dataset=event_log", "--data_path=x.csv", "--features=OFFERS"],
            "--offers_path: features with by, such as price, are looked up in it. Received: ",
        ),
        (
            ["--timezone=Vienna"],
            "--timezone: must be the IANA name of a time zone. Received: 'Vienna'. For example Eur",
        ),
        (["--feature_declarations=[1]"], "--feature_declarations: must be features as a saved job keeps them."),
        (["--features=FILE", "--item_features=age"], "--item_features: names no feature that --features declares. Rec"),
        (["--features=FILE", "--feature_declarations=[]"], "--features: repeats --feature_declarations, which a saved"),
        (["--features=EMPTY"], "--features: must declare a feature. Received: "),
        (["--features=NONE"], "--features: must be a TOML file of at most 1 MiB. Received: "),
    ],
)
def test_mistakes_about_declared_features(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "FILE").write_text(FEATURES)
    (tmp_path / "OFFERS").write_text('[price]\nof = "candidate"\nkind = "number"\nby = ["store"]')
    (tmp_path / "EMPTY").write_text("")
    given = [text.replace("--features=", f"--features={tmp_path}/") for text in arguments]
    with pytest.raises(InputError) as error:
        parse(*given)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_the_features_beside_the_flagfiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found by their name alone, from any folder."""
    monkeypatch.chdir(tmp_path)
    assert len(parse("--features=complete_journey_features.toml").data.feature_specs) == 17
    assert len(parse(f"--flagfile={ROOT}/launch/flags/quick.flags").data.feature_specs) == 10
    (tmp_path / "quick_features.toml").write_text('[one]\nof = "user"\nkind = "category"')
    assert len(parse("--features=quick_features.toml").data.feature_specs) == 1


def test_our_flagfiles_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = f"{ROOT}/launch/flags/quick.flags"
    for given in ("--flagfile=quick", "-flagfile=quick.flags"):
        assert with_our_flagfiles(["x", given, "--epochs=2"])[1].partition("=")[2] == path
    assert with_our_flagfiles(["--flagfile", "quick", "quick"]) == ["--flagfile", path, "quick"]
    for given in ("--flagfile=other", "--flagfile=quick_features.toml", "--model=quick", f"--flagfile={path}"):
        assert with_our_flagfiles([given]) == [given]
    (tmp_path / "quick").touch()
    assert with_our_flagfiles(["--flagfile=quick"]) == ["--flagfile=quick"], "the user's own file comes first"


@pytest.mark.parametrize("path", FLAGFILES, ids=lambda path: path.stem)
def test_every_flagfile_parses_and_says_what_it_is(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(head)
    assert "launch/train.sh" in text
    for word in ("Needs:", "Takes:", "Reaches:"):
        assert word in text, word
    data = ["--data_path=log.parquet"] if "event_log" in path.read_text() else []
    assert parse(f"--flagfile={path}", *data) != Config()


def test_there_are_the_three_flagfiles() -> None:
    assert {"quick", "authors", "recommended"} <= {path.stem for path in FLAGFILES}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset=movies"], "--dataset: unknown data set. Received: 'movies'. Choose one of complete_journey"),
        (["--dataset=event_log"], "--data_path: --dataset=event_log needs your files. Received: ''"),
        (["--dataset=synthetic/big"], "--dataset: only amazon_reviews has configurations"),
        (["--embedding_dim=wide"], "--embedding_dim: must be one or more positive numbers. Received: 'wide'"),
        (["--hidden_units=80,0"], "--hidden_units: must be one or more positive numbers. Received: '80,0'"),
        (["--dropout=1"], "--dropout: must be below 1. Received: 1.0. For example 0."),
        (["--learning_rate=0"], "--learning_rate: must be above 0. Received: 0.0. For example 0.001."),
        (["--learning_rate_decay=2"], "--learning_rate_decay: must be at most 1. Received: 2.0. For example 0.1."),
        (["--learning_rate_decay_steps=0"], "--learning_rate_decay_steps: must be at least 1. Received: 0"),
        (["--warmup_steps=5"], r"--warmup_steps: belongs to the warmup_\* schedules. Received: 5"),
        (["--clip_norm=-1"], "--clip_norm: must be at least 0. Received: -1.0"),
        (["--global_batch_size=0"], "--global_batch_size: must be at least 1. Received: 0"),
        (["--max_history_length=0"], "--max_history_length: must be at least 1. Received: 0"),
        (["--metrics_port=70000"], "--metrics_port: must be a port, 0 or -1. Received: 70000"),
        (["--output_dir="], "--output_dir: must name a folder. Received: ''"),
        (["--early_stopping_patience=1"], "--early_stopping_patience: needs a validation split, which leave_one_out"),
        (["--validation_from=5"], "--validation_from: belongs to --split=temporal. Received: 5"),
        (
            ["--unknown_item_rate=0.2"],
            "--unknown_item_rate: belongs to --unknown_item=features. Received: 0.2. Add --un",
        ),
        (
            ["--unknown_item=features", "--unknown_item_rate=1"],
            "--unknown_item_rate: must be below 1. Received: 1.0. For example 0.1.",
        ),
        (["--seed=4294967296"], "--seed: must be at most 4294967295. Received: 4294967296. For example 1234."),
        (["--seed=-1"], "--seed: must be at least 0. Received: -1"),
        (["--synthetic_seed=-1"], "--synthetic_seed: must be at least 0. Received: -1"),
        (["--max_history_length=2147483648"], "--max_history_length: must be at most 2147483647. Received: 21474836"),
        (["--embedding_dim=8,99999999999"], "--embedding_dim: must be at most 2147483647. Received: 99999999999"),
        (["--split=temporal", "--test_from=9223372036854775808"], "--test_from: must be at most 9223372036854775807"),
        (["--learning_rate=inf"], "--learning_rate: must be finite. Received: inf. For example 0.001."),
        (["--l2=nan"], "--l2: must be finite. Received: nan"),
        (["--pushgateway=gateway:9091"], "--pushgateway: must be a URL. Received: 'gateway:9091'"),
        (
            ["--pushgateway=https://me:secret@host/x"],
            "--pushgateway: must be without user and password. Received: 'https://host/x'. Give them in --pushgat",
        ),
        (["--pushgateway_password_file=x"], "--pushgateway_password_file: belongs to --pushgateway. Received: 'x'"),
        (["--item_features=a,a"], "--item_features: each feature may be named once. Received: 'a,a'"),
        (["--item_features=item_id"], "--item_features: a column can have one role. Received: 'item_id'"),
    ],
)
def test_wrong_settings_get_one_clear_line(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        parse(*arguments)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def test_the_largest_numbers_are_taken() -> None:
    config = parse("--seed=4294967295", "--split=temporal", "--test_from=9223372036854775807", "--synthetic_seed=0")
    assert config.job.seed == 2**32 - 1 and config.data.test_from == 2**63 - 1


@pytest.mark.parametrize("given", [(), ("--item_features=a,b", "--label_column=clicked", "--resample_negatives")])
def test_the_flags_of_a_job_written_down_repeat_it(tmp_path: Path, given: tuple[str, ...]) -> None:
    values = flags.FlagValues()
    define_flags(values)
    values(["program", "--dataset=event_log", "--data_path=my log.csv", "--hidden_units=4,2", *given])
    (tmp_path / "flags.txt").write_text(to_flagfile(values))
    assert parse(f"--flagfile={tmp_path / 'flags.txt'}") == config_from_flags(values)


@pytest.mark.parametrize("dataset", ["complete_journey", "synthetic"])
def test_files_for_a_data_set_that_reads_none(dataset: str) -> None:
    with pytest.raises(InputError, match=rf"--data_path: --dataset={dataset} reads no files.*Add --dataset=event_log"):
        parse(f"--dataset={dataset}", "--data_path=clicks.csv")
