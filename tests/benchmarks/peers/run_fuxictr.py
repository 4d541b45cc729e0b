"""Trains FuxiCTR's DIN, or its SIM, as its package installs them: `model_zoo.LongCTR`, with that folder's data loader.

It goes the way of LongCTR's `run_expid.py`: a feature map, three kinds of Parquet files, `RankDataLoader`, `model.fit`.
Its data are compact as ours are (a user's sequence once, an example as a place in it), and a batch is filled up, at the
front, to its own longest history.

That loader has one history an example. Of several ones the model is that of `fuxictr_histories`, and the loader is the
one that goes with it and that the wheel takes by default: arrays whose rows have all positions of all histories.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import stopwatch
from padding import padded_histories

FORM = "fuxictr"  # folder of its own form of the data, which is also its dataset_id
CANDIDATE = ("item_id", "cate_id")


def prepare(job: dict[str, Any]) -> None:
    source, folder = Path(job["data"]), Path(job["data"], FORM)
    shutil.rmtree(folder, ignore_errors=True)  # a job of another form may have been here
    folder.mkdir()
    features = _write_rows(job, source, folder) if _has_several(job) else _write_tables(source, folder)
    feature_map = {"dataset_id": FORM, "labels": ["label"], "features": features}
    (folder / "feature_map.json").write_text(json.dumps(feature_map))


def _has_several(job: dict[str, Any]) -> bool:
    """Several histories, none of which the model searches for itself."""
    return bool(job["histories"]) and not job["long_history"]


def _fields(job: dict[str, Any]) -> list[list[str]]:
    """The names of each history's sequences: item_id_0 and cate_id_0, and so on."""
    return [[f"{name}_{place}" for name in CANDIDATE] for place in range(len(job["histories"]))]


def _write_rows(job: dict[str, Any], source: Path, folder: Path) -> list[dict[str, Any]]:
    """Writes examples with all their positions, and gives the features."""
    category_of = np.load(source / "items.npz")["category_ids"]
    for split in ("train", "test"):
        columns = np.load(source / f"{split}.npz")
        candidates = columns["candidate_item_ids"]
        arrays = dict(zip(CANDIDATE, (candidates, category_of[candidates]), strict=True))
        for fields, history in zip(_fields(job), padded_histories(columns, job["histories"]), strict=True):
            arrays |= dict(zip(fields, (history, category_of[history]), strict=True))
        np.savez(folder / f"{split}.npz", allow_pickle=False, label=columns["labels"].astype(np.int32), **arrays)
    sizes = dict(zip(CANDIDATE, (len(category_of), int(category_of.max()) + 1), strict=True))
    specs = {name: {"padding_idx": 0, "vocab_size": size} for name, size in sizes.items()}
    features = [{name: {"type": "categorical", **own}} for name, own in specs.items()]
    for fields, width in zip(_fields(job), job["histories"], strict=True):
        for name, shared in zip(fields, CANDIDATE, strict=True):
            own = {"type": "sequence", "max_len": width, "share_embedding": shared}
            features.append({name: {**own, **specs[shared]}})
    return features


def _write_tables(source: Path, folder: Path) -> list[dict[str, Any]]:
    """Writes items, users and the examples as places in users' sequences, and gives the features."""
    import pandas as pd

    of_items = np.load(source / "items.npz")
    category_of = of_items["category_ids"]
    declared = json.loads((source / "features.json").read_text())
    users = np.load(source / "users.npz")
    items = np.arange(len(category_of))
    table = {"item_index": items, "item_id": items, "cate_id": category_of}
    table |= {feature["name"]: of_items[feature["name"]] for feature in declared if feature["owner"] == "item"}
    pd.DataFrame(table).to_parquet(folder / "items.parquet")
    sequences = np.split(users["item_ids"], users["offsets"][1:-1])
    pd.DataFrame({"user_index": np.arange(len(sequences)), "full_item_seq": sequences}).to_parquet(
        folder / "users.parquet"
    )
    for split in ("train", "test"):
        columns = np.load(source / f"{split}.npz")
        frame = {
            "user_index": columns["users"],
            "seq_len": columns["history_ends"],
            "item_index": columns["candidate_item_ids"],
            "label": columns["labels"].astype(np.int64),
        }
        frame |= {feature["name"]: columns[feature["name"]] for feature in declared if feature["owner"] != "item"}
        pd.DataFrame(frame).to_parquet(folder / f"{split}.parquet")
    features: list[dict[str, Any]] = [{name: {"type": "meta"}} for name in ("user_index", "seq_len", "item_index")]
    for name, size in (("item_id", len(category_of)), ("cate_id", int(category_of.max()) + 1)):
        features.append({name: {"source": "item", "type": "categorical", "padding_idx": 0, "vocab_size": size}})
    for feature in declared:
        specs = {"type": "categorical", "padding_idx": 0, "vocab_size": feature["rows"]}
        specs |= {"source": feature["owner"], "embedding_dim": feature["width"]}
        features.append({feature["name"]: specs})
    return features


