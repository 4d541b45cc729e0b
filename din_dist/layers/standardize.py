"""Batch statistics that many workers share, and BatchNormalization upon them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from din_dist.execution import INFERENCE, Mode
from din_dist.kernels import operations

# (x [M, W], standardised x [M, W], *parameters [W]) -> [M, W], element by element.
ElementWise = Callable[..., tf.Tensor]


@keras.saving.register_keras_serializable("din_dist")
class Standardize(keras.layers.Layer):
    """`(x - mean) / sqrt(variance + epsilon)` for each of the W columns of `[M, W]`, and a function of it.

    In training the statistics are those of the global batch: `Mode.sum_over_ranks` sums them over the ranks. In
    inference, and always if frozen, they are the moving averages. Frozen ones stay at mean 0 and variance 1. So the
    authors' TensorFlow 1 code ran, because it never executed the updates of its averages.

    The gradient is written out, not traced through the statistics: one message to the other ranks forward and one
    backward, and no array of the size of `x` in between.

    Args:
        frozen: the moving averages are used in training too, and stay as they are.
        momentum: share of the moving averages that an update keeps.
        epsilon: added to the variance.
    """

    def __init__(self, frozen: bool = False, momentum: float = 0.99, epsilon: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.frozen, self.momentum, self.epsilon = frozen, momentum, epsilon

    def build(self, input_shape: tuple) -> None:
        width = input_shape[-1]
        self.moving_mean = self.add_weight(shape=(width,), initializer="zeros", trainable=False, name="moving_mean")
        self.moving_variance = self.add_weight(
            shape=(width,), initializer="ones", trainable=False, name="moving_variance"
        )

    def call(self, inputs: tf.Tensor, mode: Mode = INFERENCE) -> tf.Tensor:
        return self.then(_itself, inputs, mode=mode)

    def then(
        self,
        function: ElementWise,
        inputs: tf.Tensor,
        parameters: Sequence[tf.Tensor] = (),
        num_rows: tf.Tensor | None = None,
        mode: Mode = INFERENCE,
    ) -> tf.Tensor:
        """Returns `function(inputs, standardised inputs, *parameters)`, in one pass over `inputs`.

        Args:
            function: must be the same object at every call.
            inputs: float32 `[M, W]`.
            parameters: float32 `[W]` each.
            num_rows: int32, how many of the M rows count, the first ones; the rest is padding. None: all.
            mode: of the pass.
        """
        parameters = [tf.convert_to_tensor(parameter) for parameter in parameters]
        apply = mode.fused(_apply)
        if not mode.training or self.frozen:
            return apply(function, inputs, *self.moving_statistics, *parameters)
        sums = mode.fused(_sums_about)(tf.stop_gradient(inputs), self.moving_mean.value, num_rows)
        mean, scale, count = self.statistics_of(sums, mode)

        @tf.custom_gradient
        def differentiable(inputs: tf.Tensor, *parameters: tf.Tensor) -> Any:
            known = (inputs, mean, scale)

            def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
                sums, *of_parameters = mode.fused(_gradient_sums)(function, upstream, *known, *parameters)
                sums.set_shape([2 * inputs.shape[-1]])  # a graph may have lost it, and messages need it
                sums = mode.sum_over_ranks(sums)
                of_inputs = mode.fused(_gradient_of_inputs)(
                    function, upstream, *known, sums, count, num_rows, *parameters
                )
                return [of_inputs, *of_parameters]

            return apply(function, *known, *parameters), gradient

        found = differentiable(inputs, *parameters)
        found.set_shape(inputs.shape)  # a custom gradient forgets it in a graph
        return found

    @property
    def moving_statistics(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Mean and scale, float32 `[W]`, in inference or if frozen."""
        return self.moving_mean.value, tf.math.rsqrt(self.moving_variance.value + self.epsilon)

    def statistics_of(self, sums: tf.Tensor, mode: Mode) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Updates the moving averages. Returns mean `[W]`, scale `[W]` and number of rows `[1]` of the global batch.

        The number of rows is at least 1.

        Args:
            sums: float32 `[2W + 1]`, over this rank's rows: of x - `moving_mean`, of its square, and of 1. The moving
                mean is equal on all ranks and near the true mean. Far from it E[x^2] - E[x]^2 would lose digits.
            mode: of the pass.
        """
        width = self.moving_mean.shape[0]
        sums.set_shape([2 * width + 1])
        sums = mode.sum_over_ranks(sums)  # one message a layer
        averages = self.moving_mean.value, self.moving_variance.value
        find = operations.statistics if mode.kernels else mode.fused(_statistics)
        mean, scale, count, *new_averages = find(sums, *averages, tf.constant([self.momentum, self.epsilon]))
        for average, value in zip((self.moving_mean, self.moving_variance), new_averages, strict=True):
            value.set_shape(average.shape)
            average.assign(value)
        return mean, scale, count

    def get_config(self) -> dict:
        own = {"frozen": self.frozen, "momentum": self.momentum, "epsilon": self.epsilon}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable("din_dist")
class BatchNormalization(keras.layers.Layer):
    """`Standardize`, then a learned scale and offset for each column of `[M, W]`."""

    def __init__(self, frozen: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.standardize = Standardize(frozen, name="standardize")

    def build(self, input_shape: tuple) -> None:
        width = input_shape[-1]
        self.standardize.build(input_shape)
        self.gamma = self.add_weight(shape=(width,), initializer="ones", name="gamma")
        self.beta = self.add_weight(shape=(width,), initializer="zeros", name="beta")

    def call(self, inputs: tf.Tensor, mode: Mode = INFERENCE) -> tf.Tensor:
        return self.standardize.then(_scaled, inputs, (self.gamma.value, self.beta.value), mode=mode)

    def affine(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the scale and offset `[W]` by which this layer is `scale * x + offset` in inference."""
        scale = self.gamma.value * tf.math.rsqrt(self.standardize.moving_variance.value + self.standardize.epsilon)
        return scale, self.beta.value - self.standardize.moving_mean.value * scale

    def get_config(self) -> dict:
        return {**super().get_config(), "frozen": self.standardize.frozen}


