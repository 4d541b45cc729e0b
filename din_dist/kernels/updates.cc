// An update of the weights, as TensorFlow operations: the penalties and the gradient's norm, which
// training/regularization.py defines, and the rules of training/optimizers.py. Only those two call them.
//
// Products and sums are not contracted here (see launch/build_kernels.sh), so that every instruction set gives the same
// bits. The weights of all ranks therefore stay equal even if their processors differ.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "clones.h"
#include "tensorflow.h"
#include "threads.h"
#include "variables.h"

namespace din {
namespace {

constexpr int64_t kPart = 4096;  // floats of a part, so that all its arrays fit the cache
constexpr int64_t kAhead = 4;    // rows of a table that are prefetched, because their order cannot be predicted

void Fetch(const float* row, int64_t width) {
  for (int64_t i = 0; i < width; i += 16) __builtin_prefetch(row + i);
}

void CheckRows(const int32_t* row_ids, int64_t count, int64_t table_rows) {
  for (int64_t i = 0; i < count; ++i) {
    Require(row_ids[i] >= 0 && row_ids[i] < table_rows, "rows must be those of the table");
  }
}

// Sixteen partial sums, whatever the width of the registers, so that all processors get the same bits.
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

// --- Penalties and norm ---

DIN_CLONES void AddTimes(const float* gradient, float weight, const float* value, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = gradient[i] + weight * value[i];
}

// Adds penalties to N gradients. The first `num_row_gradients` of them are of rows of tables, and the first P of these
// are penalised. The outputs are the penalised gradients and two sums of squares: of all gradients of rows, and of the
// others.
class Regularize {
 public:
  explicit Regularize(TF_OpKernelConstruction* construction)
      : count_(Attribute(construction, "N")),
        penalised_(Attribute(construction, "P")),
        row_gradients_(Attribute(construction, "num_row_gradients")),
        num_threads_(static_cast<int>(Attribute(construction, "num_threads"))) {
    Require(penalised_ <= row_gradients_ && row_gradients_ <= count_,
            "what is penalised must be among the gradients of rows");
  }

  void Compute(TF_OpKernelContext* context) {
    int next = 0;
    const Tensor l2 = Tensor::Input(context, next++);
    Require(l2.Size() == 1, "there must be one weight for all rows");
    std::vector<Tensor> gradients, row_ids, weights, outputs;
    for (int64_t i = 0; i < count_; ++i) gradients.push_back(Tensor::Input(context, next++));
    const std::vector<Variable> tables = Variable::Hold(context, next, penalised_, Variable::For::kReading);
    next += static_cast<int>(penalised_);
    for (auto* tensors : {&row_ids, &weights}) {
      for (int64_t i = 0; i < penalised_; ++i) tensors->push_back(Tensor::Input(context, next++));
    }
    std::vector<Part> parts;
    size_t row_parts = 0;
    for (int64_t i = 0; i < count_; ++i) {
      Part whole{};
      whole.gradient = gradients[i].Data<const float>();
      whole.rows = gradients[i].Size();
      whole.width = 1;
      if (i < penalised_) {
        const std::vector<int64_t> shape = gradients[i].Shape(), of_table = tables[i].Shape();
        Require(shape.size() == 2 && of_table.size() == 2 && shape[1] == of_table[1] && row_ids[i].Size() == shape[0],
                "a gradient's rows must have ids, and be as wide as the table's");
        Require(weights[i].Size() == 0 || weights[i].Size() == of_table[0], "each row of a table must have its weight");
        CheckRows(row_ids[i].Data<const int32_t>(), shape[0], of_table[0]);
        outputs.push_back(Tensor::Output(context, static_cast<int>(i), TF_FLOAT, shape));
        whole.rows = shape[0];
        whole.width = shape[1];
        whole.table = tables[i].Data();
        whole.row_id = row_ids[i].Data<const int32_t>();
        whole.weights = weights[i].Size() ? weights[i].Data<const float>() : nullptr;
        whole.to = outputs.back().Data<float>();
      }
      const int64_t rows = std::max<int64_t>(1, kPart / std::max<int64_t>(1, whole.width));
      for (int64_t begin = 0; begin < whole.rows; begin += rows) parts.push_back(whole.Rows(begin, rows));
      if (i < row_gradients_) row_parts = parts.size();
    }
    const float weight = *l2.Data<const float>();
    std::vector<double> squares(parts.size());
    InParts(num_threads_, static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) squares[i] = parts[i].Run(weight);
    });
    // Sums in the order of the parts, whichever thread computed them. The result is infinite if the squares overflow
    // float32, in which optimizers accumulate them; such an update is refused.
    const Tensor sums = Tensor::Output(context, static_cast<int>(penalised_), TF_FLOAT, {2});
    const auto middle = squares.begin() + static_cast<int64_t>(row_parts);
    sums.Data<float>()[0] = static_cast<float>(std::accumulate(squares.begin(), middle, 0.0));
    sums.Data<float>()[1] = static_cast<float>(std::accumulate(middle, squares.end(), 0.0));
  }

