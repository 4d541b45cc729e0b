// For Gloo's allreduce.cc: all-reduces of few bytes, whose time is that of the steps between two ranks, in log2(N) of them
// where a ring takes 2 (N - 1).
//
// Source: Thakur, Rabenseifner, Gropp, Optimization of collective communication operations in MPICH, 2005, section 4.5.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "gloo/allreduce.h"
#include "gloo/common/logging.h"
#include "gloo/types.h"

namespace gloo {

// Of more a ring sends fewer: each rank sends all of it in each step here.
constexpr size_t kMostBytesToDouble = 16384;

inline void recursiveDoubling(
    const detail::AllreduceOptionsImpl& opts,
    const std::function<void(size_t, size_t)>& reduceInputs,
    const std::function<void(size_t, size_t)>& broadcastOutputs) {
  const auto& context = opts.context;
  transport::UnboundBuffer* out = opts.out[0].get();
  const auto slot = Slot::build(kAllreduceSlotPrefix, opts.tag);
  const size_t bytes = opts.elements * opts.elementSize;
  const int rank = context->rank;
  int doubling = 1; // ranks that double: a power of two
  while (2 * doubling <= context->size) doubling *= 2;
  const bool helps = rank + doubling < context->size; // one of the others

  reduceInputs(0, bytes);
  const auto wait = [&](transport::UnboundBuffer* sent, transport::UnboundBuffer* received) {
    if (sent) GLOO_ENFORCE(sent->waitSend(opts.timeout), "a send was aborted");
    if (received) GLOO_ENFORCE(received->waitRecv(opts.timeout), "a receive was aborted");
  };
  if (rank >= doubling) {
    out->send(rank - doubling, slot, 0, bytes);
    wait(out, nullptr);
    out->recv(rank - doubling, slot, 0, bytes);
    wait(nullptr, out);
    broadcastOutputs(0, bytes);
    return;
  }
  const std::unique_ptr<uint8_t[]> memory(new uint8_t[bytes]);
  const auto others = context->createUnboundBuffer(memory.get(), bytes);
  const auto reduce = [&](int peer) { // the lower rank's part first, so that all ranks come to the same bits
    const bool below = peer < rank;
    opts.reduce(out->ptr, below ? memory.get() : out->ptr, below ? out->ptr : memory.get(), opts.elements);
  };
  if (helps) {
    others->recv(rank + doubling, slot, 0, bytes);
    wait(nullptr, others.get());
    reduce(rank + doubling);
  }
  for (int distance = 1; distance < doubling; distance *= 2) {
    const int peer = rank ^ distance;
    others->recv(peer, slot, 0, bytes);
    out->send(peer, slot, 0, bytes);
    wait(out, others.get());
    reduce(peer);
  }
  if (helps) {
    out->send(rank + doubling, slot, 0, bytes);
    wait(out, nullptr);
  }
  broadcastOutputs(0, bytes);
}

} // namespace gloo