def _itself(inputs: tf.Tensor, standardised: tf.Tensor) -> tf.Tensor:
    return standardised


def _scaled(inputs: tf.Tensor, standardised: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tf.Tensor:
    return standardised * gamma + beta


def _apply(
    function: Callable[..., tf.Tensor], inputs: tf.Tensor, mean: tf.Tensor, scale: tf.Tensor, *parameters: tf.Tensor
) -> tf.Tensor:
    return function(inputs, (inputs - mean) * scale, *parameters)


def _sums_about(inputs: tf.Tensor, centre: tf.Tensor, num_rows: tf.Tensor | None) -> tf.Tensor:
    """Returns the sum and the sum of squares of each column less `centre`, and the number of rows: `[2W + 1]`."""
    shifted = _without_padding(inputs - centre, num_rows)
    count = tf.cast(tf.shape(inputs)[0] if num_rows is None else num_rows, tf.float32)
    return tf.concat([_sum_of_columns(shifted), _sum_of_columns(tf.square(shifted)), [count]], axis=0)


def _gradient_sums(
    function: Callable[..., tf.Tensor],
    upstream: tf.Tensor,
    inputs: tf.Tensor,
    mean: tf.Tensor,
    scale: tf.Tensor,
    *parameters: tf.Tensor,
) -> list[tf.Tensor]:
    """Returns column sums: of the gradient of n and of that times n, `[2W]`, and of each parameter, `[W]`.

    n is the standardised input. Rows of padding have no gradient, and so add nothing.
    """
    standardised = (inputs - mean) * scale
    repeated = [tf.broadcast_to(parameter, tf.shape(inputs)) for parameter in parameters]
    with tf.GradientTape() as tape:
        tape.watch([standardised, *repeated])
        outputs = function(inputs, standardised, *repeated)
    of_standardised, *of_parameters = tape.gradient(outputs, [standardised, *repeated], upstream)
    sums = [_sum_of_columns(of_standardised), _sum_of_columns(of_standardised * standardised)]
    return [tf.concat(sums, axis=0), *map(_sum_of_columns, of_parameters)]


def _gradient_of_inputs(
    function: Callable[..., tf.Tensor],
    upstream: tf.Tensor,
    inputs: tf.Tensor,
    mean: tf.Tensor,
    scale: tf.Tensor,
    sums: tf.Tensor,
    count: tf.Tensor,
    num_rows: tf.Tensor | None,
    *parameters: tf.Tensor,
) -> tf.Tensor:
    """Returns the gradient of `inputs`, `[M, W]`.

    The `sums` `[2W]` are those of `_gradient_sums` over the global batch, of `count` `[1]` rows.
    Source: Ioffe, Szegedy 2015 (arXiv:1502.03167), section 3, with their sums collected.
    """
    standardised = (inputs - mean) * scale
    with tf.GradientTape() as tape:
        tape.watch([inputs, standardised])
        outputs = function(inputs, standardised, *parameters)
    direct, through = tape.gradient(
        outputs, [inputs, standardised], upstream, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    mean_of_gradient, mean_of_product = tf.split(sums / count, 2)
    return direct + _without_padding(scale * (through - mean_of_gradient - standardised * mean_of_product), num_rows)


def _statistics(
    summed: tf.Tensor, moving_mean: tf.Tensor, moving_variance: tf.Tensor, constants: tf.Tensor
) -> tuple[tf.Tensor, ...]:
    """Returns mean, scale, number of rows, new moving mean and variance, as the kernel `Statistics` does."""
    width, (momentum, epsilon) = moving_mean.shape[0], tf.unstack(constants)
    total, total_of_squares, count = tf.split(summed, [width, width, 1])
    keep = tf.where(count > 0, momentum, 1.0)  # a batch of empty histories has no positions at all
    count = tf.maximum(count, 1.0)
    mean_shift = total / count
    mean = moving_mean + mean_shift
    variance = tf.maximum(total_of_squares / count - tf.square(mean_shift), 0.0)
    new_averages = (keep * old + (1.0 - keep) * new for old, new in ((moving_mean, mean), (moving_variance, variance)))
    return mean, tf.math.rsqrt(variance + epsilon), count, *new_averages


def _without_padding(rows: tf.Tensor, num_rows: tf.Tensor | None) -> tf.Tensor:
    if num_rows is None:
        return rows
    return tf.where((tf.range(tf.shape(rows)[0]) < num_rows)[:, None], rows, 0.0)


def _sum_of_columns(rows: tf.Tensor) -> tf.Tensor:
    """Sums each column: `[M, W] -> [W]`."""
    num_rows, parts = rows.shape[0], 8
    if num_rows and num_rows % parts == 0:
        # XLA's loop over a column is slow when it also computes what it adds up: do that in a flat loop first.
        each = num_rows // parts
        rows = tf.add_n([rows[part * each : (part + 1) * each] for part in range(parts)])
    return tf.reduce_sum(rows, axis=0)
