// The passes of attention.h as TensorFlow operations. Only layers/native/attention.py and layers/native/dense.py call
// them.
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention.h"
#include "memory.h"
#include "tensorflow.h"
#include "threads.h"

namespace din {
namespace {

#if defined(__x86_64__)
// Returns a register of what the processor says of itself. Callers keep it, because it is slow on virtual machines.
unsigned Features(unsigned leaf, unsigned part, int which) {
  unsigned found[4] = {};
  return __get_cpuid_count(leaf, part, &found[0], &found[1], &found[2], &found[3]) ? found[which] : 0;
}

// Asks the system for AMX's tiles, once: without its permission they are an illegal instruction.
bool MayUseTiles() {
  constexpr long kAsk = 0x1023, kTiles = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool may = syscall(SYS_arch_prctl, kAsk, kTiles) == 0;
  return may;
}

// Tells if bfloat16 products run at full rate outside of tiles. On Intel's processors they do not.
bool MultipliesBfloat16Fast() {
  unsigned largest, name[3];
  if (!__get_cpuid(0, &largest, &name[0], &name[2], &name[1])) return false;
  return std::memcmp(name, "GenuineIntel", sizeof name) != 0;
}
#endif

bool Runs(const std::string& instructions) {
#if defined(__x86_64__)
  if (instructions == "avx512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && Runs("avx2");
  }
  if (instructions == "avx2") {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  }
  if (instructions == "avx512_bf16") return Runs("avx512") && Features(7, 1, 0) & (1u << 5);
  if (instructions == "amx") return Runs("avx512_bf16") && Features(7, 0, 3) & (1u << 22) && MayUseTiles();
#endif
  return instructions == "plain";
}

// A form of the passes. Each list has the fastest first.
struct Form {
  const char* name;
  const Passes* passes;
};

constexpr Form kInFloat32[] = {
#if defined(__x86_64__)
    {"avx512", &avx512::kPasses},
    {"avx2", &avx2::kPasses},
#endif
    {"plain", &plain::kPasses}};

constexpr Form kInBfloat16[] = {
#if defined(DIN_AMX)
    {"amx", &amx::kPasses},
#endif
#if defined(DIN_BFLOAT16)
    {"avx512_bf16", &avx512_bf16::kPasses},
#endif
    {"", nullptr}};

// Returns the form that DIN_DIST_INSTRUCTIONS names, or null if it is not of this list. It is taken at its word but for
// the permission to use tiles, because tests run tiles on processors that have none.
template <typename Forms>
const Form* Wanted(const Forms& forms) {
  const char* name = std::getenv("DIN_DIST_INSTRUCTIONS");
  const Form* const found = name && *name ? Find(forms, name) : nullptr;
#if defined(DIN_AMX)
  if (found && found->passes == &amx::kPasses) return MayUseTiles() ? found : nullptr;
#endif
  return found && Runs(name) ? found : nullptr;
}

// Tells if DIN_DIST_INSTRUCTIONS names a form that does not run here.
bool WantsWhatIsNotHere() {
  const char* name = std::getenv("DIN_DIST_INSTRUCTIONS");
  return name && *name && !Wanted(kInFloat32) && !Wanted(kInBfloat16);
}

// Returns the form that computes in bfloat16, or null if the compiler or the processor has no such instructions.
const Form* FormInBfloat16() {
  static const Form* const chosen = []() -> const Form* {
    if (const Form* wanted = Wanted(kInBfloat16)) return wanted;
    if (WantsWhatIsNotHere()) return nullptr;
    for (const Form& form : kInBfloat16) {
      if (form.passes && Runs(form.name)) return &form;
    }
    return nullptr;
  }();
  return chosen;
}

// Returns the fastest passes that this processor runs, or those that DIN_DIST_INSTRUCTIONS names.
const Passes& BestPasses() {
  static const Passes* const best = [] {
    if (const Form* wanted = Wanted(kInFloat32)) return wanted->passes;
    if (WantsWhatIsNotHere()) {
      throw std::invalid_argument(
          "DIN_DIST_INSTRUCTIONS must be avx512, avx2, plain, amx or avx512_bf16, and this processor must have them");
    }
    const auto runs = [](const Form& form) { return Runs(form.name); };
    return std::find_if(std::begin(kInFloat32), std::end(kInFloat32), runs)->passes;
  }();
  return *best;
}

const Passes& PassesOf(bool in_bfloat16) {
  if (!in_bfloat16) return BestPasses();
  const Form* const found = FormInBfloat16();
  Require(found, "bfloat16 takes a processor and kernels that multiply it");
  return *found->passes;
}

// --- TensorFlow's side ---

// The attributes of an operation.
struct Settings {
  Activation activation = kDice;
  int32_t num_threads = 1;
  bool softmax = false, in_bfloat16 = false;
};

// One call of an operation: its inputs and outputs in order, which are freed at the end of the call.
class Call {
 public:
  explicit Call(TF_OpKernelContext* context) : context_(context) {}

