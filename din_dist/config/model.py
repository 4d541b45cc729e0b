"""Settings of the model."""

from __future__ import annotations

import dataclasses
import enum
from typing import ClassVar, Self

from din_dist.config.settings import Settings, require, setting, text_setting

_MOST_EXPERTS = _MOST_INTERESTS = 64
_RETRIEVAL = "models that find items"


class ModelKind(enum.StrEnum):
    DIN = "din"
    MEAN_POOLING = "mean_pooling"
    YOUTUBE_DNN = "youtube_dnn"
    COMIREC_SA = "comirec_sa"
    COMIREC_DR = "comirec_dr"
    MIND = "mind"
    SR_GNN = "sr_gnn"

    @property
    def retrieves(self) -> bool:
        """True for models that find items among all, by the product of a user's vectors and an item's."""
        return self not in (ModelKind.DIN, ModelKind.MEAN_POOLING)

    @property
    def has_positions(self) -> bool:
        """True for models that may have weights for each position of a history."""
        return self in (ModelKind.COMIREC_SA, ModelKind.COMIREC_DR, ModelKind.MIND)

    @property
    def reads_graphs(self) -> bool:
        """True for models that read the graph of each history, which the input pipeline then finds."""
        return self is ModelKind.SR_GNN


class Softmax(enum.StrEnum):
    SAMPLED = "sampled"
    FULL = "full"


class Sampler(enum.StrEnum):
    LOG_UNIFORM = "log_uniform"
    POPULARITY = "popularity"
    UNIFORM = "uniform"


class PositionVectors(enum.StrEnum):
    LEARNED = "learned"
    NONE = "none"


class InterestWeights(enum.StrEnum):
    SOFTMAX = "softmax"
    NONE = "none"


class Readout(enum.StrEnum):
    HARD = "hard"
    SOFT = "soft"


class EvaluateWith(enum.StrEnum):
    INTERESTS = "interests"
    READOUT = "readout"


class SessionReadout(enum.StrEnum):
    GATE = "gate"
    ATTENTION = "attention"
    MEAN_LAST = "mean_last"


class SessionQuery(enum.StrEnum):
    LAST = "last"
    MEAN = "mean"


class Activation(enum.StrEnum):
    SIGMOID = "sigmoid"
    DICE = "dice"
    PRELU = "prelu"
    RELU = "relu"


class AttentionKind(enum.StrEnum):
    MLP = "mlp"
    DOT = "dot"


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


def _check_count(name: str, value: int) -> None:
    require(value >= 1, "must be at least 1", name, value, "For example 100.")


def _check_interests(name: str, value: int) -> None:
    rule, remedy = f"must be at least 1 and at most {_MOST_INTERESTS}", "For example 4."
    require(1 <= value <= _MOST_INTERESTS, rule, name, value, remedy)


def _check_temperature(name: str, value: float) -> None:
    require(value > 0, "must be above 0", name, value, "For example 1 or 0.05.")


def _check_tower(name: str, value: tuple[int, ...]) -> None:
    if value:
        _check_widths(name, value)


