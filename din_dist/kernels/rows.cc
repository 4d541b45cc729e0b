// Operations on rows, for TensorFlow: which segment each of a batch belongs to; what ranks do after an exchange, all
// the same: a layer's statistics, the sums of rows that several ranks have, penalties, the gradient's norm, and the update
// of weights. Called by layers/packed.py, layers/standardize.py, distributed/gradients.py, training/regularization.py and
// training/optimizers.py alone.
//
// No product is contracted with a sum here (see launch/build_kernels.sh): every instruction set gives the same bits, so
// that the weights of all ranks stay equal where their processors differ.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <vector>

#include "clones.h"
#include "tensorflow.h"
#include "threads.h"

namespace din {
namespace {

constexpr int32_t kNoRow = -1;  // padding

// Which of the distinct ids, numbered as they first come, each of `all` is; kNoRow of padding.
class Distinct {
 public:
  Distinct(const int32_t* all, int64_t count) : places(count, kNoRow), is_first(count, false) {
    int bits = 4;
    while ((int64_t{1} << bits) < 2 * count) ++bits;
    const size_t mask = (size_t{1} << bits) - 1;
    std::vector<int32_t> slots(mask + 1, kNoRow);  // places in `ids`
    for (int64_t i = 0; i < count; ++i) {
      if (all[i] == kNoRow) continue;
      size_t slot = (static_cast<uint32_t>(all[i]) * 2654435769u) >> (32 - std::min(bits, 32)) & mask;
      while (slots[slot] != kNoRow && ids[slots[slot]] != all[i]) slot = (slot + 1) & mask;
      if (slots[slot] == kNoRow) {
        slots[slot] = static_cast<int32_t>(ids.size());
        ids.push_back(all[i]);
        is_first[i] = true;
      }
      places[i] = slots[slot];
    }
  }

  std::vector<int32_t> ids, places;
  std::vector<char> is_first;
};

class SegmentIds {
 public:
  explicit SegmentIds(TF_OpKernelConstruction*) {}

  void Compute(TF_OpKernelContext* context) {
    const Tensor lengths = Tensor::Input(context, 0);
    const auto* const length = lengths.Data<const int32_t>();
    int64_t total = 0;
    for (int64_t i = 0; i < lengths.Size(); ++i) {
      Require(length[i] >= 0, "lengths of segments must not be negative");
      total += length[i];
    }
    const Tensor ids = Tensor::Output(context, 0, TF_INT32, {total});
    auto* to = ids.Data<int32_t>();
    for (int64_t i = 0; i < lengths.Size(); ++i) to = std::fill_n(to, length[i], static_cast<int32_t>(i));
  }
};

// Of a layer, as layers/standardize.py defines them.
class Statistics {
 public:
  explicit Statistics(TF_OpKernelConstruction*) {}

  void Compute(TF_OpKernelContext* context) {
    const Tensor summed = Tensor::Input(context, 0), moving_mean = Tensor::Input(context, 1);
    const Tensor moving_variance = Tensor::Input(context, 2), constants = Tensor::Input(context, 3);
    const int64_t width = moving_mean.Size();
    Require(summed.Size() == 2 * width + 1 && moving_variance.Size() == width && constants.Size() == 2,
            "statistics must be of the layer's columns");
    const auto* const sums = summed.Data<const float>();
    const auto* const centre = moving_mean.Data<const float>();
    const auto* const old_variance = moving_variance.Data<const float>();
    const float momentum = constants.Data<const float>()[0], epsilon = constants.Data<const float>()[1];
    std::vector<Tensor> outputs;
    const auto next_output = [&](int64_t size) {
      const auto place = static_cast<int>(outputs.size());
      return outputs.emplace_back(Tensor::Output(context, place, TF_FLOAT, {size})).Data<float>();
    };
    float *mean = next_output(width), *scale = next_output(width), *count = next_output(1);
    float *new_mean = next_output(width), *new_variance = next_output(width);
    count[0] = std::max(sums[2 * width], 1.0f);
    const float keep = sums[2 * width] > 0 ? momentum : 1.0f;  // a batch of empty histories has no positions at all
    for (int64_t i = 0; i < width; ++i) {
      const float shift = sums[i] / count[0];
      const float squares = sums[width + i] / count[0] - shift * shift;
      const float variance = squares < 0 ? 0 : squares;  // NaN stays
      mean[i] = centre[i] + shift;
      scale[i] = 1.0f / std::sqrt(variance + epsilon);
      new_mean[i] = keep * centre[i] + (1.0f - keep) * mean[i];
      new_variance[i] = keep * old_variance[i] + (1.0f - keep) * variance;
    }
  }
};

class MergeRows {
 public:
  explicit MergeRows(TF_OpKernelConstruction* construction)
      : num_threads_(static_cast<int>(Attribute(construction, "num_threads"))) {}