  const Tensor& Next() { return tensors_.emplace_back(Tensor::Input(context_, next_input_++)); }

  // Returns the next input, an array of `size` elements.
  template <typename T>
  const T* Array(int64_t size) {
    const Tensor& tensor = Next();
    Require(tensor.Size() == size, "the kernels' arrays must fit each other");
    return tensor.Data<const T>();
  }

  // Returns the next input, a matrix, and its sizes.
  const float* Matrix(int64_t* rows, int64_t* columns) {
    const Tensor& tensor = Next();
    const std::vector<int64_t> shape = tensor.Shape();
    Require(shape.size() == 2, "the kernels take matrices");
    *rows = shape[0];
    *columns = shape[1];
    return tensor.Data<const float>();
  }

  template <typename T>
  const T* Vector(int64_t* size) {
    const Tensor& tensor = Next();
    *size = tensor.Size();
    return tensor.Data<const T>();
  }

  float* Output(const std::vector<int64_t>& shape, bool zero = true) {
    const Tensor& tensor = tensors_.emplace_back(Tensor::Output(context_, next_output_++, TF_FLOAT, shape));
    auto* data = tensor.Data<float>();
    if (zero) std::fill_n(data, tensor.Size(), 0.0f);
    return data;
  }

  // Returns the next input, a matrix, with rows padded to whole lanes.
  const float* PaddedMatrix(int64_t* rows, int64_t* columns) {
    const float* from = Matrix(rows, columns);
    return Pad(from, *rows, *columns, *columns, 1);
  }

  // Returns the transpose of the next input, a matrix: [columns, Padded(rows)].
  const float* TransposedMatrix(int64_t* rows, int64_t* columns) {
    const float* from = Matrix(rows, columns);
    return Pad(from, *columns, *rows, 1, *columns);
  }

  const float* PaddedRow(int64_t* size) {
    const float* from = Vector<float>(size);
    return Pad(from, 1, *size, *size, 1);
  }

  const float* PaddedVector(int64_t size) { return Pad(Array<float>(size), 1, size, size, 1); }

  // Returns the next input, an array of `size` elements, or null if it is empty.
  const float* ArrayOrNull(int64_t size) {
    int64_t given;
    const float* from = Vector<float>(&given);
    Require(given == 0 || given == size, "the kernels' arrays must fit each other");
    return given ? from : nullptr;
  }

  float* Zeros(int64_t size) {
    made_.emplace_back(size, 0.0f);
    return made_.back().data();
  }

  Gate NextGate(Activation activation, int64_t width) {
    Gate gate{};
    gate.activation = activation;
    gate.width = width;
    gate.mean = PaddedVector(width);
    gate.scale = PaddedVector(width);
    gate.alpha = PaddedVector(width);
    return gate;
  }

  Statistics NextStatistics(int64_t width) {
    Statistics statistics{};
    statistics.width = width;
    statistics.mean = PaddedVector(width);
    statistics.scale = PaddedVector(width);
    const float* sums = Array<float>(2 * width);
    const float num_rows = *Array<float>(1);
    float* means = Zeros(2 * Padded(width));
    for (int64_t i = 0; i < width; ++i) {
      means[i] = sums[i] / num_rows;
      means[Padded(width) + i] = sums[width + i] / num_rows;
    }
    statistics.mean_of_gradient = means;
    statistics.mean_of_product = means + Padded(width);
    return statistics;
  }

  Pairs NextPairs(int64_t num_candidates, int64_t num_keys) {
    Pairs pairs{};
    pairs.num_candidates = num_candidates;
    pairs.num_keys = num_keys;
    pairs.candidate_of = Vector<int32_t>(&pairs.count);
    pairs.key_of = Array<int32_t>(pairs.count);
    int32_t before = 0;
    bool good = true;
    for (int64_t p = 0; p < pairs.count; ++p) {
      good &= pairs.candidate_of[p] >= before && pairs.key_of[p] >= 0 && pairs.key_of[p] < num_keys;
      before = pairs.candidate_of[p];
    }
    good &= pairs.count == 0 || before < num_candidates;
    Require(good, "pairs must name candidates that ascend, and keys");
    return pairs;
  }

