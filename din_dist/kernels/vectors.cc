// Item vectors, as TensorFlow operations: concatenated embeddings, and the head's input from two vectors; with their
// gradients. Only layers/native/vectors.py calls them.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "clones.h"
#include "tensorflow.h"
#include "threads.h"

namespace din {
namespace {

constexpr int64_t kLeastRows = 64, kLeastColumns = 16;  // for each thread; 16 columns are a cache line

struct Matrix {
  int64_t rows, columns;
  float* data;

  explicit Matrix(const Tensor& tensor) {
    const std::vector<int64_t> shape = tensor.Shape();
    Require(shape.size() == 2, "vectors must be rows of a matrix");
    rows = shape[0];
    columns = shape[1];
    data = tensor.Data<float>();
  }
};

// Returns `place`, which must be a row among `num_rows`.
inline int64_t Checked(int32_t place, int64_t num_rows) {
  Require(place >= 0 && place < num_rows, "places must be those of rows");
  return place;
}

inline void Add(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// Writes the rows [begin, end) of [a, b, a * b].
DIN_CLONES void WriteBesideProduct(const Matrix& a, const Matrix& b, int64_t begin, int64_t end, float* to) {
  const int64_t width = a.columns;
  for (int64_t row = begin; row < end; ++row) {
    const float *left = a.data + row * width, *right = b.data + row * width;
    float* __restrict own = to + 3 * row * width;
    for (int64_t i = 0; i < width; ++i) own[i] = left[i];
    for (int64_t i = 0; i < width; ++i) own[width + i] = right[i];
    for (int64_t i = 0; i < width; ++i) own[2 * width + i] = left[i] * right[i];
  }
}

// Writes the rows [begin, end) of the gradients with respect to a and b.
DIN_CLONES void WriteGradients(const Matrix& a, const Matrix& b, const float* upstream, int64_t begin, int64_t end,
                               float* of_a, float* of_b) {
  const int64_t width = a.columns;
  for (int64_t row = begin; row < end; ++row) {
    const float *left = a.data + row * width, *right = b.data + row * width;
    const float *of_left = upstream + 3 * row * width, *of_right = of_left + width, *of_product = of_right + width;
    float *__restrict to_left = of_a + row * width, *__restrict to_right = of_b + row * width;
    for (int64_t i = 0; i < width; ++i) {
      to_left[i] = of_left[i] + of_product[i] * right[i];
      to_right[i] = of_right[i] + of_product[i] * left[i];
    }
  }
}

// Returns which of the parts have rows that several items share; the attribute `shared` is a list of booleans.
std::vector<TF_Bool> SharedParts(TF_OpKernelConstruction* construction) {
  Status status;
  std::vector<TF_Bool> shared(Attribute(construction, "N"));
  TF_OpKernelConstruction_GetAttrBoolList(construction, "shared", shared.data(), static_cast<int>(shared.size()), status);
  status.Check();
  return shared;
}

// The vectors of U items, concatenated from parts. In each part, every item has its own row, or the index of a shared
// one.
class Items {
 public:
  // Reads the inputs from `input` on: the parts' rows, the parts' indices (empty unless shared), the candidates' items.
  Items(TF_OpKernelContext* context, int input, const std::vector<TF_Bool>& shared) {
    const auto num_parts = static_cast<int64_t>(shared.size());
    for (int64_t part = 0; part < 2 * num_parts + 1; ++part) tensors_.push_back(Tensor::Input(context, input++));
    for (int64_t part = 0; part < num_parts; ++part) {
      rows_.emplace_back(tensors_[part]);
      const Tensor& places = tensors_[num_parts + part];
      places_.push_back(places.Data<const int32_t>());
      const int64_t items = shared[part] ? places.Size() : rows_.back().rows;
      Require(part == 0 || items == count_, "the parts must be of equally many items");
      count_ = items;
      width_ += rows_.back().columns;
    }
    shared_ = shared;
    candidates_ = tensors_.back().Data<const int32_t>();
    num_candidates_ = tensors_.back().Size();
  }

  int64_t Count() const { return count_; }
  int64_t Width() const { return width_; }
  int64_t NumParts() const { return static_cast<int64_t>(rows_.size()); }
  int64_t NumCandidates() const { return num_candidates_; }
  const Matrix& Rows(int64_t part) const { return rows_[part]; }
  bool Shares(int64_t part) const { return shared_[part]; }
  int64_t Candidate(int64_t at) const { return Checked(candidates_[at], count_); }
  int64_t Place(int64_t part, int64_t item) const {
    return shared_[part] ? Checked(places_[part][item], rows_[part].rows) : item;
  }

 private:
  std::vector<Tensor> tensors_;
  std::vector<Matrix> rows_;
  std::vector<TF_Bool> shared_;
  std::vector<const int32_t*> places_;
  const int32_t* candidates_;
  int64_t count_ = 0, width_ = 0, num_candidates_;
};

class Vectors {
 public:
  explicit Vectors(TF_OpKernelConstruction* construction)
      : shared_(SharedParts(construction)), num_threads_(static_cast<int>(Attribute(construction, "num_threads"))) {}

  void Compute(TF_OpKernelContext* context) {
    const Items items(context, 0, shared_);
    const int64_t width = items.Width();
    const Tensor vectors = Tensor::Output(context, 0, TF_FLOAT, {items.Count(), width});
    const Tensor candidates = Tensor::Output(context, 1, TF_FLOAT, {items.NumCandidates(), width});
    const auto write = [&](int64_t item, float* to) {
      for (int64_t part = 0; part < items.NumParts(); ++part) {
        const Matrix& rows = items.Rows(part);
        to = std::copy_n(rows.data + items.Place(part, item) * rows.columns, rows.columns, to);
      }
    };
    // A candidate's vector is not copied from its item's vector, which another thread may not have written yet.
    InParts(num_threads_, items.Count() + items.NumCandidates(), kLeastRows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < std::min(end, items.Count()); ++i) write(i, vectors.Data<float>() + i * width);
      for (int64_t i = std::max(begin, items.Count()) - items.Count(); i < end - items.Count(); ++i) {
        write(items.Candidate(i), candidates.Data<float>() + i * width);
      }
    });
  }

