"""Trains RecBole's SASRec as RecBole does: its own data files, split (leave one out), loader, trainer and sizes.

A user's events are numbered in our order, which RecBole sorts by, so its training examples are ours.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import stopwatch
import vectors

FORM = "recbole"  # folder of its own form of the data, which is also the data set's name


def prepare(job: dict[str, Any]) -> None:
    folder = Path(job["data"], FORM)
    folder.mkdir(exist_ok=True)
    found = np.load(Path(job["data"], "users.npz"))
    counts = np.diff(found["offsets"])
    users = np.repeat(np.arange(len(counts)), counts)
    order = np.arange(len(users)) - np.repeat(found["offsets"][:-1], counts)
    with (folder / f"{FORM}.inter").open("w") as output:
        output.write("user_id:token\titem_id:token\ttimestamp:float\n")
        output.writelines(
            f"{user}\t{item}\t{at}\n" for user, item, at in zip(users, found["item_ids"], order, strict=True)
        )


def train(job: dict[str, Any], channel: Any) -> None:
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import SASRec
    from recbole.trainer import Trainer
    from recbole.utils import init_seed

    logging.disable()
    torch.set_num_threads(job["threads"])
    settings = {
        "data_path": job["data"],
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
        "train_neg_sample_args": None,  # its loss is over all items
        "train_batch_size": job["batch_size"],
        "learning_rate": job["learning_rate"],
        "MAX_ITEM_LIST_LENGTH": job["max_history_length"],
        "hidden_size": job["embedding_dim"],
        "epochs": 10**6,
        "seed": job["seed"],
        "use_gpu": False,
        "show_progress": False,
    }
    config = Config(model="SASRec", dataset=FORM, config_dict=settings)
    init_seed(job["seed"], reproducibility=True)
    dataset = create_dataset(config)
    batches, _, _ = data_preparation(config, dataset)

    class Counted(SASRec):
        def calculate_loss(self, interaction: Any) -> Any:
            self.num_examples = len(interaction)
            return super().calculate_loss(interaction)

    model = Counted(config, batches.dataset)
    trainer = Trainer(config, model)
    num_items = len(np.load(Path(job["data"], "items.npz"))["counts"]) - 1
    number_of = np.zeros(num_items + 1, np.int64)  # 0 is padding in theirs too
    number_of[1:] = dataset.token2id(dataset.iid_field, [str(item) for item in range(1, num_items + 1)])
    _, lengths, histories = vectors.examples(job, "asked")

    def found() -> tuple[np.ndarray, np.ndarray]:
        model.eval()
        users = []
        with torch.no_grad():
            for part in vectors.parts(len(lengths), job["batch_size"]):
                given = torch.from_numpy(number_of[histories[part]]), torch.from_numpy(lengths[part].astype(np.int64))
                users.append(model(*given).numpy())
        model.train()
        return np.concatenate(users), model.item_embedding.weight.detach().numpy()[number_of]

    watch = vectors.VectorStopwatch(job, channel, found, "recbole,torch")
    trainer.optimizer.register_step_post_hook(lambda *given: watch.after_step(model.num_examples))
    with watch.running():
        trainer.fit(batches, saved=False, verbose=False)


if __name__ == "__main__":
    job, channel = stopwatch.start()
    sys.argv[1:] = []  # which RecBole reads too
    if job["mode"] == "prepare":
        prepare(job)
    else:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # RecBole writes logs where it runs
            train(job, channel)
    stopwatch.leave()