  // Reads the side of each pair into `pairs`; there are none if the next input is empty.
  void NextSides(Pairs* pairs, int64_t num_sides) {
    int64_t given;
    const auto* side_of = Vector<int32_t>(&given);
    if (given == 0) return;
    Require(given == pairs->count, "the kernels' arrays must fit each other");
    bool good = true;
    for (int64_t p = 0; p < given; ++p) good &= side_of[p] >= 0 && side_of[p] < num_sides;
    Require(good, "pairs must name sides");
    pairs->side_of = side_of;
    pairs->num_sides = num_sides;
  }

 private:
  const float* Pad(const float* from, int64_t rows, int64_t columns, int64_t row, int64_t step) {
    const int64_t padded = Padded(columns);
    float* to = Zeros(rows * padded);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) to[r * padded + c] = from[r * row + c * step];
    }
    return to;
  }

  TF_OpKernelContext* const context_;
  int next_input_ = 0, next_output_ = 0;
  std::vector<Tensor> tensors_;
  std::vector<std::vector<float>> made_;
};

// Returns the first pair of each shard, and the end of the last one. With `pairs`, no candidate is split.
std::vector<int64_t> Shards(int64_t count, int shards, const Pairs* pairs) {
  const int64_t most = std::max<int64_t>(1, std::min<int64_t>(shards, count / kTile));
  std::vector<int64_t> bounds{0};
  for (int64_t shard = 1; shard < most; ++shard) {
    int64_t pair = std::max(bounds.back(), count * shard / most);
    while (pairs && pair > 0 && pair < count && pairs->candidate_of[pair] == pairs->candidate_of[pair - 1]) ++pair;
    bounds.push_back(pair);
  }
  bounds.push_back(count);
  return bounds;
}

// Shards per thread, if a shard needs no copy of something large. With more shards than threads, a slow thread takes
// fewer. The sums do not depend on which thread computes a shard.
constexpr int kMore = 4;

// Each shard's own copy of an array that all shards add to. The first shard uses the output itself.
class Shared {
 public:
  Shared(float* output, int64_t size, int shards)
      : output_(output), size_(size), shards_(shards), rest_((shards - 1) * size) {}

  // Returns a shard's copy, filled with zeros. Each shard calls it once, itself, because filling large arrays takes
  // long.
  float* Of(int shard) {
    float* own = At(shard);
    std::fill_n(own, size_, 0.0f);
    return own;
  }

  void Merge(int num_threads) {
    if (shards_ == 1) return;
    InParts(num_threads, size_, 1, [&](int64_t begin, int64_t end) {
      for (int shard = 1; shard < shards_; ++shard) {
        const float* from = At(shard);
        for (int64_t i = begin; i < end; ++i) output_[i] += from[i];
      }
    });
  }

 private:
  float* At(int shard) { return shard ? rest_.data() + (shard - 1) * size_ : output_; }

  float* output_;
  int64_t size_;
  int shards_;
  Floats rest_;
};

// Each shard's own sums, in float64.
class Sums {
 public:
  Sums(int64_t size, int shards) : size_(size), values_(size * shards, 0.0) {}
  double* Of(int shard) { return values_.data() + shard * size_; }
  // Writes the first `width` columns of `count` rows of sums, from row `begin` on, summed over the shards.
  void WriteRows(int64_t begin, int64_t count, int64_t width, float* to) const {
    for (int64_t row = 0; row < count; ++row) Write((begin + row) * Padded(width), width, to + row * width);
  }
  // Makes an output of the first two rows of sums and of the number of rows that they sum.
  void WriteStatistics(Call& call, int64_t width, int64_t num_rows) const {
    float* to = call.Output({2 * width + 1}, false);
    WriteRows(0, 2, width, to);
    to[2 * width] = static_cast<float>(num_rows);
  }
  // Writes `width` sums from index `begin` on, summed over the shards.
  void Write(int64_t begin, int64_t width, float* to) const {
    for (int64_t i = 0; i < width; ++i) {
      double total = 0;
      for (size_t at = begin + i; at < values_.size(); at += size_) total += values_[at];
      to[i] = static_cast<float>(total);
    }
  }

 private:
  int64_t size_;
  std::vector<double> values_;
};

// Copies [rows, Padded(columns)] to [rows, columns].
void Unpad(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t r = 0; r < rows; ++r) std::copy_n(from + r * Padded(columns), columns, to + r * columns);
}