 private:
  const std::vector<TF_Bool> shared_;
  const int num_threads_;
};

class VectorsGradient {
 public:
  explicit VectorsGradient(TF_OpKernelConstruction* construction)
      : shared_(SharedParts(construction)), num_threads_(static_cast<int>(Attribute(construction, "num_threads"))) {}

  void Compute(TF_OpKernelContext* context) {
    const Tensor of_vectors = Tensor::Input(context, 0), of_candidates = Tensor::Input(context, 1);
    const Items items(context, 2, shared_);
    const int64_t width = items.Width();
    Require(of_vectors.Size() == items.Count() * width && of_candidates.Size() == items.NumCandidates() * width,
            "gradients must be as large as what they are of");
    std::vector<Tensor> outputs;
    for (int64_t part = 0; part < items.NumParts(); ++part) {
      const Matrix& rows = items.Rows(part);
      outputs.push_back(Tensor::Output(context, static_cast<int>(part), TF_FLOAT, {rows.rows, rows.columns}));
    }
    // A thread owns some columns of all rows, so it alone adds to them, in the order of the inputs.
    InParts(num_threads_, width, kLeastColumns, [&](int64_t begin, int64_t end) {
      int64_t first = 0;  // first column of the current part
      for (int64_t part = 0; part < items.NumParts(); ++part) {
        const int64_t columns = items.Rows(part).columns;
        const int64_t from = std::max(begin, first), count = std::min(end, first + columns) - from;
        if (count > 0) {
          AddUp(items, part, of_vectors.Data<const float>() + from, of_candidates.Data<const float>() + from, count,
                outputs[part].Data<float>() + from - first);
        }
        first += columns;
      }
    });
  }

