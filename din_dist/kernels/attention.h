// The passes of the local activation unit over the pairs of a batch (a candidate and a behaviour of its history), and
// the passes of normalising layers over rows of any kind.
//
// Arrays with values per pair, [P, W], have rows padded with zeros to `Padded(W)` floats. All other arrays are dense.
// Passes run in shards. If a pass sums by candidate, no candidate is split between shards.
#pragma once

#include <cstdint>

namespace din {

constexpr int64_t kLane = 16;

inline int64_t Padded(int64_t width) { return (width + kLane - 1) / kLane * kLane; }

// kScaled is the last step of batch normalisation: alpha n + beta.
enum Activation : int32_t { kDice, kPRelu, kSigmoid, kRelu, kScaled };

// An activation and the name by which an operation's attribute selects it.
struct NamedActivation {
  const char* name;
  Activation activation;
};

constexpr NamedActivation kActivations[] = {
    {"dice", kDice}, {"prelu", kPRelu}, {"sigmoid", kSigmoid}, {"relu", kRelu}, {"scaled", kScaled}};

// An activation of `width` columns, with the arrays that its gradient needs: `Padded(width)` floats each, 0 in the
// padding.
struct Gate {
  Activation activation;
  int64_t width;
  const float* mean;
  const float* scale;  // 1 / standard deviation
  const float* alpha;
  const float* beta;  // for kScaled only
};

// How the statistics of `width` columns depend on x. With it, the gradient with respect to x follows from the gradient
// that treats the statistics as constants. The arrays are padded as in `Gate`.
struct Statistics {
  int64_t width;
  const float* mean;
  const float* scale;
  // Means over the global batch of the gradient with respect to n, the standardised input, and of that gradient times
  // n.
  const float* mean_of_gradient;
  const float* mean_of_product;
};

struct Pairs {
  int64_t count;
  int64_t num_candidates;
  int64_t num_keys;
  const int32_t* candidate_of;  // ascending
  const int32_t* key_of;
  // What tells the behaviours of one key apart: the side of each pair. Null where keys have none.
  int64_t num_sides;
  const int32_t* side_of;
};

// to = from kernel + bias
struct Projection {
  int64_t width;  // H
  int64_t units;
  const float* from;    // [N, H]
  const float* kernel;  // [H, Padded(units)]
  const float* bias;    // [Padded(units)]
  float* to;            // [N, Padded(units)]
};

struct ProjectionGradient {
  int64_t width;
  int64_t units;
  const float* from;
  const float* of_to;
  const float* transposed_kernel;  // [units, Padded(H)]
  float* of_from;                  // [N, H], which is added to
};

// x = (q * k) kernel + by_candidate[q] + by_key[k] + by_side[s]
struct First {
  Pairs pairs;
  int64_t width;  // H, the width of candidates and keys
  int64_t units;
  const float* candidate;     // [C, H]
  const float* keys;          // [K, H]
  const float* kernel;        // [H, Padded(units)]
  const float* by_candidate;  // [C, Padded(units)]
  const float* by_key;        // [K, Padded(units)]
  const float* by_side;       // [T, Padded(units)]
  const float* centre;        // [Padded(units)], subtracted before the sums are taken
  float* x;                   // [P, Padded(units)]
};

struct FirstGradient {
  Pairs pairs;
  int64_t width;
  int64_t side_width;    // S, the width of sides
  Statistics statistics;  // of x
  const float* candidate;
  const float* keys;
  const float* x;                  // [P, Padded(units)]
  const float* held;               // the gradient with respect to x, statistics constant, as large as x
  const float* transposed_kernel;  // [units, Padded(H)]
  // The pooling's part of the keys' gradient is added in the same pass, because the keys are in the cache.
  const float* weights;      // [P]
  const float* of_interest;  // [C, H + S]
  float* of_candidate;       // [C, H], 0 at first
  float* of_by_candidate;    // [C, Padded(units)], 0 at first
};

// What a shard of FirstGradient adds to.
struct FirstGradientSums {
  float* of_kernel;   // [H, Padded(units)]
  float* of_keys;     // [K, H]
  float* of_by_key;   // [K, Padded(units)]
  float* of_sides;    // [T, S]
  float* of_by_side;  // [T, Padded(units)]
};

// next = (gate(x) * factors) kernel + bias
struct Dense {
  int64_t num_pairs;
  Gate gate;
  int64_t units;
  const float* x;
  const float* factors;  // dropout factors, [P, Padded(width)]; null: all are 1
  const float* kernel;   // [width, Padded(units)]
  const float* bias;     // [Padded(units)]
  const float* centre;   // [Padded(units)]
  float* next;           // [P, Padded(units)]
};

struct DenseGradient {
  int64_t num_pairs;
  Gate gate;  // the gate of x
  Statistics statistics;  // the statistics of next
  const float* x;
  const float* factors;
  const float* next;
  const float* held_of_next;       // as `held` of FirstGradient
  const float* transposed_kernel;  // [units, Padded(width)]
  float* held;                     // [P, Padded(width)]
};

// interest = sum over a candidate's pairs of weight * [key, side]; the weights come from the scores
// gate(x) output + bias
struct Pool {
  Pairs pairs;
  int64_t width;
  int64_t side_width;
  Gate gate;
  bool softmax;
  float divisor;  // the scores are divided by it
  const float* x;
  const float* output;  // [Padded(gate.width)]
  float bias;
  const float* keys;   // [K, H]
  const float* sides;  // [T, S]
  float* interest;     // [C, H + S], 0 at first
  float* weights;      // [P]
};

struct PoolGradient {
  Pairs pairs;
  int64_t width;
  int64_t side_width;
  Gate gate;
  bool softmax;
  float divisor;
  const float* x;
  const float* output;
  const float* keys;
  const float* sides;
  const float* weights;
  const float* of_interest;  // [C, H + S]
  float* of_scores;          // [P], scratch
  float* held;               // as in FirstGradient, [P, Padded(gate.width)]
};

// A normalising layer by itself, whose rows [M, width] are dense.
struct Normalised {
  int64_t num_rows;
  int64_t width;
  const float* x;
  const float* centre;  // [Padded(width)]
};

struct NormalisedGradient {
  int64_t num_rows;
  Statistics statistics;
  const float* x;
  const float* held;
  float* of_x;
};

// The passes for one instruction set, over the pairs [begin, end). Sums are added to. `scratch` has `ScratchFloats`
// floats.
struct Passes {
  void (*project)(const Projection&, int64_t begin, int64_t end, float* scratch);
  // of_kernel: [H, Padded(units)]
  void (*project_gradient)(const ProjectionGradient&, int64_t begin, int64_t end, float* of_kernel, double* of_bias,
                           float* scratch);
  // sums: [2, Padded(units)] of x - centre and its square
  void (*first)(const First&, int64_t begin, int64_t end, double* sums, float* scratch);
  void (*first_gradient)(const FirstGradient&, int64_t begin, int64_t end, const FirstGradientSums& sums,
                         float* scratch);
  void (*dense)(const Dense&, int64_t begin, int64_t end, double* sums, float* scratch);
  // sums: [4, Padded(width)], the gradients with respect to n, the same times n, and those of alpha and of beta
  void (*dense_gradient)(const DenseGradient&, int64_t begin, int64_t end, float* of_kernel, double* of_bias,
                         double* sums, float* scratch);
  void (*pool)(const Pool&, int64_t begin, int64_t end, float* scratch);
  // of_output: [Padded(width) + 1], the bias last; sums: the first three rows of those of dense_gradient
  void (*pool_gradient)(const PoolGradient&, int64_t begin, int64_t end, double* of_output, double* sums,
                        float* scratch);
  void (*sums_about)(const Normalised&, int64_t begin, int64_t end, double* sums, float* scratch);
  void (*normalised_gradient)(const NormalisedGradient&, int64_t begin, int64_t end, float* scratch);
};

constexpr int64_t kTile = 64;  // pairs that are processed together

// Returns the floats of scratch that layers need, the widest of which has `widest` columns.
inline int64_t ScratchFloats(int64_t widest) { return 5 * kTile * Padded(widest) + 8 * Padded(widest); }

namespace amx {  // multiplies matrices in bfloat16, in tiles
extern const Passes kPasses;
}
namespace avx512_bf16 {  // multiplies matrices in bfloat16
extern const Passes kPasses;
}
namespace avx512 {
extern const Passes kPasses;
}
namespace avx2 {
extern const Passes kPasses;
}
namespace plain {
extern const Passes kPasses;
}

}  // namespace din