  void Compute(TF_OpKernelContext* context) {
    const Tensor ids = Tensor::Input(context, 0), rows = Tensor::Input(context, 1);
    const std::vector<int64_t> shape = rows.Shape();
    const int64_t count = ids.Size();
    Require(shape.size() == 2 && shape[0] == count, "there must be an id for each row");
    const Distinct distinct(ids.Data<const int32_t>(), count);
    const auto num_distinct = static_cast<int64_t>(distinct.ids.size());
    const Tensor merged_ids = Tensor::Output(context, 0, TF_INT32, {num_distinct});
    const Tensor merged = Tensor::Output(context, 1, TF_FLOAT, {num_distinct, shape[1]});
    std::copy_n(distinct.ids.data(), num_distinct, merged_ids.Data<int32_t>());
    // Each part has some of the outputs, and adds to them in the order of the inputs.
    InParts(num_threads_, num_distinct, 256, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t place = distinct.places[i];
        if (place < begin || place >= end) continue;
        const float* from = rows.Data<const float>() + i * shape[1];
        float* to = merged.Data<float>() + place * shape[1];
        if (distinct.is_first[i]) {
          std::copy_n(from, shape[1], to);
        } else {
          for (int64_t column = 0; column < shape[1]; ++column) to[column] += from[column];
        }
      }
    });
  }

 private:
  const int num_threads_;
};

// --- Penalties and norm, as training/regularization.py defines them ---

// Sixteen sums, whatever the registers: the same bits everywhere.
DIN_CLONES double SumOfSquares(const float* values, int64_t count) {
  double sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    for (int64_t lane = 0; lane < 16; ++lane) {
      const double value = values[i + lane];
      sums[lane] += value * value;
    }
  }
  for (; i < count; ++i) sums[0] += static_cast<double>(values[i]) * values[i];
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

DIN_CLONES void AddTimes(const float* gradient, float weight, const float* value, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = gradient[i] + weight * value[i];
}

// Of N gradients, of which the first P are of rows that are penalised.
class Regularize {
 public:
  explicit Regularize(TF_OpKernelConstruction* construction)
      : count_(Attribute(construction, "N")),
        penalised_(Attribute(construction, "P")),
        num_threads_(static_cast<int>(Attribute(construction, "num_threads"))) {
    Require(penalised_ <= count_, "what is penalised must be among the gradients");
  }