@dataclasses.dataclass(frozen=True)
class ModelConfig(Settings):
    """The architecture of the model."""

    THEME: ClassVar[str] = "model"

    model: ModelKind = setting(
        ModelKind.DIN,
        "din, or mean_pooling (the authors' base model: no attention). Models that find items among all: youtube_dnn, "
        "comirec_sa, comirec_dr, mind, sr_gnn.",
    )
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

    interest_projection: bool = text_setting(
        True,
        "A Dense layer between the pooled history and the head, as in the authors' code. Without it the head sees the "
        "pooled history itself.",
        later=True,
    )

    attention: AttentionKind = text_setting(
        AttentionKind.MLP,
        "mlp: the local activation unit, a network that scores each pair of candidate and behaviour. dot: their "
        "product, normalized by softmax, as keras.layers.Attention does; it has no weights.",
        later=True,
    )

    tower_units: tuple[int, ...] = text_setting(
        (128,),
        "youtube_dnn: widths of the hidden layers (ReLU) between the mean of the history and the user's vector. Empty "
        "for one linear layer.",
        check=_check_tower,
        theme=_RETRIEVAL,
        later=True,
    )
    example_age: bool = text_setting(
        False,
        "youtube_dnn: training tells the tower how long before the newest event of training the example happened. "
        "Users are asked at age 0, so what was popular of late counts more.",
        theme=_RETRIEVAL,
        later=True,
    )
    num_interests: int = text_setting(
        4,
        "comirec_sa, comirec_dr, mind: vectors of a user. An item's score is the largest over them.",
        check=_check_interests,
        theme=_RETRIEVAL,
        later=True,
    )
    positions: PositionVectors = text_setting(
        PositionVectors.LEARNED,
        "comirec_sa: learned adds a vector of each position to what the attention sees, none does not.",
        theme=_RETRIEVAL,
        later=True,
    )
    num_positions: int = text_setting(
        100,
        "Positions of a history that have weights of their own, counted from the oldest: at least "
        "--max_history_length.",
        check=_check_count,
        theme=_RETRIEVAL,
        later=True,
    )
    interest_weights: InterestWeights = text_setting(
        InterestWeights.SOFTMAX,
        "comirec_sa: how attention scores become weights. softmax over the history, or none: they are the weights.",
        theme=_RETRIEVAL,
        later=True,
    )
    readout: Readout = text_setting(
        Readout.HARD,
        "How training makes one vector of a user's interests. hard: the one with the largest product with the target. "
        "soft: their mean, weighted by the softmax of these products.",
        theme=_RETRIEVAL,
        later=True,
    )
    evaluate_with: EvaluateWith = text_setting(
        EvaluateWith.INTERESTS,
        "interests: an item's score is the largest over the user's vectors. readout: the user has one vector, by "
        "--readout with the newest item of the history in the place of the target.",
        theme=_RETRIEVAL,
        later=True,
    )
    session_readout: SessionReadout = text_setting(
        SessionReadout.GATE,
        "sr_gnn: how the items of a session become one vector. gate: as published. attention: dot-product attention. "
        "mean_last: their mean and the last.",
        theme=_RETRIEVAL,
        later=True,
    )
    session_query: SessionQuery = text_setting(
        SessionQuery.LAST,
        "sr_gnn: the query of gate and attention: the last item, or the mean of all.",
        theme=_RETRIEVAL,
        later=True,
    )
    normalize_vectors: bool = text_setting(
        False,
        "Divide the vectors of users and items by their length, so that products are cosines. Give a --temperature "
        "below 1 with it, for example 0.05.",
        theme=_RETRIEVAL,
        later=True,
    )
    temperature: float = text_setting(
        1.0,
        "Products of users and items are divided by it.",
        check=_check_temperature,
        theme=_RETRIEVAL,
        later=True,
    )
    softmax: Softmax = text_setting(
        Softmax.SAMPLED,
        "The loss of models that find items. sampled: the target against --num_sampled items that are drawn for each "
        "update. full: against all items, for small catalogues.",
        theme=_RETRIEVAL,
        later=True,
    )
    num_sampled: int = text_setting(
        1024,
        "Items that sampled softmax draws for each update, the same for all workers. They may repeat; the loss is "
        "corrected for it.",
        check=_check_count,
        theme=_RETRIEVAL,
        later=True,
    )
    sampler: Sampler = text_setting(
        Sampler.LOG_UNIFORM,
        "How they are drawn. log_uniform: by the rank of the item's frequency in training, as by Zipf's law. "
        "popularity: by that frequency. uniform: all alike.",
        theme=_RETRIEVAL,
        later=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = self.attention_normalization is AttentionNormalization.SOFTMAX
        rule, remedy = "must be softmax with --attention=dot", "Drop it, or use --attention=mlp."
        fits = plain or self.attention is AttentionKind.MLP
        require(fits, rule, "attention_normalization", str(self.attention_normalization), remedy)
        rule, remedy = "is for youtube_dnn", f"Drop it, or use --model={ModelKind.YOUTUBE_DNN}."
        fits = not self.example_age or self.model is ModelKind.YOUTUBE_DNN
        require(fits, rule, "example_age", f"--model={self.model}", remedy)

    @property
    def heads(self) -> TaskHead:
        """How several labels are predicted."""
        return TaskHead.from_text(self.task_head)
