// Sums and gathers over the workers of one machine through memory that they share, as TensorFlow operations. Called by
// distributed/neighbours.py alone, which makes the memory and lets no two run at once, nor in another order elsewhere.
//
// The memory begins with two lines of 64 bytes for each worker: its process id, and how many turns it has taken. Then
// come two times a buffer for each. Two are enough: a worker begins its next turn but one only when all have ended this
// one. A message that is longer than a buffer takes several turns.
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "tensorflow.h"

namespace din {
namespace {

constexpr int64_t kLine = 64;  // bytes; no two workers write to one
constexpr double kSpinSeconds = 2e-3, kLookSeconds = 0.01, kSaySeconds = 60;

std::string Name(int64_t rank, int64_t process) {
  return "the Horovod worker of rank " + std::to_string(rank) + " (process " + std::to_string(process) + ")";
}

// Where the workers meet.
class Place {
 public:
  explicit Place(TF_OpKernelConstruction* construction)
      : buffer_(Attribute(construction, "buffer")),
        rank_(Attribute(construction, "rank")),
        num_ranks_(Attribute(construction, "num_ranks")),
        bytes_(2 * num_ranks_ * (kLine + buffer_)),
        processes_(num_ranks_, -1) {
    Require(buffer_ > 0 && buffer_ % kLine == 0, "a buffer must be of whole lines");
    const int file = static_cast<int>(Attribute(construction, "fd"));
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) throw std::invalid_argument(std::string("shared memory: ") + std::strerror(errno));
    memory_ = static_cast<char*>(memory);
  }

  ~Place() {
    for (int process : processes_) {
      if (process >= 0) close(process);
    }
    munmap(memory_, bytes_);
  }

  int64_t rank() const { return rank_; }
  int64_t num_ranks() const { return num_ranks_; }
  int64_t buffer() const { return buffer_; }

  // A rank's, of this turn: to be written before `Meet` by its owner, and read by all after it.
  char* Buffer(int64_t rank) const {
    return memory_ + 2 * num_ranks_ * kLine + (turn_ % 2 * num_ranks_ + rank) * buffer_;
  }

  void BeginTurn() { turn_ = Turns(rank_).load(std::memory_order_relaxed) + 1; }

  // Returns when all have come here in this turn.
  void Meet() {
    Turns(rank_).store(turn_, std::memory_order_release);
    for (int64_t rank = 0; rank < num_ranks_; ++rank) {
      if (rank != rank_) Wait(rank);
    }
  }

 private:
  std::atomic<int64_t>& Turns(int64_t rank) const {
    return *reinterpret_cast<std::atomic<int64_t>*>(memory_ + (num_ranks_ + rank) * kLine);
  }

  // Until `rank` has come to this turn. Most waits are shorter than to sleep and be woken.
  void Wait(int64_t rank) {
    const auto begin = std::chrono::steady_clock::now();
    double looked = 0, said = 0;
    for (int64_t time = 1; Turns(rank).load(std::memory_order_acquire) < turn_; ++time) {
      if (time % 64) {
        Pause();
        continue;
      }
      const double waited = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
      if (waited < kSpinSeconds) {
        sched_yield();  // to another of this process' threads, or to a worker on the same core
        continue;
      }
      usleep(100);
      if (waited - looked < kLookSeconds) continue;
      looked = waited;
      // It may have come, and ended, just before.
      if (Ended(rank) && Turns(rank).load(std::memory_order_acquire) < turn_) {
        throw std::runtime_error(Name(rank, Process(rank)) + " ended in the middle of an update");
      }
      if (waited - said >= kSaySeconds) {
        said = waited;
        fprintf(stderr, "din_dist: rank %d has waited %.0f s for %s\n", static_cast<int>(rank_), waited,
                Name(rank, Process(rank)).c_str());
      }
    }
  }

  static void Pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  int64_t Process(int64_t rank) const {
    int64_t process;
    std::memcpy(&process, memory_ + rank * kLine, sizeof process);
    return process;
  }

  // Whether a worker's process has ended, even if nobody has taken note of it yet.
  bool Ended(int64_t rank) {
    int& process = processes_[rank];
    if (process < 0) {
      process = static_cast<int>(syscall(SYS_pidfd_open, Process(rank), 0));
      if (process < 0) return kill(static_cast<pid_t>(Process(rank)), 0) != 0 && errno == ESRCH;  // may be forbidden
    }
    pollfd ended{process, POLLIN, 0};
    return poll(&ended, 1, 0) > 0;
  }

  const int64_t buffer_, rank_, num_ranks_, bytes_;
  std::vector<int> processes_;  // file descriptors, -1 as long as nobody had to ask
  int64_t turn_ = 0;
  char* memory_;
};

// --- The operations ---

// In the order of the ranks, and so the same to the last bit on all of them.
class Sum {
 public:
  explicit Sum(TF_OpKernelConstruction* construction) : place_(construction) {}