// The pairs [begin, end) and the scratch of one shard.
struct Shard {
  int index;
  int64_t begin, end;
  float* scratch;
};

// Calls `pass(passes, shard)` for each shard.
template <typename Pass>
void RunShards(const Settings& settings, const std::vector<int64_t>& bounds, int64_t widest, const Pass& pass) {
  const int shards = static_cast<int>(bounds.size()) - 1;
  const Passes& passes = PassesOf(settings.in_bfloat16);
  Threads::Get().Run(settings.num_threads, shards, [&](int shard) {
    const Floats scratch(ScratchFloats(widest));
    pass(passes, Shard{shard, bounds[shard], bounds[shard + 1], scratch.data()});
  });
}

// Returns from kernel + bias, [rows, Padded(units)].
Floats Project(Projection pass, int64_t rows, const Settings& settings) {
  Floats to(rows * Padded(pass.units));
  pass.to = to.data();
  const auto bounds = Shards(rows, kMore * settings.num_threads, nullptr);
  RunShards(settings, bounds, std::max(pass.width, pass.units), [&](const Passes& run, const Shard& shard) {
    run.project(pass, shard.begin, shard.end, shard.scratch);
  });
  return to;
}

// Adds to `pass.of_from`, and writes of_kernel [H, units] and, unless it is null, of_bias [units].
void GradientOfProjection(Call& call, const ProjectionGradient& pass, int64_t rows, const Settings& settings,
                          float* of_kernel, float* of_bias) {
  const int64_t units = Padded(pass.units);
  const auto bounds = Shards(rows, kMore * settings.num_threads, nullptr);
  const int shards = static_cast<int>(bounds.size()) - 1;
  float* padded_kernel = call.Zeros(pass.width * units);
  Shared kernels(padded_kernel, pass.width * units, shards);
  Sums biases(units, shards);
  RunShards(settings, bounds, std::max(pass.width, pass.units), [&](const Passes& run, const Shard& shard) {
    run.project_gradient(pass, shard.begin, shard.end, kernels.Of(shard.index), biases.Of(shard.index), shard.scratch);
  });
  kernels.Merge(settings.num_threads);
  Unpad(padded_kernel, pass.width, pass.units, of_kernel);
  if (of_bias) biases.Write(0, pass.units, of_bias);
}

void First_(Call& call, const Settings& settings) {
  First pass{};
  int64_t num_candidates, num_keys, width;
  pass.candidate = call.Matrix(&num_candidates, &pass.width);
  pass.keys = call.Matrix(&num_keys, &width);
  Require(width == pass.width, "candidates and keys must be equally wide");
  const auto next_kernel = [&] {
    const float* kernel = call.PaddedMatrix(&width, &pass.units);
    Require(width == pass.width, "the kernels must fit");
    return kernel;
  };
  const float* of_candidate = next_kernel();
  const float* of_key = next_kernel();
  pass.kernel = next_kernel();
  const float* bias = call.PaddedVector(pass.units);
  pass.centre = call.PaddedVector(pass.units);
  pass.pairs = call.NextPairs(num_candidates, num_keys);
  int64_t num_sides, side_width, side_rows;
  const float* sides = call.Matrix(&num_sides, &side_width);
  const float* of_side = call.PaddedMatrix(&side_rows, &width);
  Require(side_rows == side_width && width == pass.units, "the kernels must fit");
  call.NextSides(&pass.pairs, num_sides);
  const int64_t units = Padded(pass.units);
  pass.x = call.Output({pass.pairs.count, units}, false);
  const float* no_bias = call.Zeros(units);
  const auto by_candidate =
      Project({pass.width, pass.units, pass.candidate, of_candidate, bias, nullptr}, num_candidates, settings);
  const auto by_key = Project({pass.width, pass.units, pass.keys, of_key, no_bias, nullptr}, num_keys, settings);
  pass.by_candidate = by_candidate.data();
  pass.by_key = by_key.data();
  const Floats by_side =
      pass.pairs.side_of
          ? Project({side_width, pass.units, sides, of_side, no_bias, nullptr}, num_sides, settings)
          : Floats(0);
  pass.by_side = by_side.data();
  const auto bounds = Shards(pass.pairs.count, kMore * settings.num_threads, nullptr);
  Sums sums(2 * units, bounds.size() - 1);
  RunShards(settings, bounds, std::max(pass.width, pass.units), [&](const Passes& run, const Shard& shard) {
    run.first(pass, shard.begin, shard.end, sums.Of(shard.index), shard.scratch);
  });
  sums.WriteStatistics(call, pass.units, pass.pairs.count);
}

