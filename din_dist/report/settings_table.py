"""Settings of a job in words: what was trained, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from din_dist.config import (
    AttentionKind,
    BatchNorm,
    Config,
    HistoryCut,
    ModelKind,
    OptimizerKind,
    Schedule,
    Softmax,
    Split,
)
from din_dist.report.job import JobRecord, number
from din_dist.schema import DatasetFacts

_MODEL_NAMES = {  # another model is called by its name in the flags
    ModelKind.DIN: "Deep Interest Network",
    ModelKind.MEAN_POOLING: "mean pooling of the history (no attention)",
    ModelKind.YOUTUBE_DNN: "YouTube DNN, which finds items",
    ModelKind.COMIREC_SA: "ComiRec with self-attention, which finds items",
    ModelKind.COMIREC_DR: "ComiRec with dynamic routing, which finds items",
    ModelKind.MIND: "MIND, which finds items",
    ModelKind.SR_GNN: "SR-GNN, which finds items",
}
_CUTS = {
    HistoryCut.RANDOM: "each epoch draws anew where history ends and target begins",
    HistoryCut.FIXED: "the later events of training, all with the history of the first 80 % of them",
}
_SPLITS = {
    Split.LEAVE_ONE_OUT: "each user's last event tests, the rest trains",
    Split.LEAVE_TWO_OUT: "each user's last event tests, the last but one validates",
    Split.TEMPORAL: "cut by time",
    Split.USERS: "8 of 10 users train, one validates, one tests by the last fifth of the events",
}


@dataclasses.dataclass(frozen=True)
class Data:
    """Facts about the data, and the number of examples in each split."""

    facts: DatasetFacts
    num_examples: Mapping[str, int]


def settings_of(record: JobRecord, config: Config | None, data: Data | None) -> list[tuple[str, list[tuple[str, str]]]]:
    """Returns headings, each with rows of a name and a value.

    Args:
        record: of the job.
        config: its settings; None: they are not known.
        data: its data; None: they are not known.
    """
    summary = record.summary or {}
    if config is None:
        return []
    kind, _, category = config.data.dataset.partition("/")
    rows = [("Data set", config.data.data_path if kind == "event_log" else " / ".join(filter(None, [kind, category])))]
    if data:
        facts = data.facts
        rows += [
            ("Holds", f"{facts.num_users:,} users, {facts.num_items:,} items, {facts.num_events:,} events"),
            ("Labels", "in the log" if facts.has_labels else "every event is a positive, negatives are drawn"),
            ("Examples", ", ".join(f"{count:,} {name}" for name, count in data.num_examples.items() if count)),
        ]
    rows.append(("Split", f"{config.data.split}: {_SPLITS[config.data.split]}"))
    ends = f", which end {data.facts.histories_end}" if data else ""
    behaviours = f"behaviours of {config.data.behaviours_path}" if config.data.behaviours_path else "events"
    rows.append(("History", f"{_lengths(config)} {behaviours}{ends}"))
    if cut := _CUTS.get(config.data.history_cut):
        rows.append(("Examples of a user", cut))
    if not data or not data.facts.has_labels:
        redrawn = ", redrawn each epoch" if config.data.resample_negatives else ""
        drawn = f"{config.data.negatives_per_positive} per positive{redrawn}; "
        held_out = config.data.evaluation_negatives_per_positive
        rows.append(("Negatives", f"{'' if config.model.model.retrieves else drawn}{held_out} in evaluation"))
    return [("Data", rows), ("Model", _model_rows(config, summary)), ("Training", _training_rows(record, config))]


def _lengths(config: Config) -> str:
    """Returns how long histories may be, in words."""
    named = []
    for history in config.data.named_histories:
        whose = f" of the candidate's {history.feature}" if history.feature else ""
        named.append(f"{history.name} up to {history.longest:,}{whose}")
    return ", ".join(named) or f"up to {config.data.max_history_length:,}"


def _model_rows(config: Config, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, is_din = config.model, config.model.model is ModelKind.DIN
    rows = [("Kind", _MODEL_NAMES.get(model.model, str(model.model)))]
    rows.append(("Embeddings", " + ".join(map(str, model.embedding_dim))))
    if is_din and model.attention is AttentionKind.DOT:
        rows.append(("Attention", "product of candidate and behaviour, softmax over the history"))
    elif is_din:
        units = "–".join(map(str, model.attention_hidden_units))
        softmax = "softmax over the history" if model.attention_normalization == "softmax" else "no normalisation"
        rows.append(("Attention", f"hidden units {units}, {softmax}"))
    if not model.model.retrieves and not model.interest_projection:
        rows.append(("Interest", "pooled history, without a projection"))
    if model.model.retrieves:
        against = f"{model.num_sampled:,} items, drawn {model.sampler}"
        rows.append(("Softmax", f"over {against if model.softmax is Softmax.SAMPLED else 'all items'}"))
        if model.example_age:
            rows.append(("Age of an example", "told to the tower in training, 0 otherwise"))
        if model.model.has_positions:
            rows.append(("Interests", f"{model.num_interests} of a user"))
    else:
        rows.append(("Head", f"hidden units {'–'.join(map(str, model.hidden_units))}, {model.activation}"))
        synced = model.batch_norm is BatchNorm.SYNCED
        rows.append(("Batch norm", "over the whole global batch" if synced else "frozen, as the authors' code ran"))
        rows.append(("Dropout", f"{model.dropout:g}"))
    parameters = number(dict(summary), "num_parameters")
    return [*rows, ("Parameters", f"{parameters:,.0f}")] if parameters else rows


def _training_rows(record: JobRecord, config: Config) -> list[tuple[str, str]]:
    optimizer, job = config.optimizer, config.job
    plain = optimizer.learning_rate_schedule is Schedule.CONSTANT
    schedule = (
        "constant" if plain else f"{optimizer.learning_rate_schedule}, {optimizer.warmup_steps:,} steps of warm-up"
    )
    if optimizer.learning_rate_schedule is Schedule.STEP:
        schedule = f"times {optimizer.learning_rate_decay:g} every {optimizer.learning_rate_decay_steps:,} steps"
    name = str(optimizer.optimizer)
    if optimizer.optimizer is OptimizerKind.ADAGRAD and optimizer.adagrad_row_wise:
        name += ", row-wise"
    rows = [("Optimizer", name), ("Learning rate", f"{optimizer.learning_rate:g}, {schedule}")]
    strengths = {
        "clip norm": optimizer.clip_norm,
        "L2": optimizer.l2,
        "embedding L2": optimizer.embedding_l2,
        "mini-batch aware L2": optimizer.mini_batch_aware_l2,
    }
    rows.append(("Regularisation", ", ".join(f"{k} {v:g}" for k, v in strengths.items() if v) or "none"))
    rows.append(("Global batch", f"{job.global_batch_size:,} examples"))
    epochs = number(record.summary or {}, "epochs")
    done = len(record.curve("epoch")) if epochs is None else int(epochs)
    limit = f", at most {job.max_steps:,} updates" if job.max_steps else ""
    rows.append(("Epochs", f"{done} of {job.epochs} complete{limit}"))
    rows.append(("Seed", str(job.seed)))
    versions = (record.summary or {}).get("versions")
    if isinstance(versions, dict):
        rows.append(("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return rows
