// The integer arithmetic of the input pipeline as TensorFlow operations, with the same results as the Python code. Only
// data/ calls them.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "clones.h"
#include "distinct.h"
#include "tensorflow.h"

namespace din {
namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;

inline uint64_t Mix(uint64_t state) {
  state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9;
  state = (state ^ state >> 27) * 0x94D049BB133111EB;
  return state ^ state >> 31;
}

DIN_CLONES void Fold(const uint64_t* part, int64_t step, uint64_t* states, int64_t count) {
  if (step == 0) {
    const uint64_t all = part[0] + kGolden;
    for (int64_t i = 0; i < count; ++i) states[i] = Mix(states[i] + all);
  } else {
    for (int64_t i = 0; i < count; ++i) states[i] = Mix(states[i] + part[i] + kGolden);
  }
}

// Computes `hash64` of data/hashing.py. The parts are scalars or vectors of one length; at least one is a vector.
class Hash64 {
 public:
  explicit Hash64(TF_OpKernelConstruction* construction) : count_(Attribute(construction, "N")) {}

  void Compute(TF_OpKernelContext* context) {
    std::vector<Tensor> parts;
    int64_t length = -1;
    for (int64_t i = 0; i < count_; ++i) {
      parts.push_back(Tensor::Input(context, static_cast<int>(i)));
      if (parts.back().Shape().size() == 1) length = parts.back().Size();
    }
    Require(length >= 0, "one of what is hashed together must be a vector");
    const Tensor hashes = Tensor::Output(context, 0, TF_UINT64, {length});
    auto* const states = hashes.Data<uint64_t>();
    std::fill_n(states, length, 0);
    for (const Tensor& part : parts) {
      const bool is_number = part.Shape().empty();
      Require(is_number || part.Shape() == std::vector<int64_t>{length},
              "what is hashed together must be numbers, or equally long");
      Fold(part.Data<const uint64_t>(), is_number ? 0 : 1, states, length);
    }
  }

 private:
  const int64_t count_;
};

// Computes `untouched_items` of data/negatives.py.
class UntouchedItems {
 public:
  explicit UntouchedItems(TF_OpKernelConstruction* construction) : num_items_(Attribute(construction, "num_items")) {}

  void Compute(TF_OpKernelContext* context) {
    const Tensor random = Tensor::Input(context, 0), begins = Tensor::Input(context, 1);
    const Tensor ends = Tensor::Input(context, 2), touched_gaps = Tensor::Input(context, 3);
    const int64_t count = random.Size();
    Require(begins.Size() == count && ends.Size() == count, "each draw must have its user's window");
    const Tensor items = Tensor::Output(context, 0, TF_INT32, {count});
    const auto* const gaps = touched_gaps.Data<const int32_t>();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = begins.Data<const int64_t>()[i], end = ends.Data<const int64_t>()[i];
      Require(0 <= begin && begin <= end && end <= touched_gaps.Size() && end - begin < num_items_,
              "a user's window must be of the gaps, and leave an item untouched");
      const auto rank = static_cast<int64_t>(random.Data<const uint64_t>()[i] %
                                             static_cast<uint64_t>(num_items_ - (end - begin)));
      const int64_t below = std::upper_bound(gaps + begin, gaps + end, rank) - (gaps + begin);
      items.Data<int32_t>()[i] = static_cast<int32_t>(rank + below + 1);
    }
  }

 private:
  const int64_t num_items_;
};

// Concatenates windows of one array.
class Windows {
 public:
  explicit Windows(TF_OpKernelConstruction*) {}

  void Compute(TF_OpKernelContext* context) {
    const Tensor values = Tensor::Input(context, 0), begins = Tensor::Input(context, 1);
    const Tensor ends = Tensor::Input(context, 2);
    Require(begins.Size() == ends.Size(), "each window must have its end");
    const auto *const begin = begins.Data<const int64_t>(), *const end = ends.Data<const int64_t>();
    int64_t total = 0;
    for (int64_t i = 0; i < begins.Size(); ++i) {
      Require(0 <= begin[i] && begin[i] <= end[i] && end[i] <= values.Size(), "windows must be of the array");
      total += end[i] - begin[i];
    }
    const Tensor found = Tensor::Output(context, 0, TF_INT32, {total});
    auto* to = found.Data<int32_t>();
    for (int64_t i = 0; i < begins.Size(); ++i) {
      to = std::copy(values.Data<const int32_t>() + begin[i], values.Data<const int32_t>() + end[i], to);
    }
  }
};

// Returns the distinct ids of several arrays, in the order of their first occurrence, and the inverse: the index of
// each id among the distinct ones. The arrays count as concatenated.
class DistinctIds {
 public:
  explicit DistinctIds(TF_OpKernelConstruction* construction) : count_(Attribute(construction, "N")) {}

  void Compute(TF_OpKernelContext* context) {
    std::vector<int32_t> all;
    for (int64_t i = 0; i < count_; ++i) {
      const Tensor ids = Tensor::Input(context, static_cast<int>(i));
      all.insert(all.end(), ids.Data<const int32_t>(), ids.Data<const int32_t>() + ids.Size());
    }
    const Distinct distinct(all.data(), static_cast<int64_t>(all.size()));
    const auto write = [&](int place, const std::vector<int32_t>& values) {
      const Tensor output = Tensor::Output(context, place, TF_INT32, {static_cast<int64_t>(values.size())});
      std::copy(values.begin(), values.end(), output.Data<int32_t>());
    };
    write(0, distinct.ids);
    write(1, distinct.places);
  }

 private:
  const int64_t count_;
};

const bool kRegistered =
    Kernel<Hash64>::Register("DinDistHash64", {"parts: N * uint64"}, {"hashes: uint64"}, {"N: int"}) &&
    Kernel<UntouchedItems>::Register(
        "DinDistUntouchedItems", {"random: uint64", "begins: int64", "ends: int64", "touched_gaps: int32"},
        {"items: int32"}, {"num_items: int"}) &&
    Kernel<Windows>::Register("DinDistWindows", {"values: int32", "begins: int64", "ends: int64"}, {"found: int32"},
                              {}) &&
    Kernel<DistinctIds>::Register("DinDistDistinctIds", {"ids: N * int32"}, {"distinct: int32", "places: int32"},
                                  {"N: int"});

}  // namespace
}  // namespace din