void FirstGradient_(Call& call, const Settings& settings) {
  FirstGradient pass{};
  int64_t num_candidates, num_keys, width, units, num_pairs;
  pass.candidate = call.Matrix(&num_candidates, &pass.width);
  pass.keys = call.Matrix(&num_keys, &width);
  const auto next_kernel = [&] {
    const float* kernel = call.TransposedMatrix(&width, &units);
    Require(width == pass.width, "the kernels must fit");
    return kernel;
  };
  const float* transposed_of_candidate = next_kernel();
  const float* transposed_of_key = next_kernel();
  pass.transposed_kernel = next_kernel();
  int64_t padded;
  pass.x = call.Matrix(&num_pairs, &padded);
  Require(padded == Padded(units), "x must have padded rows");
  pass.statistics = call.NextStatistics(units);
  pass.held = call.Array<float>(num_pairs * padded);
  pass.weights = call.Array<float>(num_pairs);
  int64_t interest_width, side_rows, side_units, num_sides;
  pass.of_interest = call.Matrix(&num_candidates, &interest_width);
  pass.pairs = call.NextPairs(num_candidates, num_keys);
  Require(pass.pairs.count == num_pairs, "x must have a row for each pair");
  const float* sides = call.Matrix(&num_sides, &pass.side_width);
  const float* transposed_of_side = call.TransposedMatrix(&side_rows, &side_units);
  Require(side_rows == pass.side_width && side_units == units, "the kernels must fit");
  Require(interest_width == pass.width + pass.side_width, "interests must be as wide as keys and sides");
  call.NextSides(&pass.pairs, num_sides);
  pass.of_candidate = call.Output({num_candidates, pass.width});
  float* of_keys = call.Output({num_keys, pass.width}, false);
  float* of_candidates_kernel = call.Output({pass.width, units}, false);
  float* of_keys_kernel = call.Output({pass.width, units}, false);
  float* of_kernel = call.Output({pass.width, units}, false);
  float* of_bias = call.Output({units}, false);
  float* of_sides = call.Output({num_sides, pass.side_width});
  float* of_sides_kernel = call.Output({pass.side_width, units});
  const Floats of_by_candidate(num_candidates * padded), of_by_key(num_keys * padded);
  const Floats of_by_side(num_sides * padded);
  pass.of_by_candidate = of_by_candidate.data();
  std::fill_n(pass.of_by_candidate, num_candidates * padded, 0.0f);
  // Filling and merging copies of all keys' gradients takes time, so there are at most two rows of them for each pair.
  const int64_t copies = std::max<int64_t>(2, 2 * num_pairs / std::max<int64_t>(num_keys, 1));
  const auto bounds = Shards(num_pairs, std::min<int64_t>(settings.num_threads, copies), &pass.pairs);
  const int shards = static_cast<int>(bounds.size()) - 1;
  Shared keys(of_keys, num_keys * pass.width, shards), by_key(of_by_key.data(), num_keys * padded, shards);
  Shared side_rows_of(of_sides, num_sides * pass.side_width, shards);
  Shared by_side(of_by_side.data(), num_sides * padded, shards);
  float* padded_kernel = call.Zeros(pass.width * padded);
  Shared kernel(padded_kernel, pass.width * padded, shards);
  RunShards(settings, bounds, std::max(pass.width, units), [&](const Passes& run, const Shard& shard) {
    const FirstGradientSums sums{kernel.Of(shard.index), keys.Of(shard.index), by_key.Of(shard.index),
                                 side_rows_of.Of(shard.index), by_side.Of(shard.index)};
    run.first_gradient(pass, shard.begin, shard.end, sums, shard.scratch);
  });
  keys.Merge(settings.num_threads);
  by_key.Merge(settings.num_threads);
  kernel.Merge(1);
  Unpad(padded_kernel, pass.width, units, of_kernel);
  GradientOfProjection(
      call, {pass.width, units, pass.candidate, pass.of_by_candidate, transposed_of_candidate, pass.of_candidate},
      num_candidates, settings, of_candidates_kernel, of_bias);
  GradientOfProjection(call, {pass.width, units, pass.keys, of_by_key.data(), transposed_of_key, of_keys}, num_keys,
                       settings, of_keys_kernel, nullptr);
  if (!pass.pairs.side_of) return;
  side_rows_of.Merge(settings.num_threads);
  by_side.Merge(settings.num_threads);
  GradientOfProjection(call, {pass.side_width, units, sides, of_by_side.data(), transposed_of_side, of_sides}, num_sides,
                       settings, of_sides_kernel, nullptr);
}

