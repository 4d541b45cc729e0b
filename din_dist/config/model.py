"""Settings of the model."""

from __future__ import annotations

import dataclasses
import enum
from typing import ClassVar, Self

from din_dist.config.settings import Settings, require, setting, text_setting

_MOST_EXPERTS = 64


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


@dataclasses.dataclass(frozen=True)
class TaskHead:
    """How the head predicts several labels, as users write it.

    Attributes:
        kind: `SHARED`: a tower for each label on the head's inputs. `MMOE`: each tower sees its own mixture of experts
            (Ma et al. 2018, "Modeling Task Relationships in Multi-task Learning with Multi-gate
            Mixture-of-Experts"). `ESMM`: each label supposes the one before it, and its probability is the product of
            theirs (Ma et al. 2018, "Entire Space Multi-Task Model").
        experts: of `MMOE`.
    """

    SHARED: ClassVar[str] = "shared"
    MMOE: ClassVar[str] = "mmoe"
    ESMM: ClassVar[str] = "esmm"

    kind: str = SHARED
    experts: int = 0

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Reads shared, mmoe:EXPERTS or esmm.

        Raises:
            ValueError: it is none of these.
        """
        kind, colon, experts = text.partition(":")
        if kind not in (cls.SHARED, cls.MMOE, cls.ESMM) or bool(colon) != (kind == cls.MMOE):
            raise ValueError(text)
        found = cls(kind, int(experts) if colon else 0)
        if colon and not 2 <= found.experts <= _MOST_EXPERTS:
            raise ValueError(text)
        return found


def _check_task_head(name: str, value: str) -> None:
    try:
        TaskHead.from_text(value)
    except ValueError as error:
        rule = f"must be shared, esmm or mmoe:EXPERTS, with 2 to {_MOST_EXPERTS} experts"
        require(False, rule, name, value, "For example mmoe:4.")
        raise AssertionError from error


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
    task_head: str = text_setting(
        TaskHead.SHARED,
        "How several labels (--label_columns) are predicted. shared: a tower for each on the head's inputs. mmoe:4: "
        "each tower sees its own mixture of so many experts. esmm: each label supposes the one before it, as a "
        "purchase does a click; its probability is the product of theirs, and the loss is over all events.",
        check=_check_task_head,
        later=True,
    )

    share_attention: bool = text_setting(
        False,
        "One local activation unit for all of --histories. Default: each has its own.",
        later=True,
    )

    @property
    def heads(self) -> TaskHead:
        """How several labels are predicted."""
        return TaskHead.from_text(self.task_head)