  void Compute(TF_OpKernelContext* context) {
    int next = 0;
    const Tensor l2 = Tensor::Input(context, next++);
    Require(l2.Size() == 1, "there must be one weight for all rows");
    std::vector<Tensor> gradients, values, row_ids, weights, outputs;
    for (int64_t i = 0; i < count_; ++i) gradients.push_back(Tensor::Input(context, next++));
    for (auto* tensors : {&values, &row_ids, &weights}) {
      for (int64_t i = 0; i < penalised_; ++i) tensors->push_back(Tensor::Input(context, next++));
    }
    std::vector<Part> parts;
    for (int64_t i = 0; i < count_; ++i) {
      Part whole{};
      whole.gradient = gradients[i].Data<const float>();
      whole.rows = gradients[i].Size();
      whole.width = 1;
      if (i < penalised_) {
        const std::vector<int64_t> shape = gradients[i].Shape();
        Require(shape.size() == 2 && values[i].Size() == gradients[i].Size() && row_ids[i].Size() == shape[0],
                "a gradient's rows must have their values and ids");
        outputs.push_back(Tensor::Output(context, static_cast<int>(i), TF_FLOAT, shape));
        whole.rows = shape[0];
        whole.width = shape[1];
        whole.value = values[i].Data<const float>();
        whole.row_id = row_ids[i].Data<const int32_t>();
        whole.weights = weights[i].Size() ? weights[i].Data<const float>() : nullptr;
        whole.num_weights = weights[i].Size();
        whole.to = outputs.back().Data<float>();
      }
      const int64_t rows = std::max<int64_t>(1, kPart / std::max<int64_t>(1, whole.width));
      for (int64_t begin = 0; begin < whole.rows; begin += rows) parts.push_back(whole.Rows(begin, rows));
    }
    const float weight = *l2.Data<const float>();
    std::vector<double> squares(parts.size());
    InParts(num_threads_, static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) squares[i] = parts[i].Run(weight);
    });
    double total = 0;  // in the order of the parts, whoever did them
    for (const double square : squares) total += square;
    const Tensor norm = Tensor::Output(context, static_cast<int>(penalised_), TF_FLOAT, {});
    // Infinite where the squares, which optimizers add up in float32, are: such an update is refused.
    *norm.Data<float>() = std::sqrt(static_cast<float>(total));
  }

 private:
  static constexpr int64_t kPart = 4096;  // floats

  struct Part {
    const float* gradient;  // [rows, width]
    int64_t rows, width;
    // Of rows that are penalised:
    const float* value;
    const int32_t* row_id;
    const float* weights;  // of all rows of the table, or null
    int64_t num_weights;
    float* to;

    Part Rows(int64_t begin, int64_t most) const {
      Part part = *this;
      part.rows = std::min(most, rows - begin);
      part.gradient += begin * width;
      if (to) {
        part.value += begin * width;
        part.row_id += begin;
        part.to += begin * width;
      }
      return part;
    }

    double Run(float l2) const {
      if (!to) return SumOfSquares(gradient, rows * width);
      for (int64_t row = 0; row < rows; ++row) {
        float weight = l2;
        if (weights) {
          Require(row_id[row] >= 0 && row_id[row] < num_weights, "rows must be those of the table");
          weight += weights[row_id[row]];
        }
        AddTimes(gradient + row * width, weight, value + row * width, width, to + row * width);
      }
      return SumOfSquares(to, rows * width);
    }
  };

  const int64_t count_, penalised_;
  const int num_threads_;
};

// --- Updates, as training/optimizers.py defines them ---

// Of so many weights; `held` and `new_held` in the order of `initial_state` there.
struct Weights {
  int64_t count;
  const float* gradient;
  const float* value;
  const float* held[2];
  float* new_value;
  float* new_held[2];
};

DIN_CLONES void Sgd(const Weights& w, float rate, const float*) {
  for (int64_t i = 0; i < w.count; ++i) w.new_value[i] = w.value[i] - rate * w.gradient[i];
}

DIN_CLONES void Adagrad(const Weights& w, float rate, const float* constants) {
  const float epsilon = constants[0];
  const float *__restrict gradient = w.gradient, *__restrict value = w.value, *__restrict sum = w.held[0];
  float *__restrict new_value = w.new_value, *__restrict new_sum = w.new_held[0];
  for (int64_t i = 0; i < w.count; ++i) {
    const float squares = sum[i] + gradient[i] * gradient[i];
    new_sum[i] = squares;
    new_value[i] = value[i] - rate * gradient[i] / (std::sqrt(squares) + epsilon);
  }
}

DIN_CLONES void LazyAdam(const Weights& w, float rate, const float* constants) {
  const float beta_1 = constants[0], rest_1 = constants[1], beta_2 = constants[2], rest_2 = constants[3];
  const float epsilon = constants[4];
  const float *__restrict gradient = w.gradient, *__restrict value = w.value;
  const float *__restrict first = w.held[0], *__restrict second = w.held[1];
  float *__restrict new_value = w.new_value, *__restrict new_first = w.new_held[0];
  float *__restrict new_second = w.new_held[1];
  for (int64_t i = 0; i < w.count; ++i) {
    const float m = beta_1 * first[i] + rest_1 * gradient[i];
    const float v = beta_2 * second[i] + rest_2 * (gradient[i] * gradient[i]);
    new_first[i] = m;
    new_second[i] = v;
    new_value[i] = value[i] - rate * m / (std::sqrt(v) + epsilon);
  }
}

struct Rule {
  void (*update)(const Weights&, float rate, const float* constants);
  int64_t num_held, num_constants;
};

// As `RULES` in training/optimizers.py counts them.
constexpr Rule kRules[] = {{Sgd, 0, 0}, {Adagrad, 1, 1}, {LazyAdam, 2, 5}};

const Rule& RuleOf(int64_t rule) {
  Require(rule >= 0 && rule < static_cast<int64_t>(std::size(kRules)), "a rule must be one of those that there are");
  return kRules[rule];
}