void Dense_(Call& call, const Settings& settings) {
  Dense pass{};
  int64_t padded, width;
  pass.x = call.Matrix(&pass.num_pairs, &padded);
  pass.kernel = call.PaddedMatrix(&width, &pass.units);
  Require(padded == Padded(width), "x must have padded rows");
  const int64_t units = Padded(pass.units);
  pass.bias = call.PaddedVector(pass.units);
  pass.centre = call.PaddedVector(pass.units);
  pass.gate = call.NextGate(settings.activation, width);
  pass.gate.beta = call.PaddedVector(width);
  pass.factors = call.ArrayOrNull(pass.num_pairs * padded);
  pass.next = call.Output({pass.num_pairs, units}, false);
  const auto bounds = Shards(pass.num_pairs, kMore * settings.num_threads, nullptr);
  Sums sums(2 * units, bounds.size() - 1);
  RunShards(settings, bounds, std::max(width, pass.units), [&](const Passes& run, const Shard& shard) {
    run.dense(pass, shard.begin, shard.end, sums.Of(shard.index), shard.scratch);
  });
  sums.WriteStatistics(call, pass.units, pass.num_pairs);
}

void DenseGradient_(Call& call, const Settings& settings) {
  DenseGradient pass{};
  int64_t padded, next_padded, next_rows;
  pass.x = call.Matrix(&pass.num_pairs, &padded);
  pass.next = call.Matrix(&next_rows, &next_padded);
  int64_t width, units;
  pass.transposed_kernel = call.TransposedMatrix(&width, &units);
  Require(padded == Padded(width) && next_padded == Padded(units) && next_rows == pass.num_pairs,
          "x and next must have padded rows");
  pass.gate = call.NextGate(settings.activation, width);
  pass.gate.beta = call.PaddedVector(width);
  pass.factors = call.ArrayOrNull(pass.num_pairs * padded);
  pass.statistics = call.NextStatistics(units);
  pass.held_of_next = call.Array<float>(pass.num_pairs * next_padded);
  pass.held = call.Output({pass.num_pairs, padded}, false);
  float* of_kernel = call.Output({width, units}, false);
  float* of_bias = call.Output({units}, false);
  const auto bounds = Shards(pass.num_pairs, kMore * settings.num_threads, nullptr);
  const int shards = static_cast<int>(bounds.size()) - 1;
  float* padded_kernel = call.Zeros(width * next_padded);
  Shared kernels(padded_kernel, width * next_padded, shards);
  Sums biases(next_padded, shards), sums(4 * padded, shards);
  RunShards(settings, bounds, std::max(width, units), [&](const Passes& run, const Shard& shard) {
    run.dense_gradient(pass, shard.begin, shard.end, kernels.Of(shard.index),
                       biases.Of(shard.index), sums.Of(shard.index), shard.scratch);
  });
  kernels.Merge(settings.num_threads);
  Unpad(padded_kernel, width, units, of_kernel);
  biases.Write(0, units, of_bias);
  sums.WriteRows(0, 2, width, call.Output({2 * width}, false));
  sums.WriteRows(2, 1, width, call.Output({width}, false));
  sums.WriteRows(3, 1, width, call.Output({width}, false));
}

void Pool_(Call& call, const Settings& settings) {
  Pool pass{};
  int64_t num_candidates, num_keys, num_pairs, padded, one;
  pass.x = call.Matrix(&num_pairs, &padded);
  int64_t inner;
  pass.output = call.PaddedRow(&inner);
  Require(padded == Padded(inner), "x must have padded rows");
  pass.bias = *call.Vector<float>(&one);
  pass.gate = call.NextGate(settings.activation, inner);
  pass.keys = call.Matrix(&num_keys, &pass.width);
  num_candidates = *call.Vector<int32_t>(&one);
  pass.divisor = *call.Vector<float>(&one);
  pass.softmax = settings.softmax;
  pass.pairs = call.NextPairs(num_candidates, num_keys);
  Require(pass.pairs.count == num_pairs, "x must have a row for each pair");
  int64_t num_sides;
  pass.sides = call.Matrix(&num_sides, &pass.side_width);
  call.NextSides(&pass.pairs, num_sides);
  pass.interest = call.Output({num_candidates, pass.width + pass.side_width});
  pass.weights = call.Output({num_pairs}, false);
  const auto bounds = Shards(num_pairs, kMore * settings.num_threads, &pass.pairs);
  RunShards(settings, bounds, inner, [&](const Passes& run, const Shard& shard) {
    run.pool(pass, shard.begin, shard.end, shard.scratch);
  });
}

