"""A job of a model that finds items, from end to end, and what such models refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from tests.support.commands import assert_one_line, command
from tests.support.commands import run as run_command
from tests.support.finished_job import finish, run
from tests.support.preloaded import Preloaded
from tests.support.served import serving
from tests.support.small_log import write_log


@pytest.fixture(scope="module")
def folder(commands: Preloaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished job of two interests."""
    folder = tmp_path_factory.mktemp("retrieval")
    write_log(folder / "log.parquet", num_users=150)
    words = ["--model=comirec_sa", "--num_interests=2", "--num_sampled=20", "--split=leave_two_out"]
    finish(commands, folder, *words, "--epochs=6", "--learning_rate=0.02", export=False)
    return folder


def test_it_learns_and_evaluate_ranks_all_items(folder: Path, commands: Preloaded) -> None:
    """A third of the log is random, and each category has six items, so no model finds more than one in five or so."""
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["test_gauc"] > 0.7
    done = commands.run("evaluate", f"--output_dir={folder / 'run'}", "--bootstrap_samples=200", "--noexclude_history")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["gauc"] == pytest.approx(summary["test_gauc"], abs=1e-6)
    retrieval = found["retrieval"]
    assert (retrieval["num_events"], retrieval["rank_against"]) == (found["num_examples"] // 2, "all")
    assert retrieval["metrics"]["recall@10"] > 1.3 * retrieval["floors"]["popularity"]["recall@10"]
    low, high = retrieval["intervals"]["recall@10"]
    assert low < retrieval["metrics"]["recall@10"] < high


@pytest.mark.parametrize("queries", ["events", "users"])
def test_lists_are_re_ranked_for_diversity(folder: Path, commands: Preloaded, queries: str) -> None:
    """A large weight gives each list of five all five categories; of 30 items, 4 * 8 are considered."""
    words = [f"--output_dir={folder / 'run'}", f"--queries={queries}", "--ks=1,5,8", "--noexclude_history"]
    found = []
    for weight in ([], ["--diversity_weight=0"], ["--diversity_weight=1000"]):
        done = commands.run("evaluate", *words, "--bootstrap_samples=20", *weight)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1])["retrieval"])
    for each in found:
        assert each["floors"] == found[0]["floors"]
        del each[f"{queries}_per_second"], each[f"seconds_for_all_{queries}"]
    assert found[0] == found[1]
    assert (found[2]["diversity_weight"], found[2]["diversity_of"]) == (1000, "category_id")
    without, _, all_differ = (each["metrics"] for each in found)
    assert without["diversity@5"] < all_differ["diversity@5"] == 1
    assert found[2]["intervals"]["diversity@5"] == [1, 1]
    assert all_differ["recall@5"] < without["recall@5"]
    assert all_differ["recall@1"] == pytest.approx(without["recall@1"])  # nothing stands above the first place
    assert "re-ranked so that items differ in category_id, by a weight of 1000; popularity is not" in done.stderr


def test_the_report_tells_what_it_is(folder: Path, commands: Preloaded) -> None:
    run(commands, "report", f"--output_dir={folder / 'run'}")
    page = (folder / "run" / "report.html").read_text()
    for words in ("ComiRec with self-attention, which finds items", "over 20 items, drawn log_uniform", "2 of a user"):
        assert words in page


