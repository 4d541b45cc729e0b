// The local activation unit's passes over the pairs of a batch, each pair a candidate and a behaviour of its history;
// and those of layers that normalise, over rows of any kind.
//
// Every array of values per pair, [P, W], has its rows padded to `Padded(W)` floats; the padding is 0 in all of them.
// All others are dense. Passes run in shards; a shard has whole candidates where the pass sums by candidate.
#pragma once

#include <cstdint>

namespace din {

constexpr int64_t kLane = 16;

inline int64_t Padded(int64_t width) { return (width + kLane - 1) / kLane * kLane; }

// As `ACTIVATIONS` in kernels/__init__.py counts them. kScaled is what batch normalisation ends with: alpha n + beta.
enum Activation : int32_t { kDice = 0, kPRelu = 1, kSigmoid = 2, kRelu = 3, kScaled = 4 };

// An activation of `width` columns, and what its gradient takes. Arrays of `Padded(width)`, 0 in the padding.
struct Gate {
  Activation activation;
  int64_t width;
  const float* mean;
  const float* scale;  // one over the standard deviation
  const float* alpha;
  const float* beta;  // of kScaled only
};

// How the statistics of `width` columns of x depend on x: what its gradient takes once that of each x with the
// statistics held is known. Arrays likewise.
struct Statistics {
  int64_t width;
  const float* mean;
  const float* scale;
  // Means over the global batch of the gradient of n, the standardised input, and of that times n.
  const float* mean_of_gradient;
  const float* mean_of_product;
};

struct Pairs {
  int64_t count;
  int64_t num_candidates;
  int64_t num_keys;
  const int32_t* candidate_of;  // ascends
  const int32_t* key_of;
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
  float* of_from;                  // [N, H], added to
};

// x = (q * k) kernel + by_candidate[q] + by_key[k]
struct First {
  Pairs pairs;
  int64_t width;  // H, of candidates and keys
  int64_t units;
  const float* candidate;     // [C, H]
  const float* keys;          // [K, H]
  const float* kernel;        // [H, Padded(units)]
  const float* by_candidate;  // [C, Padded(units)]
  const float* by_key;        // [K, Padded(units)]
  const float* centre;        // [Padded(units)], about which the sums are taken
  float* x;                   // [P, Padded(units)]
};

struct FirstGradient {
  Pairs pairs;
  int64_t width;
  Statistics statistics;  // of x
  const float* candidate;
  const float* keys;
  const float* x;                  // [P, Padded(units)]
  const float* held;               // the gradient of x with its statistics held, as large
  const float* transposed_kernel;  // [units, Padded(H)]
  // What the keys get as what is pooled, here, where they are at hand.
  const float* weights;      // [P]
  const float* of_interest;  // [C, H]
  float* of_candidate;       // [C, H], 0 at first
  float* of_by_candidate;    // [C, Padded(units)], 0 at first
};

// next = (gate(x) * factors) kernel + bias
struct Dense {
  int64_t num_pairs;
  Gate gate;
  int64_t units;
  const float* x;
  const float* factors;  // of dropout, [P, Padded(width)]; null: all are 1
  const float* kernel;   // [width, Padded(units)]
  const float* bias;     // [Padded(units)]
  const float* centre;   // [Padded(units)]
  float* next;           // [P, Padded(units)]
};

struct DenseGradient {
  int64_t num_pairs;
  Gate gate;  // of x
  Statistics statistics;  // of next
  const float* x;
  const float* factors;
  const float* next;
  const float* held_of_next;       // as of FirstGradient
  const float* transposed_kernel;  // [units, Padded(width)]
  float* held;                     // [P, Padded(width)]
};

// interest = sum over a candidate's pairs of weight * key; weights of the scores gate(x) output + bias
struct Pool {
  Pairs pairs;
  int64_t width;
  Gate gate;
  bool softmax;
  float divisor;  // of the scores
  const float* x;
  const float* output;  // [Padded(gate.width)]
  float bias;
  const float* keys;  // [K, H]
  float* interest;    // [C, H], 0 at first
  float* weights;     // [P]
};

struct PoolGradient {
  Pairs pairs;
  int64_t width;
  Gate gate;
  bool softmax;
  float divisor;
  const float* x;
  const float* output;
  const float* keys;
  const float* weights;
  const float* of_interest;  // [C, H]
  float* of_scores;          // [P], scratch
  float* held;               // as of FirstGradient, [P, Padded(gate.width)]
};

// A layer of its own, whose rows [M, width] are dense.
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

// The passes for one instruction set, over the pairs [begin, end). Sums are added to; `scratch` as long as needed.
struct Passes {
  void (*project)(const Projection&, int64_t begin, int64_t end, float* scratch);
  // of_kernel: [H, Padded(units)]
  void (*project_gradient)(const ProjectionGradient&, int64_t begin, int64_t end, float* of_kernel, double* of_bias,
                           float* scratch);
  // sums: [2, Padded(units)] of x - centre and its square
  void (*first)(const First&, int64_t begin, int64_t end, double* sums, float* scratch);
  // of_kernel: [H, Padded(units)]; of_keys: [K, H]; of_by_key: [K, Padded(units)]
  void (*first_gradient)(const FirstGradient&, int64_t begin, int64_t end, float* of_kernel, float* of_keys,
                         float* of_by_key, float* scratch);
  void (*dense)(const Dense&, int64_t begin, int64_t end, double* sums, float* scratch);
  // sums: [4, Padded(width)]: of the gradient of n, of that times n, of alpha, of beta
  void (*dense_gradient)(const DenseGradient&, int64_t begin, int64_t end, float* of_kernel, double* of_bias,
                         double* sums, float* scratch);
  void (*pool)(const Pool&, int64_t begin, int64_t end, float* scratch);
  // of_output: [Padded(width) + 1], the bias' last; sums: the first three of dense_gradient's
  void (*pool_gradient)(const PoolGradient&, int64_t begin, int64_t end, double* of_output, double* sums,
                        float* scratch);
  void (*sums_about)(const Normalised&, int64_t begin, int64_t end, double* sums, float* scratch);
  void (*normalised_gradient)(const NormalisedGradient&, int64_t begin, int64_t end, float* scratch);
};

constexpr int64_t kTile = 64;  // pairs that are worked on together

// Floats of scratch for layers up to so wide.
inline int64_t ScratchFloats(int64_t widest) { return 4 * kTile * Padded(widest) + 8 * Padded(widest); }

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