void PoolGradient_(Call& call, const Settings& settings) {
  PoolGradient pass{};
  int64_t num_candidates, num_keys, num_pairs, padded, one, width;
  pass.x = call.Matrix(&num_pairs, &padded);
  int64_t inner;
  pass.output = call.PaddedRow(&inner);
  Require(padded == Padded(inner), "x must have padded rows");
  pass.gate = call.NextGate(settings.activation, inner);
  pass.keys = call.Matrix(&num_keys, &pass.width);
  pass.weights = call.Array<float>(num_pairs);
  pass.of_interest = call.Matrix(&num_candidates, &width);
  pass.divisor = *call.Vector<float>(&one);
  pass.softmax = settings.softmax;
  pass.pairs = call.NextPairs(num_candidates, num_keys);
  Require(pass.pairs.count == num_pairs, "x must have a row for each pair");
  int64_t num_sides;
  pass.sides = call.Matrix(&num_sides, &pass.side_width);
  Require(width == pass.width + pass.side_width, "interests must be as wide as keys and sides");
  call.NextSides(&pass.pairs, num_sides);
  const Floats of_scores(num_pairs);
  pass.of_scores = of_scores.data();
  pass.held = call.Output({num_pairs, padded}, false);
  float* of_output = call.Output({inner}, false);
  float* of_bias = call.Output({1}, false);
  const auto bounds = Shards(num_pairs, kMore * settings.num_threads, &pass.pairs);
  const int shards = static_cast<int>(bounds.size()) - 1;
  Sums outputs(padded + 1, shards), sums(3 * padded, shards);
  RunShards(settings, bounds, inner, [&](const Passes& run, const Shard& shard) {
    run.pool_gradient(pass, shard.begin, shard.end, outputs.Of(shard.index), sums.Of(shard.index), shard.scratch);
  });
  outputs.Write(0, inner, of_output);
  outputs.Write(padded, 1, of_bias);
  sums.WriteRows(0, 2, inner, call.Output({2 * inner}, false));
  sums.WriteRows(2, 1, inner, call.Output({inner}, false));
}

void SumsAbout_(Call& call, const Settings& settings) {
  Normalised pass{};
  pass.x = call.Matrix(&pass.num_rows, &pass.width);
  pass.centre = call.PaddedVector(pass.width);
  const auto bounds = Shards(pass.num_rows, kMore * settings.num_threads, nullptr);
  Sums sums(2 * Padded(pass.width), bounds.size() - 1);
  RunShards(settings, bounds, pass.width, [&](const Passes& run, const Shard& shard) {
    run.sums_about(pass, shard.begin, shard.end, sums.Of(shard.index), shard.scratch);
  });
  sums.WriteStatistics(call, pass.width, pass.num_rows);
}

void NormalisedGradient_(Call& call, const Settings& settings) {
  NormalisedGradient pass{};
  int64_t width;
  pass.x = call.Matrix(&pass.num_rows, &width);
  pass.held = call.Array<float>(pass.num_rows * width);
  pass.statistics = call.NextStatistics(width);
  pass.of_x = call.Output({pass.num_rows, width}, false);
  const auto bounds = Shards(pass.num_rows, kMore * settings.num_threads, nullptr);
  RunShards(settings, bounds, width, [&](const Passes& run, const Shard& shard) {
    run.normalised_gradient(pass, shard.begin, shard.end, shard.scratch);
  });
}

// --- Registration ---

template <void (*kRun)(Call&, const Settings&)>
class Operation {
 public:
  explicit Operation(TF_OpKernelConstruction* construction) {
    Status status;
    if (TF_OpKernelConstruction_HasAttr(construction, "activation", status)) {
      settings_.activation = NamedBy(construction, "activation", kActivations).activation;
    }
    const auto read_bool = [&](const char* name, bool* to) {
      TF_Bool value = 0;
      if (TF_OpKernelConstruction_HasAttr(construction, name, status)) {
        TF_OpKernelConstruction_GetAttrBool(construction, name, &value, status);
        *to = value;
      }
    };
    read_bool("softmax", &settings_.softmax);
    read_bool("in_bfloat16", &settings_.in_bfloat16);
    settings_.num_threads = std::max(static_cast<int32_t>(Attribute(construction, "num_threads")), 1);
  }

  void Compute(TF_OpKernelContext* context) {
    Call call(context);
    kRun(call, settings_);
  }

