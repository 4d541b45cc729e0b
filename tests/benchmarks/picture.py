"""Draws the README's picture: `PYTHONPATH=. .venv/bin/python -m tests.benchmarks.picture OUT.svg [--job=DIR]`.

It shows one real shopper's purchases as a trained model weighs them for two candidate items: one that the shopper
bought next, and one that was drawn among the items that the shopper never bought. Of every third shopper it takes the
one whose two candidates differ most in where the attention goes.

Without `--job` it trains the model first, on The Complete Journey, for one epoch (about a minute on two cores). With
`--job` it reads the `--output_dir` of a finished job instead, on a log without labels.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from din_dist.cli import entry
from din_dist.cli.saved_job import config_of, trained_model
from din_dist.data.prepared import open_prepared
from din_dist.data.splits import split_examples
from din_dist.data.thinning import thin_out
from din_dist.report import attention
from din_dist.report.attention import ShownExample
from tests.support.repository import ROOT

NUM_BEHAVIOURS = 12
NUM_EXAMPLES = 20_000  # among which to look
TEXT = "#767676"  # readable on white and on dark pages
BOUGHT, DRAWN = "#2f81f7", "#d97706"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("picture", type=Path, help="Where the SVG goes.")
    parser.add_argument("--job", type=Path, help="The --output_dir of a finished job. Default: train one.")
    given = parser.parse_args(arguments)
    entry.import_tensorflow()
    if given.job:
        draw(*find(given.job), given.picture)
        return
    with tempfile.TemporaryDirectory() as temporary:
        train(Path(temporary))
        draw(*find(Path(temporary, "job")), given.picture)


def train(folder: Path) -> None:
    """Prepares the data in `folder` and trains the job `folder/job`."""
    flags = [
        f"--flagfile={ROOT / 'launch/flags/quick.flags'}",
        f"--data_dir={folder / 'prepared'}",
        f"--output_dir={folder / 'job'}",
        "--features=",  # the picture shows items and their categories
        f"--max_history_length={NUM_BEHAVIOURS}",
        "--evaluation_negatives_per_positive=20",
        "--metrics_port=-1",
    ]
    for command in ("prepare_data", "train"):
        subprocess.run(
            [sys.executable, "-m", f"din_dist.cli.{command}", *flags], cwd=ROOT, stdout=subprocess.DEVNULL, check=True
        )


def find(job: Path) -> tuple[ShownExample, ShownExample]:
    """The test example and the drawn negative beside it between which the attention moves most."""
    config = config_of(job)
    store = open_prepared(config.data)
    examples = thin_out(split_examples(store, config.data)["test"], NUM_EXAMPLES)
    if examples.draws_per_row < 2:
        raise SystemExit(f"{job}: must be trained on a log without labels, whose negatives are drawn.")
    model, _ = trained_model(config, store)
    shown = attention.show(model, config, store, examples, {"": range(examples.num_examples)})
    longest = max(len(example.behaviours) for example in shown)
    pairs = [
        (positive, negative)
        for positive, *negatives in zip(*[iter(shown)] * examples.draws_per_row, strict=True)
        for negative in negatives
        if len(positive.behaviours) == longest
    ]
    return max(pairs, key=lambda pair: np.abs(_weights(pair[0]) - _weights(pair[1])).sum())


def draw(bought: ShownExample, drawn: ShownExample, path: Path) -> None:
    """Writes the SVG: the weights of the same behaviours for either candidate, the newest behaviour at the top."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    style = {
        "svg.fonttype": "none",  # text stays text: small, and readable by screen readers
        "svg.hashsalt": "din_dist",
        "font.family": "sans-serif",
        "text.color": TEXT,
        "axes.labelcolor": TEXT,
        "xtick.color": TEXT,
        "ytick.color": TEXT,
    }
    names = [_name(behaviour.category or behaviour.item) for behaviour in bought.behaviours]
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 2, figsize=(8.4, 4.2), sharex=True, sharey=True, layout="constrained")
        for panel, example, color in zip(axes, (bought, drawn), (BOUGHT, DRAWN), strict=True):
            weights = _weights(example)
            bars = panel.barh(range(len(weights)), weights, color=color, height=0.7)
            panel.bar_label(bars, [f"{weight:.2f}" for weight in weights], padding=3, fontsize=8)
            panel.set_yticks(range(len(names)), names)
            panel.tick_params(length=0)
            panel.set_xticks([])
            panel.spines[:].set_visible(False)
            panel.margins(x=0.15)
            panel.set_title(
                f"candidate: {_name(example.category or example.item)}\nclick probability {example.probability:.2f}",
                color=color,
                loc="left",
                fontsize=11,
            )
        axes[0].invert_yaxis()
        figure.supylabel("the shopper's last purchases, newest first", fontsize=9, color=TEXT)
        figure.supxlabel("attention weight of each purchase; the weights of a candidate add up to 1", fontsize=9)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    text = path.read_text()
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")


def _weights(example: ShownExample) -> np.ndarray:
    return np.array([behaviour.weight for behaviour in example.behaviours])


def _name(text: str) -> str:
    return text.capitalize() if text.isupper() else text


if __name__ == "__main__":
    main(sys.argv[1:])
