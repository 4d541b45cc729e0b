"""Opens a saved training job: its settings, its data and the model with its best weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from din_dist.cli import entry
from din_dist.cli import flags as settings
from din_dist.config import Config
from din_dist.errors import InputError
from din_dist.files import read_record

if TYPE_CHECKING:
    from din_dist.data.event_store import EventStore
    from din_dist.models.behaviour_model import BehaviourModel

WHERE_DATA_LIES = ("data_path", "items_path", "users_path", "offers_path", "behaviours_path", "data_dir")


def config_of(folder: Path) -> Config:
    """Reads the settings of the job whose `--output_dir` now lies in `folder`, wherever it lay before.

    Raises:
        InputError: the settings are missing, or not of this version.
    """
    path = folder / "flags.txt"
    if not path.is_file():
        raise InputError(
            f"{path}: holds the settings of a training job. Received: no such file. Give the --output_dir that the "
            "job was given."
        )
    config = config_from_text(read_record(path, errors="replace"), path)
    return config.replace(output_dir=str(folder))


def config_from_text(text: str, path: Path) -> Config:
    """Parses the settings in a flagfile's text.

    Args:
        text: the flagfile's text.
        path: where the text was found, for error messages.

    Raises:
        InputError: the settings are not of this version.
    """
    values = flags.FlagValues()
    settings.define_flags(values)
    try:
        rest = values(["trained", *text.splitlines()], known_only=True)[1:]
    except flags.Error as error:
        raise InputError(
            f"{path}: must be settings of this version. Received: {error}. Use the version that trained it, or train "
            "again."
        ) from error
    if rest:
        entry.say(f"{path}: settings that this version does not know are left aside: {' '.join(rest)}")
    return settings.config_from_flags(values)


def trained_model(config: Config, store: EventStore, step: int | None = None) -> tuple[BehaviourModel, int]:
    """Returns the model with its weights after update `step`, and that update.

    Args:
        config: the job's settings.
        store: the job's prepared data.
        step: the checkpoint; None: the best by validation, or the newest where there is no validation.

    Raises:
        InputError: there is no such checkpoint, or it does not fit the settings.
    """
    from din_dist.distributed.runtime import Runtime
    from din_dist.training.checkpoint import CheckpointStore, checkpoints_dir

    if step is not None:
        require_checkpoint(step, checkpoints_dir(config))
    model = _model_of(config, store)
    variables = {weight.path: weight.value for weight in model.weights}
    checkpoints = CheckpointStore(config, store.facts.fingerprint, Runtime())
    for attempts_left in (1, 0):
        try:
            state = checkpoints.restore(variables, step)
            for problem in checkpoints.damaged:
                entry.say(f"passed over: {problem}")
            if state is None:
                raise InputError(
                    f"{config.job.output_dir}: what the model has learned is read from a checkpoint. "
                    "Received: none yet. One is written at the end of each epoch, or by --checkpoint_every_steps."
                )
            if step is None and state.best_step not in (0, state.step):
                checkpoints.restore(variables, state.best_step)
                return model, state.best_step
            return model, state.step
        except InputError:
            if not attempts_left:  # a running job may have replaced the checkpoint meanwhile
                raise
    raise AssertionError


def model_on_other_data(config: Config, store: EventStore) -> tuple[BehaviourModel, int, str]:
    """Returns the model of a job on data that it was not trained on, the update of its weights, and a line about them.

    Rows of embeddings are found by the log's own ids, as in a warm start.

    Args:
        config: the job's settings, with the other data.
        store: the other prepared data.

    Raises:
        InputError: the job cannot be read, or the data does not fit it.
    """
    from din_dist.training.warm_start import ParentJob, take_weights

    parent, model = ParentJob(Path(config.job.output_dir)), _model_of(config, store)
    line = take_weights(parent, config, model, store)
    return model, parent.step, line


def _model_of(config: Config, store: EventStore) -> BehaviourModel:
    """Returns the model that a job's settings make of prepared data, before it has learned anything."""
    from din_dist.assembly import make_model
    from din_dist.data.splits import split_examples
    from din_dist.data.trained_items import row_of_item, trained_items

    trained = trained_items(store, config.data, split_examples(store, config.data))
    return make_model(
        config.model,
        store.facts,
        store.item_features,
        seed=config.job.seed,
        row_of_item=row_of_item(store.facts, trained),
        features=store.features,
    )


def require_checkpoint(step: int, folder: Path) -> None:
    """Checks that the folder of a job's checkpoints has one of update `step`.

    Raises:
        InputError: there is no such checkpoint.
    """
    from din_dist.training.checkpoint import published_steps

    steps = published_steps(folder)
    if step not in steps:
        raise InputError(
            f"--checkpoint_step: must be one whose checkpoint was kept. Received: {step}. "
            f"Choose among {', '.join(map(str, steps)) or f'none: {folder} has no checkpoint'}."
        )
