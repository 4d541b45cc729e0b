// Operations on rows, as TensorFlow operations: the segment of each row of a batch, the statistics of a layer after an
// all-reduce, and the sums of rows that several ranks have. Only layers/packed.py, layers/standardize.py and
// distributed/gradients.py call them.
//
// Products and sums are not contracted here (see launch/build_kernels.sh), so that every instruction set gives the same
// bits. The weights of all ranks therefore stay equal even if their processors differ.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "distinct.h"
#include "tensorflow.h"
#include "threads.h"

namespace din {
namespace {

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

// Computes the statistics of a layer as layers/standardize.py defines them.
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
    const float keep = sums[2 * width] > 0 ? momentum : 1.0f;  // a batch of empty histories has no positions
    for (int64_t i = 0; i < width; ++i) {
      const float shift = sums[i] / count[0];
      const float squares = sums[width + i] / count[0] - shift * shift;
      const float variance = squares < 0 ? 0 : squares;  // NaN stays NaN
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
    const Distinct distinct(ids.Data<const int32_t>(), count, true);
    const auto num_distinct = static_cast<int64_t>(distinct.ids.size());
    const Tensor merged_ids = Tensor::Output(context, 0, TF_INT32, {num_distinct});
    const Tensor merged = Tensor::Output(context, 1, TF_FLOAT, {num_distinct, shape[1]});
    std::copy_n(distinct.ids.data(), num_distinct, merged_ids.Data<int32_t>());
    // Each part owns some of the outputs, and adds to them in the order of the inputs.
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

const bool kRegistered =
    Kernel<SegmentIds>::Register("DinDistSegmentIds", {"lengths: int32"}, {"segment_ids: int32"}, {}) &&
    Kernel<Statistics>::Register(
        "DinDistStatistics", {"summed: float", "moving_mean: float", "moving_variance: float", "constants: float"},
        {"mean: float", "scale: float", "num_rows: float", "new_mean: float", "new_variance: float"}, {}) &&
    Kernel<MergeRows>::Register("DinDistMergeRows", {"row_ids: int32", "rows: float"},
                                {"merged_ids: int32", "merged: float"}, {"num_threads: int"});

}  // namespace
}  // namespace din
