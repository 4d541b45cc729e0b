"""How long the ids of an export take to load and to look up: `python -m tests.benchmarks.vocabulary [--ids=1000000]`.

Prints a line for each kind of vocabulary: strings, strings of which one must be escaped (then all are), integers.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import tensorflow as tf

from din_dist.serving.export.vocabulary import IdTable

LOOKED_UP = 100_000  # ids at once


def seconds(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def measure(name: str, ids: pa.Array) -> None:
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ids.txt"
        made: list[IdTable] = []
        made_in = seconds(lambda: made.append(IdTable(pa.chunked_array([ids]), path)))
        (vocabulary,) = made
        root = tf.Module()
        root.vocabulary = vocabulary
        function = tf.function(vocabulary.dense_ids, input_signature=[tf.TensorSpec([None], vocabulary.dtype)])
        model = Path(folder) / "model"
        tf.saved_model.save(root, str(model), signatures={"dense_ids": function})
        loaded: list = []
        loaded_in = seconds(lambda: loaded.append(tf.saved_model.load(str(model))))
        look_up = loaded[0].signatures["dense_ids"]
        (argument,) = look_up.structured_input_signature[1]
        places = random.integers(len(ids), size=LOOKED_UP)
        wanted = tf.constant(ids.take(pa.array(places)).to_numpy(zero_copy_only=False), vocabulary.dtype)
        (found,) = look_up(**{argument: wanted}).values()
        np.testing.assert_array_equal(found, places + 1)
        took = statistics.median(seconds(lambda: look_up(**{argument: wanted})) for _ in range(21))
        graph_bytes = (model / "saved_model.pb").stat().st_size
        print(
            f"{name}: {len(ids):,} ids, {path.stat().st_size / 1e6:.1f} MB of text, {graph_bytes / 1e3:.0f} kB of graph"
            f"; made in {made_in:.2f} s, loaded in {loaded_in:.2f} s; {LOOKED_UP / took / 1e6:.1f} million look-ups/s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ids", type=int, default=1_000_000)
    num_ids = parser.parse_args().ids
    numbers = np.random.default_rng(1).permutation(10 * num_ids)[:num_ids]
    words = [f"B{number:09d}" for number in numbers]
    measure("strings", pa.array(words))
    measure("strings with an escape", pa.array(["line\nbreak", *words[1:]]))
    measure("integers", pa.array(numbers))


if __name__ == "__main__":
    main()