def train(job: dict[str, Any], channel: Any) -> None:
    import torch
    from fuxictr.features import FeatureMap
    from fuxictr.pytorch.dataloaders import RankDataLoader
    from fuxictr.pytorch.torch_utils import seed_everything

    logging.disable()
    torch.set_num_threads(job["threads"])
    seed_everything(job["seed"])
    folder = Path(job["data"], FORM)
    model_class, params, ending = _model(job, folder)
    feature_map = FeatureMap(FORM, str(folder))
    feature_map.load(str(folder / "feature_map.json"), params)

    class Timed(model_class):
        def train_step(self, batch_data: Any) -> Any:
            loss = super().train_step(batch_data)
            watch.after_step(len(self.get_labels(batch_data)))
            return loss

    with tempfile.TemporaryDirectory() as checkpoints:
        model = Timed(feature_map, model_root=checkpoints, **params)
    batches, _ = RankDataLoader(feature_map, stage="train", train_data=str(folder / f"train{ending}"), **params)

    def scores() -> np.ndarray:
        test = RankDataLoader(feature_map, stage="test", test_data=str(folder / f"test{ending}"), **params)
        found = model.predict(test)
        model.train()
        return found

    watch = stopwatch.Stopwatch(job, channel, scores, "fuxictr,torch")
    with watch.running():
        model.fit(batches, epochs=10**6)


def _model(job: dict[str, Any], folder: Path) -> tuple[Any, dict[str, Any], str]:
    """The class of the model, the settings of it and of its data loader, and how the names of its examples end."""
    params = {
        "embedding_dim": job["embedding_dim"],
        "dnn_hidden_units": job["hidden_units"],
        "dnn_activations": "sigmoid",
        "attention_hidden_units": job["attention_hidden_units"],
        "attention_hidden_activations": "sigmoid",
        "din_use_softmax": True,
        "optimizer": "adam",
        "learning_rate": job["learning_rate"],
        "loss": "binary_crossentropy",
        "task": "binary_classification",
        "metrics": ["AUC"],
        "verbose": 0,
        "eval_steps": 2**60,  # the protocol has no validation events
        "batch_size": job["batch_size"],
        "num_workers": job["loader_workers"],
    }
    if _has_several(job):
        from fuxictr_histories import SeveralHistories

        return SeveralHistories, {**params, "candidate_fields": CANDIDATE, "history_fields": _fields(job)}, ".npz"
    from model_zoo.LongCTR.DIN import DIN
    from model_zoo.LongCTR.longctr_dataloader import LongCTRDataLoader
    from model_zoo.LongCTR.SIM import SIM

    params |= {
        "user_info": folder / "users.parquet",
        "item_info": folder / "items.parquet",
        "max_len": job["max_history_length"],
        "data_loader": LongCTRDataLoader,
    }
    if not job["long_history"]:
        return DIN, params, ".parquet"
    newest, searched = job["histories"]
    params |= {"short_seq_len": newest + 1}  # its slice of the newest ends before the candidate, which it counts
    return SIM, {**params, "topk": searched, "attention_dim": job["embedding_dim"]}, ".parquet"


if __name__ == "__main__":
    job, channel = stopwatch.start()
    if job["mode"] == "prepare":
        prepare(job)
    else:
        train(job, channel)
    stopwatch.leave()
