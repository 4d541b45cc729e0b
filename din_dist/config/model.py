"""Settings of the model."""

from __future__ import annotations

import dataclasses
import enum
from typing import ClassVar

from din_dist.config.settings import Settings, require, setting, text_setting


class ModelKind(enum.StrEnum):
    DIN = "din"
    MEAN_POOLING = "mean_pooling"


class Activation(enum.StrEnum):
    SIGMOID = "sigmoid"
    DICE = "dice"
    PRELU = "prelu"
    RELU = "relu"


class AttentionNormalization(enum.StrEnum):
    SOFTMAX = "softmax"
    NONE = "none"


class BatchNorm(enum.StrEnum):
    SYNCED = "synced"
    FROZEN = "frozen"


def _check_widths(name: str, value: tuple[int, ...]) -> None:
    require(
        len(value) > 0 and all(isinstance(width, int) and width > 0 for width in value),
        "must be one or more positive numbers",
        name,
        ",".join(map(str, value)),
        "For example 80,40.",
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig(Settings):
    """The architecture of the model."""

    THEME: ClassVar[str] = "model"

    model: ModelKind = setting(ModelKind.DIN, "din, or mean_pooling (the authors' base model: no attention).")
    embedding_dim: tuple[int, ...] = text_setting(
        (64,),
        "Width of the embeddings: one number for all, or the item's followed by each item feature's.",
        check=_check_widths,
    )
    attention_hidden_units: tuple[int, ...] = text_setting(
        (80, 40), "Widths of the hidden layers of the local activation unit.", check=_check_widths
    )
    hidden_units: tuple[int, ...] = text_setting(
        (80, 40), "Widths of the hidden layers of the head.", check=_check_widths
    )
    activation: Activation = setting(
        Activation.SIGMOID, "Activation of the hidden layers, in the head and in the local activation unit."
    )
    attention_normalization: AttentionNormalization = setting(
        AttentionNormalization.SOFTMAX, "softmax over the history (the authors' code) or none (the paper)."
    )
    batch_norm: BatchNorm = setting(
        BatchNorm.SYNCED,
        "synced: statistics of the whole global batch. frozen: statistics that are never updated, as in the authors' "
        "runs.",
    )
    dropout: float = setting(
        0.0, "Share of the head's hidden units that training drops, from 0 to below 1.", at_least=0, below=1
    )