 private:
  // Adds up `count` columns of a part.
  static void AddUp(const Items& items, int64_t part, const float* of_vectors, const float* of_candidates, int64_t count,
                    float* to) {
    const int64_t width = items.Width(), step = items.Rows(part).columns;
    if (items.Shares(part)) {
      for (int64_t row = 0; row < items.Rows(part).rows; ++row) std::fill_n(to + row * step, count, 0.0f);
      for (int64_t item = 0; item < items.Count(); ++item) {
        Add(of_vectors + item * width, count, to + items.Place(part, item) * step);
      }
    } else {
      for (int64_t item = 0; item < items.Count(); ++item) std::copy_n(of_vectors + item * width, count, to + item * step);
    }
    for (int64_t at = 0; at < items.NumCandidates(); ++at) {
      Add(of_candidates + at * width, count, to + items.Place(part, items.Candidate(at)) * step);
    }
  }

  const std::vector<TF_Bool> shared_;
  const int num_threads_;
};

// Concatenates [a, b] to [a, b, a * b], from rows of [M, H] each.
class BesideProduct {
 public:
  explicit BesideProduct(TF_OpKernelConstruction* construction)
      : num_threads_(static_cast<int>(Attribute(construction, "num_threads"))) {}

  void Compute(TF_OpKernelContext* context) {
    const Tensor a_tensor = Tensor::Input(context, 0), b_tensor = Tensor::Input(context, 1);
    const Matrix a(a_tensor), b(b_tensor);
    Require(a.rows == b.rows && a.columns == b.columns, "vectors must be equally many and equally wide");
    const Tensor output = Tensor::Output(context, 0, TF_FLOAT, {a.rows, 3 * a.columns});
    InParts(num_threads_, a.rows, kLeastRows, [&](int64_t begin, int64_t end) {
      WriteBesideProduct(a, b, begin, end, output.Data<float>());
    });
  }

 private:
  const int num_threads_;
};

class BesideProductGradient {
 public:
  explicit BesideProductGradient(TF_OpKernelConstruction* construction)
      : num_threads_(static_cast<int>(Attribute(construction, "num_threads"))) {}

  void Compute(TF_OpKernelContext* context) {
    const Tensor a_tensor = Tensor::Input(context, 0), b_tensor = Tensor::Input(context, 1);
    const Tensor upstream = Tensor::Input(context, 2);
    const Matrix a(a_tensor), b(b_tensor);
    Require(a.rows == b.rows && a.columns == b.columns && upstream.Size() == 3 * a.rows * a.columns,
            "gradients must be as large as what they are of");
    const Tensor of_a = Tensor::Output(context, 0, TF_FLOAT, {a.rows, a.columns});
    const Tensor of_b = Tensor::Output(context, 1, TF_FLOAT, {a.rows, a.columns});
    InParts(num_threads_, a.rows, kLeastRows, [&](int64_t begin, int64_t end) {
      WriteGradients(a, b, upstream.Data<const float>(), begin, end, of_a.Data<float>(), of_b.Data<float>());
    });
  }

 private:
  const int num_threads_;
};

const bool kRegistered =
    Kernel<Vectors>::Register("DinDistVectors", {"rows: N * float", "places: N * int32", "candidate_places: int32"},
                              {"vectors: float", "candidates: float"}, {"N: int", "shared: list(bool)", "num_threads: int"}) &&
    Kernel<VectorsGradient>::Register("DinDistVectorsGradient",
                                      {"of_vectors: float", "of_candidates: float", "rows: N * float",
                                       "places: N * int32", "candidate_places: int32"},
                                      {"of_rows: N * float"}, {"N: int", "shared: list(bool)", "num_threads: int"}) &&
    Kernel<BesideProduct>::Register("DinDistBesideProduct", {"a: float", "b: float"}, {"beside: float"},
                                    {"num_threads: int"}) &&
    Kernel<BesideProductGradient>::Register("DinDistBesideProductGradient",
                                            {"a: float", "b: float", "upstream: float"},
                                            {"of_a: float", "of_b: float"}, {"num_threads: int"});

}  // namespace
}  // namespace din