  void Compute(TF_OpKernelContext* context) {
    const Tensor values = Tensor::Input(context, 0);
    const int64_t length = values.Size(), most = place_.buffer() / sizeof(float);
    const Tensor sums = Tensor::Output(context, 0, TF_FLOAT, {length});
    for (int64_t begin = 0; begin < length; begin += most) {
      const int64_t size = std::min(most, length - begin);
      place_.BeginTurn();
      std::memcpy(place_.Buffer(place_.rank()), values.Data<float>() + begin, size * sizeof(float));
      place_.Meet();
      float* to = sums.Data<float>() + begin;
      std::memcpy(to, place_.Buffer(0), size * sizeof(float));
      for (int64_t rank = 1; rank < place_.num_ranks(); ++rank) {
        const float* from = reinterpret_cast<const float*>(place_.Buffer(rank));
        for (int64_t i = 0; i < size; ++i) to[i] += from[i];
      }
    }
  }

 private:
  Place place_;
};

// Of each of some tensors, the rows of all ranks, in the order of the ranks. A rank's message is the sizes of its
// tensors, then one tensor after the other.
class Gather {
 public:
  explicit Gather(TF_OpKernelConstruction* construction) : place_(construction), count_(Attribute(construction, "N")) {
    Require(count_ * 8 <= place_.buffer(), "the sizes of what is gathered must fit the buffer");
  }

  void Compute(TF_OpKernelContext* context) {
    const int64_t ranks = place_.num_ranks(), header = count_ * 8;
    std::vector<Tensor> own, gathered;
    std::vector<int64_t> sizes(ranks * count_);  // bytes of each rank's tensors
    for (int64_t i = 0; i < count_; ++i) own.push_back(Tensor::Input(context, i));
    int64_t longest = 0;
    for (int64_t begin = 0; begin == 0 || begin < longest; begin += place_.buffer()) {
      place_.BeginTurn();
      char* buffer = place_.Buffer(place_.rank());
      for (int64_t i = 0, at = header; i < count_; at += own[i++].Bytes()) {
        const int64_t size = own[i].Bytes();
        if (begin == 0) std::memcpy(buffer + i * 8, &size, 8);
        const Part part = Overlap(at, size, begin);
        if (part.size > 0) std::memcpy(buffer + part.in_buffer, own[i].Data<char>() + part.in_tensor, part.size);
      }
      place_.Meet();
      if (begin == 0) {
        for (int64_t rank = 0; rank < ranks; ++rank) {
          int64_t* theirs = sizes.data() + rank * count_;
          std::memcpy(theirs, place_.Buffer(rank), header);
          longest = std::max(longest, std::accumulate(theirs, theirs + count_, header));
        }
        for (int64_t i = 0; i < count_; ++i) gathered.push_back(Allocate(context, i, own[i], sizes));
      }
      std::vector<int64_t> to(count_, 0);
      for (int64_t rank = 0; rank < ranks; ++rank) {
        for (int64_t i = 0, at = header; i < count_; ++i) {
          const int64_t size = sizes[rank * count_ + i];
          const Part part = Overlap(at, size, begin);
          if (part.size > 0) {
            std::memcpy(gathered[i].Data<char>() + to[i] + part.in_tensor, place_.Buffer(rank) + part.in_buffer,
                        part.size);
          }
          to[i] += size;
          at += size;
        }
      }
    }
  }

 private:
  struct Part {
    int64_t in_tensor, in_buffer, size;
  };

  // Of a tensor that begins at byte `at` of its message, what is in the buffer when that holds the bytes from `begin`.
  Part Overlap(int64_t at, int64_t size, int64_t begin) const {
    const int64_t from = std::max(at, begin);
    return {from - at, from - begin, std::min(at + size, begin + place_.buffer()) - from};
  }

  // For the rows of all ranks.
  Tensor Allocate(TF_OpKernelContext* context, int64_t i, const Tensor& own, const std::vector<int64_t>& sizes) const {
    std::vector<int64_t> shape = own.Shape();
    int64_t row = TF_DataTypeSize(own.Type()), total = 0;
    for (size_t axis = 1; axis < shape.size(); ++axis) row *= shape[axis];
    for (size_t at = i; at < sizes.size(); at += count_) total += sizes[at];
    Require(!shape.empty() && row > 0 && total % row == 0, "what is gathered must be rows");
    shape[0] = total / row;
    return Tensor::Output(context, i, own.Type(), shape);
  }

  Place place_;
  const int64_t count_;
};

template <typename Operation>
bool Register(const char* name, const char* input, const char* output, std::vector<const char*> attributes) {
  for (const char* attribute : {"fd: int", "buffer: int", "rank: int", "num_ranks: int"}) {
    attributes.push_back(attribute);
  }
  return Kernel<Operation>::Register(name, {input}, {output}, attributes, true);
}

const bool kRegistered = Register<Sum>("DinDistNeighboursSum", "values: float", "sums: float", {}) &&
                         Register<Gather>("DinDistNeighboursGather", "tensors: N * T", "gathered: N * T",
                                          {"N: int", "T: {float, int32}"});

}  // namespace
}  // namespace din