 private:
  Settings settings_;
};

template <void (*kRun)(Call&, const Settings&)>
void Register(const char* name, const std::vector<const char*>& inputs, const std::vector<const char*>& outputs,
              std::vector<const char*> attributes) {
  attributes.push_back("num_threads: int");
  Kernel<Operation<kRun>>::Register(name, inputs, outputs, attributes);
}

const bool kRegistered = [] {
  Register<First_>("DinDistFirst",
                   {"candidate: float", "keys: float", "kernel_of_candidate: float", "kernel_of_key: float",
                    "kernel: float", "bias: float", "centre: float", "candidate_of: int32", "key_of: int32",
                    "sides: float", "kernel_of_side: float", "side_of: int32"},
                   {"x: float", "sums: float"}, {"in_bfloat16: bool"});
  Register<FirstGradient_>(
      "DinDistFirstGradient",
      {"candidate: float", "keys: float", "kernel_of_candidate: float", "kernel_of_key: float", "kernel: float",
       "x: float", "mean: float", "scale: float", "sums_of_gradient: float", "num_rows: float", "held: float",
       "weights: float", "of_interest: float", "candidate_of: int32", "key_of: int32", "sides: float",
       "kernel_of_side: float", "side_of: int32"},
      {"of_candidate: float", "of_keys: float", "of_kernel_of_candidate: float", "of_kernel_of_key: float",
       "of_kernel: float", "of_bias: float", "of_sides: float", "of_kernel_of_side: float"},
      {"in_bfloat16: bool"});
  Register<Dense_>("DinDistDense",
                   {"x: float", "kernel: float", "bias: float", "centre: float", "mean: float", "scale: float",
                    "alpha: float", "beta: float", "factors: float"},
                   {"next: float", "sums: float"}, {"activation: string", "in_bfloat16: bool"});
  Register<DenseGradient_>(
      "DinDistDenseGradient",
      {"x: float", "next: float", "kernel: float", "mean: float", "scale: float", "alpha: float", "beta: float",
       "factors: float", "next_mean: float", "next_scale: float", "sums_of_gradient: float", "num_rows: float",
       "held_of_next: float"},
      {"held: float", "of_kernel: float", "of_bias: float", "of_standardised: float", "of_alpha: float",
       "of_beta: float"},
      {"activation: string", "in_bfloat16: bool"});
  Register<Pool_>("DinDistPool",
                  {"x: float", "output: float", "bias: float", "mean: float", "scale: float", "alpha: float",
                   "keys: float", "num_candidates: int32", "divisor: float", "candidate_of: int32", "key_of: int32",
                   "sides: float", "side_of: int32"},
                  {"interest: float", "weights: float"}, {"activation: string", "softmax: bool"});
  Register<PoolGradient_>(
      "DinDistPoolGradient",
      {"x: float", "output: float", "mean: float", "scale: float", "alpha: float", "keys: float", "weights: float",
       "of_interest: float", "divisor: float", "candidate_of: int32", "key_of: int32", "sides: float",
       "side_of: int32"},
      {"held: float", "of_output: float", "of_bias: float", "of_standardised: float", "of_alpha: float"},
      {"activation: string", "softmax: bool"});
  Register<SumsAbout_>("DinDistSumsAbout", {"x: float", "centre: float"}, {"sums: float"}, {});
  Register<NormalisedGradient_>("DinDistNormalisedGradient",
                                {"x: float", "held: float", "mean: float", "scale: float", "sums_of_gradient: float",
                                 "num_rows: float"},
                                {"of_x: float"}, {});
  return true;
}();

}  // namespace
}  // namespace din

// Called by kernels/__init__.py with ctypes.
extern "C" {
// Returns the name of the form that multiplies bfloat16, or "" if there is none.
__attribute__((visibility("default"))) const char* din_dist_form_in_bfloat16() {
  const din::Form* const form = din::FormInBfloat16();
  return form ? form->name : "";
}

// Tells if that form is faster than float32 on this processor, or is asked for by its name.
__attribute__((visibility("default"))) int din_dist_gains_by_bfloat16() {
#if defined(__x86_64__)
  const din::Form* const form = din::FormInBfloat16();
  return form && (form->name == std::string("amx") || form == din::Wanted(din::kInBfloat16) ||
                  din::MultipliesBfloat16Fast());
#else
  return false;
#endif
}

__attribute__((visibility("default"))) int din_dist_has_activation(const char* name) {
  return din::Find(din::kActivations, name) != nullptr;
}
}
