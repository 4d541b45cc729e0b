"""Trains FuxiCTR's DIN, or its SIM, as its package installs them: `model_zoo.LongCTR`, with that folder's data loader.

It goes the way of LongCTR's `run_expid.py`: a feature map, three kinds of Parquet files, `RankDataLoader`, `model.fit`.
Its data are compact as ours are (a user's sequence once, an example as a place in it), and a batch is filled up, at the
front, to its own longest history.
"""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import stopwatch

FORM = "fuxictr"  # folder of its own form of the data, which is also its dataset_id


def prepare(job: dict[str, Any]) -> None:
    import pandas as pd

    source, folder = Path(job["data"]), Path(job["data"], FORM)
    folder.mkdir(exist_ok=True)
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
    feature_map = {"dataset_id": FORM, "labels": ["label"], "features": features}
    (folder / "feature_map.json").write_text(json.dumps(feature_map))


def train(job: dict[str, Any], channel: Any) -> None:
    import torch
    from fuxictr.features import FeatureMap
    from fuxictr.pytorch.dataloaders import RankDataLoader
    from fuxictr.pytorch.torch_utils import seed_everything
    from model_zoo.LongCTR.DIN import DIN
    from model_zoo.LongCTR.longctr_dataloader import LongCTRDataLoader
    from model_zoo.LongCTR.SIM import SIM

    logging.disable()
    torch.set_num_threads(job["threads"])
    seed_everything(job["seed"])
    folder = Path(job["data"], FORM)
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
        "user_info": folder / "users.parquet",
        "item_info": folder / "items.parquet",
        "batch_size": job["batch_size"],
        "max_len": job["max_history_length"],
        "num_workers": job["loader_workers"],
        "data_loader": LongCTRDataLoader,
    }
    feature_map = FeatureMap(FORM, str(folder))
    feature_map.load(str(folder / "feature_map.json"), params)

    if job["long_history"]:  # its slice of the newest ends before the candidate, which it counts
        params |= {"short_seq_len": 21, "topk": 20, "attention_dim": job["embedding_dim"]}

    class Timed(SIM if job["long_history"] else DIN):
        def train_step(self, batch_data: Any) -> Any:
            loss = super().train_step(batch_data)
            watch.after_step(len(batch_data[2]))
            return loss

    with tempfile.TemporaryDirectory() as checkpoints:
        model = Timed(feature_map, model_root=checkpoints, **params)
    batches, _ = RankDataLoader(feature_map, stage="train", train_data=str(folder / "train.parquet"), **params)

    def scores() -> np.ndarray:
        test = RankDataLoader(feature_map, stage="test", test_data=str(folder / "test.parquet"), **params)
        found = model.predict(test)
        model.train()
        return found

    watch = stopwatch.Stopwatch(job, channel, scores, "fuxictr,torch")
    with watch.running():
        model.fit(batches, epochs=10**6)


if __name__ == "__main__":
    job, channel = stopwatch.start()
    if job["mode"] == "prepare":
        prepare(job)
    else:
        train(job, channel)
    stopwatch.leave()