 private:
  struct Part {
    const float* gradient;  // [rows, width]
    int64_t rows, width;
    // For penalised rows only:
    const float* table;
    const int32_t* row_id;
    const float* weights;  // one for each row of the table, or null
    float* to;

    Part Rows(int64_t begin, int64_t most) const {
      Part part = *this;
      part.rows = std::min(most, rows - begin);
      part.gradient += begin * width;
      if (to) {
        part.row_id += begin;
        part.to += begin * width;
      }
      return part;
    }

    double Run(float l2) const {
      if (!to) return SumOfSquares(gradient, rows * width);
      for (int64_t row = 0; row < rows; ++row) {
        if (row + kAhead < rows) Fetch(table + row_id[row + kAhead] * width, width);
        const float weight = weights ? l2 + weights[row_id[row]] : l2;
        AddTimes(gradient + row * width, weight, table + row_id[row] * width, width, to + row * width);
      }
      return SumOfSquares(to, rows * width);
    }
  };

  const int64_t count_, penalised_, row_gradients_;
  const int num_threads_;
};

// --- Rules ---

// Some weights and their slot variables, in the order of `initial_state` there. The new values may overwrite the old
// ones.
struct Weights {
  int64_t count;
  const float* gradient;
  const float* value;
  const float* held[2];
  float* new_value;
  float* new_held[2];
};

DIN_CLONES void Sgd(const Weights& w, float rate, const float*) {
  const float *gradient = w.gradient, *value = w.value;
  float* new_value = w.new_value;
#pragma GCC ivdep
  for (int64_t i = 0; i < w.count; ++i) new_value[i] = value[i] - rate * gradient[i];
}

DIN_CLONES void Adagrad(const Weights& w, float rate, const float* constants) {
  const float epsilon = constants[0];
  const float *gradient = w.gradient, *value = w.value, *sum = w.held[0];
  float *new_value = w.new_value, *new_sum = w.new_held[0];
#pragma GCC ivdep
  for (int64_t i = 0; i < w.count; ++i) {
    const float squares = sum[i] + gradient[i] * gradient[i];
    new_sum[i] = squares;
    new_value[i] = value[i] - rate * gradient[i] / (std::sqrt(squares) + epsilon);
  }
}

DIN_CLONES void LazyAdam(const Weights& w, float rate, const float* constants) {
  const float beta_1 = constants[0], rest_1 = constants[1], beta_2 = constants[2], rest_2 = constants[3];
  const float epsilon = constants[4];
  const float *gradient = w.gradient, *value = w.value, *first = w.held[0], *second = w.held[1];
  float *new_value = w.new_value, *new_first = w.new_held[0], *new_second = w.new_held[1];
#pragma GCC ivdep
  for (int64_t i = 0; i < w.count; ++i) {
    const float m = beta_1 * first[i] + rest_1 * gradient[i];
    const float v = beta_2 * second[i] + rest_2 * (gradient[i] * gradient[i]);
    new_first[i] = m;
    new_second[i] = v;
    new_value[i] = value[i] - rate * m / (std::sqrt(v) + epsilon);
  }
}

// Updates one row, which has one number as slot variable.
DIN_CLONES void RowWiseAdagrad(const Weights& w, float rate, const float* constants) {
  const float squares = w.held[0][0] + static_cast<float>(SumOfSquares(w.gradient, w.count) / w.count);
  const float divisor = std::sqrt(squares) + constants[0];
  const float *gradient = w.gradient, *value = w.value;
  float* new_value = w.new_value;
  w.new_held[0][0] = squares;
#pragma GCC ivdep
  for (int64_t i = 0; i < w.count; ++i) new_value[i] = value[i] - rate * gradient[i] / divisor;
}