// Of N arrays of weights: variables, or rows of them.
class Update {
 public:
  explicit Update(TF_OpKernelConstruction* construction)
      : count_(Attribute(construction, "N")),
        num_threads_(static_cast<int>(Attribute(construction, "num_threads"))),
        rule_(RuleOf(Attribute(construction, "rule"))) {
    Require(Attribute(construction, "M") == count_ * (1 + rule_.num_held), "each gradient must have its weights");
  }

  // Inputs: the rate, the constants; all gradients, all values, and all of each that is held. Outputs: all but gradients.
  void Compute(TF_OpKernelContext* context) {
    const Tensor rate = Tensor::Input(context, 0), constants = Tensor::Input(context, 1);
    Require(rate.Size() == 1 && constants.Size() == rule_.num_constants, "a rule must have its constants");
    std::vector<Tensor> tensors;
    auto next_input = [&, place = 2]() mutable {
      return tensors.emplace_back(Tensor::Input(context, place++)).Data<const float>();
    };
    std::vector<Weights> all(count_);
    std::vector<std::vector<int64_t>> shapes;
    for (Weights& weights : all) {
      weights.gradient = next_input();
      weights.count = tensors.back().Size();
      shapes.push_back(tensors.back().Shape());
    }
    const auto same_size = [&](const Weights& weights) {
      Require(tensors.back().Size() == weights.count, "gradients and weights must be equally large");
    };
    for (Weights& weights : all) {
      weights.value = next_input();
      same_size(weights);
    }
    for (int64_t held = 0; held < rule_.num_held; ++held) {
      for (Weights& weights : all) {
        weights.held[held] = next_input();
        same_size(weights);
      }
    }
    int output = 0;
    const auto next_output = [&](int64_t at) {
      return tensors.emplace_back(Tensor::Output(context, output++, TF_FLOAT, shapes[at])).Data<float>();
    };
    for (int64_t i = 0; i < count_; ++i) all[i].new_value = next_output(i);
    for (int64_t held = 0; held < rule_.num_held; ++held) {
      for (int64_t i = 0; i < count_; ++i) all[i].new_held[held] = next_output(i);
    }
    std::vector<Weights> parts;
    for (const Weights& weights : all) {
      for (int64_t begin = 0; begin < weights.count; begin += kPart) parts.push_back(Part(weights, begin));
    }
    const auto num_parts = static_cast<int64_t>(parts.size());
    InParts(num_threads_, num_parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) rule_.update(parts[i], *rate.Data<const float>(), constants.Data<float>());
    });
  }

 private:
  static constexpr int64_t kPart = 4096;  // what all of its arrays hold fits the cache

  Weights Part(const Weights& weights, int64_t begin) const {
    Weights part = weights;
    part.count = std::min(kPart, weights.count - begin);
    part.gradient += begin;
    part.value += begin;
    part.new_value += begin;
    for (int64_t held = 0; held < rule_.num_held; ++held) {
      part.held[held] += begin;
      part.new_held[held] += begin;
    }
    return part;
  }

  const int64_t count_;
  const int num_threads_;
  const Rule& rule_;
};

const bool kRegistered =
    Kernel<SegmentIds>::Register("DinDistSegmentIds", {"lengths: int32"}, {"segment_ids: int32"}, {}) &&
    Kernel<Statistics>::Register(
        "DinDistStatistics", {"summed: float", "moving_mean: float", "moving_variance: float", "constants: float"},
        {"mean: float", "scale: float", "num_rows: float", "new_mean: float", "new_variance: float"}, {}) &&
    Kernel<MergeRows>::Register("DinDistMergeRows", {"row_ids: int32", "rows: float"},
                                {"merged_ids: int32", "merged: float"}, {"num_threads: int"}) &&
    Kernel<Regularize>::Register("DinDistRegularize",
                                 {"l2: float", "gradients: N * float", "values: P * float", "row_ids: P * int32",
                                  "row_weights: P * float"},
                                 {"penalised: P * float", "norm: float"},
                                 {"N: int", "P: int >= 0", "num_threads: int"}) &&
    Kernel<Update>::Register("DinDistUpdate", {"rate: float", "constants: float", "gradients: N * float",
                                               "weights: M * float"},
                             {"updated: M * float"}, {"N: int", "M: int", "rule: int", "num_threads: int"});

}  // namespace
}  // namespace din
