"""The library: models, layers and the optimizer for Keras. `import din_dist` has all these names."""

from din_dist.api import datasets
from din_dist.api.layers import KerasDice as Dice
from din_dist.api.layers import KerasLocalActivationUnit as LocalActivationUnit
from din_dist.api.model import load_model
from din_dist.api.optimizers import KerasLazyAdam as LazyAdam
from din_dist.api.ranking import KerasDIN as DIN
from din_dist.api.ranking import KerasMeanPooling as MeanPooling
from din_dist.api.retrieval import KerasComiRecDR as ComiRecDR
from din_dist.api.retrieval import KerasComiRecSA as ComiRecSA
from din_dist.api.retrieval import KerasMIND as MIND
from din_dist.api.retrieval import KerasSRGNN as SRGNN
from din_dist.api.retrieval import KerasYouTubeDNN as YouTubeDNN
from din_dist.api.training import TrainedJob as Result
from din_dist.api.training import settings, train
from din_dist.config import Config
from din_dist.errors import InputError

__all__ = [
    "DIN",
    "MIND",
    "SRGNN",
    "ComiRecDR",
    "ComiRecSA",
    "Config",
    "Dice",
    "InputError",
    "LazyAdam",
    "LocalActivationUnit",
    "MeanPooling",
    "Result",
    "YouTubeDNN",
    "datasets",
    "load_model",
    "settings",
    "train",
]
