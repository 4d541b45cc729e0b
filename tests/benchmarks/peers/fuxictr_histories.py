"""FuxiCTR's DIN of several histories, put together from the layers that its wheel installs.

The DIN of its repository, `model_zoo/DIN`, has an attention unit for each pair of target and sequence fields. The wheel
leaves that folder out, so the same is built here. With equal weights both give equal numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from fuxictr.pytorch.layers import DIN_Attention, FeatureEmbeddingDict, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import nn


class SeveralHistories(BaseModel):
    """DIN whose head reads the candidate and the interest that each history's own attention unit finds.

    Two parameters are its own. `candidate_fields` names the candidate's features, and `history_fields` the sequences of
    each history, in the same order.
    """

    def __init__(self, feature_map: Any, **params: Any) -> None:
        super().__init__(feature_map, **params)
        self._candidate, self._histories = params["candidate_fields"], params["history_fields"]
        self.embedding_layer = FeatureEmbeddingDict(feature_map, params["embedding_dim"])
        self.attention_layers = nn.ModuleList(
            DIN_Attention(
                len(self._candidate) * params["embedding_dim"],
                attention_units=params["attention_hidden_units"],
                hidden_activations=params["attention_hidden_activations"],
                use_softmax=params["din_use_softmax"],
            )
            for _ in self._histories
        )
        self.dnn = MLP_Block(
            input_dim=feature_map.sum_emb_out_dim(),
            output_dim=1,
            hidden_units=params["dnn_hidden_units"],
            hidden_activations=params["dnn_activations"],
            output_activation=self.output_activation,
        )
        self.compile(params["optimizer"], params["loss"], params["learning_rate"])
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: Any) -> dict[str, torch.Tensor]:
        ids = self.get_inputs(inputs)
        vectors = self.embedding_layer(ids)
        candidate = torch.cat([vectors[field] for field in self._candidate], dim=-1)
        found = [candidate]
        for fields, attention in zip(self._histories, self.attention_layers, strict=True):
            behaviours = torch.cat([vectors[field] for field in fields], dim=-1)
            found.append(attention(candidate, behaviours, ids[fields[0]] != 0))
        return {"y_pred": self.dnn(torch.cat(found, dim=-1))}