@pytest.fixture(scope="module")
def unseen(commands: Preloaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that trains as ComiRec does, on users other than those of its tests."""
    folder = tmp_path_factory.mktemp("unseen")
    write_log(folder / "log.parquet", num_users=300)
    words = ["--model=youtube_dnn", "--split=users", "--history_cut=random", "--num_sampled=20", "--learning_rate=0.02"]
    words.append("--example_age")
    finish(commands, folder, *words, "--epochs=2", export=False)
    run(commands, "train", *command("train", folder, *words, "--epochs=4")[3:])
    return folder


def test_users_who_did_not_train_are_asked_once(unseen: Path, commands: Preloaded) -> None:
    words = [
        f"--output_dir={unseen / 'run'}",
        "--queries=users",
        "--ndcg_ideal=hits",
        "--ks=5,10",
        "--noexclude_history",
    ]
    done = commands.run("evaluate", *words)
    assert done.returncode == 0, done.stderr
    retrieval = json.loads(done.stdout.splitlines()[-1])["retrieval"]
    assert retrieval["queries"] == "users"
    for name in ("recall@5", "ndcg@5", "hit_rate@5"):
        assert retrieval["metrics"][name] > 1.2 * retrieval["floors"]["popularity"][name]


def test_its_export_asks_for_no_age(unseen: Path, commands: Preloaded) -> None:
    """Its signatures have no such input, and users are asked now, as the job itself asks them."""
    run(commands, "export", f"--output_dir={unseen / 'run'}", f"--export_dir={unseen / 'export'}")
    signatures = tf.saved_model.load(unseen / "export").signatures
    inputs = {name for signature in signatures.values() for name in signature.structured_input_signature[1]}
    assert "history_item_ids" in inputs
    assert not [name for name in inputs if "age" in name]
    found = []
    for name, folder in (("output_dir", "run"), ("export_dir", "export")):
        words = [f"--{name}={unseen / folder}", "--queries=users", "--bootstrap_samples=0", "--ks=5"]
        done = commands.run("evaluate", *words)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1])["retrieval"]["metrics"])
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_its_report_tells_how_examples_are_cut(unseen: Path, commands: Preloaded) -> None:
    run(commands, "report", f"--output_dir={unseen / 'run'}")
    page = (unseen / "run" / "report.html").read_text()
    assert "each epoch draws anew where history ends and target begins" in page
    assert "told to the tower in training, 0 otherwise" in page


def test_other_cuts_do_not_resume_a_job(unseen: Path) -> None:
    words = ["--model=youtube_dnn", "--split=users", "--num_sampled=20", "--learning_rate=0.02", "--epochs=5"]
    done = run_command("train", unseen, *words)
    assert_one_line(done, "--history_cut: random, now event; --example_age: True, now False")


def test_a_fixed_history_is_trained_on(commands: Preloaded, tmp_path: Path) -> None:
    """A fifth of the events are examples, and the job says so."""
    write_log(tmp_path / "log.parquet", num_users=100)
    words = ["--model=comirec_sa", "--split=leave_two_out", "--history_cut=fixed", "--num_sampled=20", "--epochs=1"]
    finish(commands, tmp_path, *words, export=False)
    done = commands.run("prepare_data", *command("train", tmp_path, *words)[3:])
    sizes = np.unique(pq.read_table(tmp_path / "log.parquet")["user_id"].to_pylist(), return_counts=True)[1]
    in_training = [size - 2 for size in sizes if size > 3]  # with the user's first event
    expected = sum(size - max(1, int(0.8 * size)) for size in in_training)
    assert f"examples (leave_two_out): train {expected:,}," in done.stdout


@pytest.fixture(scope="module")
def exports(folder: Path, commands: Preloaded) -> Path:
    """The folder of two exports: `found`, and `ranked`, of a DIN job on the same log with the other one inside."""
    run(commands, "export", f"--output_dir={folder / 'run'}", f"--export_dir={folder / 'found'}")
    din = command("train", folder, "--model=din", "--split=leave_two_out", "--epochs=2", "--learning_rate=0.02")[3:]
    run(commands, "train", *din, f"--output_dir={folder / 'din'}")
    ranked = [f"--output_dir={folder / 'din'}", f"--export_dir={folder / 'ranked'}"]
    run(commands, "export", *ranked, f"--retriever_export_dir={folder / 'found'}")
    return folder


def test_an_export_is_evaluated_as_its_job(exports: Path, commands: Preloaded) -> None:
    found = []
    for where in (f"--output_dir={exports / 'run'}", f"--export_dir={exports / 'found'}"):
        done = commands.run("evaluate", where, "--bootstrap_samples=0", "--noexclude_history")
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found[0]["gauc"] == found[1]["gauc"]
    for name, value in found[0]["retrieval"]["metrics"].items():
        assert found[1]["retrieval"]["metrics"][name] == pytest.approx(value, abs=1e-6)
    vectors = pq.read_table(exports / "found" / "items.parquet")
    assert vectors.column_names == ["item_id", "embedding"]
    assert vectors.num_rows == len({*vectors["item_id"].to_pylist()})


def test_both_stages_are_evaluated(exports: Path, commands: Preloaded) -> None:
    """With all items retrieved, what is found and ranked is what the model that ranks finds alone."""
    num_items = pq.read_table(exports / "found" / "items.parquet").num_rows
    words = [f"--export_dir={exports / 'ranked'}", "--bootstrap_samples=0", "--noexclude_history"]
    done = commands.run("evaluate", *words, f"--num_retrieved={num_items}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("recall@1", "recall@10", "ndcg@10", "mrr"):
        both = found["stages"]["found_and_ranked"]["metrics"][name]
        assert both == pytest.approx(found["retrieval"]["metrics"][name], abs=1e-6)
    done = commands.run("evaluate", *words, "--num_retrieved=5")
    assert_one_line(done, "--num_retrieved: must be at least the longest of --ks. Received: 5. Give 20 or more.")


def test_files_and_requests_get_the_same_items(exports: Path, commands: Preloaded, tmp_path: Path) -> None:
    histories = [["i1", "i2", "i7"], [], ["i9", "never seen"]]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"history": history}) + "\n" for history in histories))
    for name in ("found", "ranked"):
        words = [f"--export_dir={exports / name}", f"--input={rows}", f"--predictions_dir={tmp_path / name}"]
        run(commands, "recommend", *words, "--k=4", "--num_retrieved=9")
        (part,) = (tmp_path / name).glob("part-*")
        written = [json.loads(line) for line in part.read_text().splitlines()]
        with serving(commands, name, f"--export_dir={exports / name}") as served:
            asked = [{"history_item_ids": history, "k": 4, "num_retrieved": 9} for history in histories]
            answers = served.ask("recommend", {"instances": asked})["predictions"]
            for row, answer, history in zip(written, answers, histories, strict=True):
                assert row["recommended_items"] == answer["item_ids"]
                assert len(answer["item_ids"]) == 4
                assert not {*answer["item_ids"]} & {*history}
                assert row["logit"] == pytest.approx(answer["logits"], rel=1e-5, abs=1e-6)
                assert ("click_probability" in row) == ("click_probability" in answer) == (name == "ranked")
            wrong = served.refused({"instances": [{"history_item_ids": [], "k": 9, "num_retrieved": 4}]}, "recommend")
            assert "instances[0].num_retrieved must be an integer, from 9 to 10000. Received: 4." in wrong


def test_who_only_ranks_recommends_nothing(exports: Path, commands: Preloaded, tmp_path: Path) -> None:
    run(commands, "export", f"--output_dir={exports / 'din'}", f"--export_dir={tmp_path / 'din'}")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"history": ["i1"]}\n')
    words = [f"--export_dir={tmp_path / 'din'}", f"--input={rows}", f"--predictions_dir={tmp_path / 'out'}"]
    done = commands.run("recommend", *words)
    assert_one_line(
        done, "--export_dir: must be an export that finds items. Received: one that ranks given candidates."
    )
    found = f"--retriever_export_dir={exports / 'found'}"
    done = commands.run("export", f"--output_dir={exports / 'run'}", f"--export_dir={tmp_path / 'no'}", found)
    assert_one_line(done, "--retriever_export_dir: is for jobs of models that rank, and --model=comirec_sa finds items")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--negatives=batch"], "--negatives: is for models that rank, and comirec_sa finds. Received: 'batch'."),
        (["--histories=all:5"], "--histories: is for models that rank, and comirec_sa finds. Received: 'all:5'."),
        (["--max_history_length=200"], "--num_positions: must be at least --max_history_length=200. Received: 100."),
        (["--num_interests=65"], "--num_interests: must be at least 1 and at most 64. Received: 65."),
        (["--num_sampled=0"], "--num_sampled: must be at least 1. Received: 0."),
        (["--temperature=0"], "--temperature: must be above 0. Received: 0.0."),
        (["--example_age"], "--example_age: is for youtube_dnn. Received: '--model=comirec_sa'. Drop it, or use"),
        (["--model=din", "--history_cut=fixed"], "--history_cut: is for models that find items, and din ranks."),
        (
            ["--model=din", "--negatives_per_positive=0"],
            "--negatives_per_positive: a model that ranks needs",
        ),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, flags: list[str], message: str) -> None:
    assert_one_line(run_command("train", tmp_path, "--model=comirec_sa", *flags), message)


@pytest.mark.parametrize(("model", "owner"), [("comirec_sa", "user"), ("youtube_dnn", "candidate")])
def test_features_that_are_not_read_are_refused(tmp_path: Path, commands: Preloaded, model: str, owner: str) -> None:
    declared = tmp_path / "features.toml"
    declared.write_text(f'[spent]\nof = "{owner}"\nkind = "number"\n')
    write_log(tmp_path / "log.parquet", labels=True)
    _with_column(tmp_path / "log.parquet", "spent")
    flags = [f"--model={model}", f"--features={declared}", "--split=temporal"]
    run(
        commands,
        "prepare_data",
        "--dataset=event_log",
        f"--data_path={tmp_path / 'log.parquet'}",
        f"--data_dir={tmp_path / 'prepared'}",
        f"--features={declared}",
    )
    done = run_command("train", tmp_path, *flags)
    assert_one_line(done, f"--features: {model} reads features of item")
    assert f"'spent, of {owner}'" in done.stderr


def _with_column(path: Path, name: str) -> None:
    import pyarrow.compute as pc

    table = pq.read_table(path)
    users = pc.dictionary_encode(table["user_id"]).combine_chunks()
    pq.write_table(table.append_column(name, users.indices.cast("int64")), path)