struct Rule {
  const char* name;  // the name of the class in training/optimizers.py
  void (*update)(const Weights&, float rate, const float* constants);
  int64_t num_held, num_constants;
  bool row_wise;  // slot variables have one number for each row
};

constexpr Rule kRules[] = {{"Sgd", Sgd, 0, 0, false},
                           {"Adagrad", Adagrad, 1, 1, false},
                           {"LazyAdam", LazyAdam, 2, 5, false},
                           {"RowWiseAdagrad", RowWiseAdagrad, 1, 1, true}};

// The arguments that both kinds of updates share.
class Update {
 public:
  explicit Update(TF_OpKernelConstruction* construction)
      : count_(Attribute(construction, "N")),
        num_threads_(static_cast<int>(Attribute(construction, "num_threads"))),
        rule_(NamedBy(construction, "rule", kRules)) {
    Require(Attribute(construction, "M") == count_ * (1 + rule_.num_held), "each gradient must have its weights");
  }

 protected:
  // Checks the first inputs: the learning rate and the rule's constants. All gradients follow them.
  void Begin(TF_OpKernelContext* context) const {
    Require(Tensor::Input(context, 0).Size() == 1 && Tensor::Input(context, 1).Size() == rule_.num_constants,
            "a rule must have its constants");
  }

  // Calls `run(part)` for `num_parts` parts, on all threads.
  template <typename Run>
  void InAllParts(size_t num_parts, const Run& run) const {
    InParts(num_threads_, static_cast<int64_t>(num_parts), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) run(i);
    });
  }

  const int64_t count_;
  const int num_threads_;
  const Rule& rule_;
};

// Updates N whole variables. Inputs: all gradients, all values, and all slot variables. Outputs: the new values and
// slot variables.
class UpdateWhole : public Update {
 public:
  explicit UpdateWhole(TF_OpKernelConstruction* construction) : Update(construction) {
    Require(!rule_.row_wise, "a rule must be for single weights");
  }

  void Compute(TF_OpKernelContext* context) {
    Begin(context);
    const Tensor rate = Tensor::Input(context, 0), constants = Tensor::Input(context, 1);
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
    InAllParts(parts.size(), [&](int64_t part) {
      rule_.update(parts[part], *rate.Data<const float>(), constants.Data<const float>());
    });
  }

 private:
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
};

// Updates some rows of N tables in place, each row at most once. Inputs: all gradients [R, D], the ids of their rows
// [R], all tables, and all slot variables. Outputs, unless B is 0: the old rows of all tables and slot variables, in
// this order.
class UpdateRows : public Update {
 public:
  explicit UpdateRows(TF_OpKernelConstruction* construction)
      : Update(construction), keeps_(Attribute(construction, "B") > 0), arrays_(1 + rule_.num_held) {
    Require(!keeps_ || Attribute(construction, "B") == Attribute(construction, "M"), "all rows must be kept, or none");
  }

  void Compute(TF_OpKernelContext* context) {
    Begin(context);
    const Tensor rate = Tensor::Input(context, 0), constants = Tensor::Input(context, 1);
    std::vector<Tensor> gradients, row_ids, outputs;
    int next = 2;
    for (auto* tensors : {&gradients, &row_ids}) {
      for (int64_t i = 0; i < count_; ++i) tensors->push_back(Tensor::Input(context, next++));
    }
    const std::vector<Variable> tables = Variable::Hold(context, next, count_ * arrays_, Variable::For::kWriting);
    std::vector<Rows> parts;
    for (int64_t i = 0; i < count_; ++i) {
      const std::vector<int64_t> shape = gradients[i].Shape();
      Require(shape.size() == 2 && row_ids[i].Size() == shape[0], "there must be an id for each row");
      Rows all{gradients[i].Data<const float>(), row_ids[i].Data<const int32_t>(), shape[0], shape[1], {}, {}};
      const int64_t table_rows = tables[i].Shape().empty() ? 0 : tables[i].Shape()[0];
      for (int64_t array = 0; array < arrays_; ++array) {
        const Variable& table = tables[array * count_ + i];
        std::vector<int64_t> expected = {table_rows, shape[1]};
        if (array > 0 && rule_.row_wise) expected.pop_back();
        Require(table.Shape() == expected, "a table and what is held for it must be as wide as the gradient");
        all.table[array] = table.Data();
        all.widths[array] = array > 0 && rule_.row_wise ? 1 : shape[1];
      }
      CheckRows(all.row_id, all.rows, table_rows);
      const int64_t rows = std::max<int64_t>(1, kPart / std::max<int64_t>(1, all.width));
      for (int64_t begin = 0; begin < all.rows; begin += rows) parts.push_back(all.From(begin, rows));
    }
    if (keeps_) Keep(context, gradients, row_ids, tables);
    InAllParts(parts.size(), [&](int64_t part) {
      Run(parts[part], *rate.Data<const float>(), constants.Data<const float>());
    });
  }

 private:
  struct Rows {
    const float* gradient;  // [rows, width]
    const int32_t* row_id;
    int64_t rows, width;
    float* table[3];  // the table and its slot variables
    int64_t widths[3];

    Rows From(int64_t begin, int64_t most) const {
      Rows part = *this;
      part.rows = std::min(most, rows - begin);
      part.gradient += begin * width;
      part.row_id += begin;
      return part;
    }
  };

  void Run(const Rows& part, float rate, const float* constants) const {
    for (int64_t row = 0; row < part.rows; ++row) {
      if (row + kAhead < part.rows) {
        for (int64_t array = 0; array < arrays_; ++array) {
          Fetch(part.table[array] + part.row_id[row + kAhead] * part.widths[array], part.widths[array]);
        }
      }
      float* of_row[3] = {};
      for (int64_t array = 0; array < arrays_; ++array) {
        of_row[array] = part.table[array] + part.row_id[row] * part.widths[array];
      }
      rule_.update({part.width, part.gradient + row * part.width, of_row[0], {of_row[1], of_row[2]}, of_row[0],
                    {of_row[1], of_row[2]}},
                   rate, constants);
    }
  }

  void Keep(TF_OpKernelContext* context, const std::vector<Tensor>& gradients, const std::vector<Tensor>& row_ids,
            const std::vector<Variable>& tables) const {
    for (int64_t at = 0; at < count_ * arrays_; ++at) {
      const auto* const row_id = row_ids[at % count_].Data<const int32_t>();
      std::vector<int64_t> shape = tables[at].Shape();
      shape[0] = gradients[at % count_].Shape()[0];
      const int64_t width = shape.size() > 1 ? shape[1] : 1;
      auto* const to = Tensor::Output(context, static_cast<int>(at), TF_FLOAT, shape).Data<float>();
      InParts(num_threads_, shape[0], 256, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          std::copy_n(tables[at].Data() + row_id[row] * width, width, to + row * width);
        }
      });
    }
  }

  const bool keeps_;
  const int64_t arrays_;
};

const bool kRegistered =
    Kernel<Regularize>::Register("DinDistRegularize",
                                 {"l2: float", "gradients: N * float", "tables: P * resource", "row_ids: P * int32",
                                  "row_weights: P * float"},
                                 {"penalised: P * float", "squares: float"},
                                 {"N: int", "P: int >= 0", "num_row_gradients: int", "num_threads: int"}) &&
    Kernel<UpdateWhole>::Register(
        "DinDistUpdate", {"rate: float", "constants: float", "gradients: N * float", "weights: M * float"},
        {"updated: M * float"}, {"N: int", "M: int", "rule: string", "num_threads: int"}) &&
    Kernel<UpdateRows>::Register(
        "DinDistUpdateRows",
        {"rate: float", "constants: float", "gradients: N * float", "row_ids: N * int32", "tables: M * resource"},
        {"before: B * float"}, {"N: int", "M: int", "B: int >= 0", "rule: string", "num_threads: int"}, true);

}  // namespace
}  // namespace din

// Called by kernels/__init__.py with ctypes.
extern "C" __attribute__((visibility("default"))) int din_dist_has_rule(const char* name) {
  return din::Find(din::kRules, name) != nullptr;
}
