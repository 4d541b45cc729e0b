// Collective operations among the workers of one machine through shared memory, as TensorFlow operations. Only
// distributed/shared_memory.py calls them. It allocates the memory, and it runs one operation at a time, in the same
// order on all workers.
//
// The memory begins with two lines of 64 bytes for each worker: its process id, and the number of turns that it has
// taken. Two buffers for each worker follow. Two are enough, because a worker reuses a buffer only after all workers
// have ended the turn in which it was read. A message that is longer than a buffer takes several turns.
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

#include "distinct.h"
#include "tensorflow.h"
#include "variables.h"

namespace din {
namespace {

constexpr int64_t kLine = 64;  // bytes; no two workers write to the same line
constexpr double kSpinSeconds = 2e-3, kLookSeconds = 0.01, kSaySeconds = 60;

std::string Name(int64_t rank, int64_t process) {
  return "the Horovod worker of rank " + std::to_string(rank) + " (process " + std::to_string(process) + ")";
}

// The shared memory, with barriers and exchanges among its workers.
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

  // Gathers numbers of all ranks, equally many from each, in the order of the ranks. Takes one turn.
  std::vector<int64_t> All(const std::vector<int64_t>& own) {
    const auto size = static_cast<int64_t>(own.size());
    Require(size * 8 <= buffer_, "what ranks say at once must fit the buffer");
    BeginTurn();
    std::memcpy(Buffer(rank_), own.data(), size * 8);
    Meet();
    std::vector<int64_t> all(num_ranks_ * size);
    for (int64_t rank = 0; rank < num_ranks_; ++rank) std::memcpy(all.data() + rank * size, Buffer(rank), size * 8);
    return all;
  }

  // Sends words of 4 bytes from each rank to each other rank. `sizes[from * num_ranks + to]` is the number of words,
  // and equal on all ranks. `write(to, memory, begin, count)` copies some of them to memory, `read(from, memory, begin,
  // count)` copies them out. Both are called in order from the first word to the last.
  template <typename Write, typename Read>
  void Tell(const std::vector<int64_t>& sizes, const Write& write, const Read& read) {
    if (num_ranks_ == 1) return;
    const int64_t section = buffer_ / 4 / (num_ranks_ - 1);  // words of a buffer for each of the other ranks
    Require(section > 0, "a word for each rank must fit the buffer");
    int64_t longest = 0;
    for (int64_t from = 0; from < num_ranks_; ++from) {
      for (int64_t to = 0; to < num_ranks_; ++to) {
        if (from != to) longest = std::max(longest, sizes[from * num_ranks_ + to]);
      }
    }
    for (int64_t begin = 0; begin < longest; begin += section) {
      // The number of words in this turn, and their address in the buffer of `from`.
      const auto count = [&](int64_t from, int64_t to) {
        return from == to ? 0 : std::min(section, sizes[from * num_ranks_ + to] - begin);
      };
      const auto memory = [&](int64_t from, int64_t to) { return Buffer(from) + (to - (to > from)) * section * 4; };
      BeginTurn();
      for (int64_t to = 0; to < num_ranks_; ++to) {
        if (count(rank_, to) > 0) write(to, memory(rank_, to), begin, count(rank_, to));
      }
      Meet();
      for (int64_t from = 0; from < num_ranks_; ++from) {
        if (count(from, rank_) > 0) read(from, memory(from, rank_), begin, count(from, rank_));
      }
    }
  }

  int64_t rank() const { return rank_; }
  int64_t num_ranks() const { return num_ranks_; }
  int64_t buffer() const { return buffer_; }

  // Returns a rank's buffer of this turn. Its owner writes it before `Meet`, and all ranks read it afterwards.
  char* Buffer(int64_t rank) const {
    return memory_ + 2 * num_ranks_ * kLine + (turn_ % 2 * num_ranks_ + rank) * buffer_;
  }

  void BeginTurn() { turn_ = Turns(rank_).load(std::memory_order_relaxed) + 1; }

  // Waits until all ranks have reached this turn.
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

  // Waits until `rank` has reached this turn. It spins first, because most waits are shorter than a sleep and a
  // wake-up.
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
        sched_yield();  // gives way to another thread of this process, or to a worker on the same core
        continue;
      }
      usleep(100);
      if (waited - looked < kLookSeconds) continue;
      looked = waited;
      // The worker may have reached the turn, and then ended, just before.
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

  // Tells if a worker's process has ended, even if its parent has not reaped it yet.
  bool Ended(int64_t rank) {
    int& process = processes_[rank];
    if (process < 0) {
      process = static_cast<int>(syscall(SYS_pidfd_open, Process(rank), 0));
      if (process < 0) return kill(static_cast<pid_t>(Process(rank)), 0) != 0 && errno == ESRCH;  // if forbidden
    }
    pollfd ended{process, POLLIN, 0};
    return poll(&ended, 1, 0) > 0;
  }

  const int64_t buffer_, rank_, num_ranks_, bytes_;
  std::vector<int> processes_;  // file descriptors of the processes, -1 until they are needed
  int64_t turn_ = 0;
  char* memory_;
};

// --- The operations ---

// Sums in the order of the ranks, so that all ranks get the same bits.
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

// Gathers the rows of several tensors from all ranks, in the order of the ranks. A rank's message has the sizes of its
// tensors, and then the tensors.
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

  // Returns the overlap of the buffer, which holds the message's bytes from `begin` on, with a tensor at byte `at`.
  Part Overlap(int64_t at, int64_t size, int64_t begin) const {
    const int64_t from = std::max(at, begin);
    return {from - at, from - begin, std::min(at + size, begin + place_.buffer()) - from};
  }

  // Allocates an output for the rows of all ranks.
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

// A reduce-scatter of rows of N tables: each rank gets the sums of the rows that it owns. The outputs are the ids and
// the sums for each table, and for each table the number of rows that any rank has.
class ReduceRows {
 public:
  explicit ReduceRows(TF_OpKernelConstruction* construction)
      : place_(construction), count_(Attribute(construction, "N")), ranks_(place_.num_ranks()) {}

  void Compute(TF_OpKernelContext* context) {
    const int64_t me = place_.rank();
    std::vector<Tensor> ids, rows;
    for (int64_t i = 0; i < 2 * count_; ++i) (i < count_ ? ids : rows).push_back(Tensor::Input(context, i));
    std::vector<int64_t> widths;
    std::vector<std::vector<int32_t>> mine(ranks_ * count_);  // by rank and table, the indices of rows to send
    for (int64_t i = 0; i < count_; ++i) {
      const std::vector<int64_t> shape = rows[i].Shape();
      Require(shape.size() == 2 && shape[0] == ids[i].Size(), "there must be an id for each row");
      widths.push_back(shape[1]);
      for (int64_t row = 0; row < shape[0]; ++row) {
        const int32_t id = ids[i].Data<const int32_t>()[row];
        Require(id >= 0, "rows must be those of a table");
        mine[id / kBlock % ranks_ * count_ + i].push_back(static_cast<int32_t>(row));
      }
    }
    std::vector<int64_t> own_counts;
    for (const auto& places : mine) own_counts.push_back(static_cast<int64_t>(places.size()));
    const std::vector<int64_t> counts = place_.All(own_counts);  // [from, to, table]
    const auto count = [&](int64_t from, int64_t to) { return counts.data() + (from * ranks_ + to) * count_; };

    // The ids of all rows that this rank receives, its own first.
    std::vector<int64_t> id_sizes(ranks_ * ranks_), row_sizes(ranks_ * ranks_);
    for (int64_t from = 0; from < ranks_; ++from) {
      for (int64_t to = 0; to < ranks_; ++to) {
        const int64_t pair = from * ranks_ + to;
        id_sizes[pair] = std::accumulate(count(from, to), count(from, to) + count_, int64_t{0});
        row_sizes[pair] = std::inner_product(count(from, to), count(from, to) + count_, widths.data(), int64_t{0});
      }
    }
    std::vector<std::vector<int32_t>> told(ranks_), heard(ranks_);
    for (int64_t rank = 0; rank < ranks_; ++rank) {
      for (int64_t i = 0; i < count_; ++i) {
        for (const int32_t row : mine[rank * count_ + i]) told[rank].push_back(ids[i].Data<const int32_t>()[row]);
      }
      heard[rank].resize(id_sizes[rank * ranks_ + me]);
    }
    heard[me] = told[me];
    place_.Tell(
        id_sizes,
        [&](int64_t to, char* memory, int64_t begin, int64_t size) {
          std::memcpy(memory, told[to].data() + begin, size * 4);
        },
        [&](int64_t from, const char* memory, int64_t begin, int64_t size) {
          std::memcpy(heard[from].data() + begin, memory, size * 4);
        });

    std::vector<std::vector<int32_t>> places(ranks_ * count_);  // by rank and table, the indices of their sums
    std::vector<Tensor> sums;
    std::vector<int64_t> num_distinct;
    std::vector<int64_t> read(ranks_, 0);
    for (int64_t i = 0; i < count_; ++i) {
      std::vector<int32_t> all;
      const auto each = [&](const auto& work) {
        work(me);
        for (int64_t rank = 0; rank < ranks_; ++rank) {
          if (rank != me) work(rank);
        }
      };
      each([&](int64_t from) {
        const auto begin = heard[from].begin() + read[from];
        all.insert(all.end(), begin, begin + count(from, me)[i]);
        read[from] += count(from, me)[i];
      });
      const Distinct distinct(all.data(), static_cast<int64_t>(all.size()));
      for (int64_t own = 0; own < count(me, me)[i]; ++own) {
        Require(distinct.is_first[own], "a rank must name no row twice");
      }
      auto place = distinct.places.begin();
      each([&](int64_t from) {
        places[from * count_ + i].assign(place, place + count(from, me)[i]);
        place += count(from, me)[i];
      });
      num_distinct.push_back(static_cast<int64_t>(distinct.ids.size()));
      const Tensor summed_ids = Tensor::Output(context, static_cast<int>(i), TF_INT32, {num_distinct[i]});
      std::copy(distinct.ids.begin(), distinct.ids.end(), summed_ids.Data<int32_t>());
      sums.push_back(Tensor::Output(context, static_cast<int>(count_ + i), TF_FLOAT, {num_distinct[i], widths[i]}));
      float* to = sums[i].Data<float>();
      for (const int32_t row : mine[me * count_ + i]) {  // in the order of their sums
        to = std::copy_n(rows[i].Data<const float>() + row * widths[i], widths[i], to);
      }
      std::fill(to, sums[i].Data<float>() + sums[i].Size(), 0.0f);
    }
    std::vector<Cursor> writing(ranks_), reading(ranks_);
    place_.Tell(
        row_sizes,
        [&](int64_t to, char* memory, int64_t, int64_t size) {
          float* words = reinterpret_cast<float*>(memory);
          writing[to].Walk(size, count(me, to), widths, [&](int64_t i, int64_t row, int64_t column, int64_t length) {
            const int64_t at = mine[to * count_ + i][row] * widths[i] + column;
            words = std::copy_n(rows[i].Data<const float>() + at, length, words);
          });
        },
        [&](int64_t from, const char* memory, int64_t, int64_t size) {
          const float* words = reinterpret_cast<const float*>(memory);
          reading[from].Walk(size, count(from, me), widths, [&](int64_t i, int64_t row, int64_t column, int64_t length) {
            float* const sum = sums[i].Data<float>() + places[from * count_ + i][row] * widths[i] + column;
            for (int64_t word = 0; word < length; ++word) sum[word] += words[word];
            words += length;
          });
        });

    const std::vector<int64_t> of_all = place_.All(num_distinct);
    const Tensor totals = Tensor::Output(context, static_cast<int>(2 * count_), TF_INT32, {count_});
    for (int64_t i = 0; i < count_; ++i) {
      int64_t total = 0;
      for (int64_t rank = 0; rank < ranks_; ++rank) total += of_all[rank * count_ + i];
      totals.Data<int32_t>()[i] = static_cast<int32_t>(total);
    }
  }

 private:
  static constexpr int64_t kBlock = 16;  // rows in sequence with one owner; the narrowest have 4 bytes, a line has 64

  // A position in the rows of several tables, one table after the other.
  struct Cursor {
    int64_t table = 0, row = 0, column = 0;

    // Advances by `size` numbers, and calls `work` for each piece of a row.
    template <typename Work>
    void Walk(int64_t size, const int64_t* num_rows, const std::vector<int64_t>& widths, const Work& work) {
      while (size > 0) {
        if (row == num_rows[table]) {
          ++table;
          row = column = 0;
          continue;
        }
        const int64_t length = std::min(size, widths[table] - column);
        work(table, row, column, length);
        size -= length;
        column += length;
        if (column == widths[table]) {
          ++row;
          column = 0;
        }
      }
    }
  };

  Place place_;
  const int64_t count_, ranks_;
};

// A fence: returns when all ranks have finished their changes of variables, which must be in shared memory.
class Finish {
 public:
  explicit Finish(TF_OpKernelConstruction* construction) : place_(construction), count_(Attribute(construction, "N")) {}

  void Compute(TF_OpKernelContext* context) {
    for (const Variable& variable : Variable::Hold(context, 0, count_, Variable::For::kReading)) {
      Require(variable.IsShared(), "tables that ranks update for each other must stay in the memory that they share");
    }
    place_.BeginTurn();
    place_.Meet();
  }

 private:
  Place place_;
  const int64_t count_;
};

class Share {
 public:
  explicit Share(TF_OpKernelConstruction* construction)
      : file_(static_cast<int>(Attribute(construction, "fd"))), fill_(Attribute(construction, "fill") != 0) {}

  void Compute(TF_OpKernelContext* context) {
    Variable::Hold(context, 0, 1, Variable::For::kWriting)[0].MoveInto(file_, fill_);
  }

 private:
  const int file_;
  const bool fill_;
};

template <typename Operation>
bool Register(const char* name, const std::vector<const char*>& inputs, const std::vector<const char*>& outputs,
              std::vector<const char*> attributes) {
  for (const char* attribute : {"fd: int", "buffer: int", "rank: int", "num_ranks: int"}) {
    attributes.push_back(attribute);
  }
  return Kernel<Operation>::Register(name, inputs, outputs, attributes, true);
}

const bool kRegistered =
    Register<Sum>("DinDistNeighboursSum", {"values: float"}, {"sums: float"}, {}) &&
    Register<Gather>("DinDistNeighboursGather", {"tensors: N * T"}, {"gathered: N * T"},
                     {"N: int", "T: {float, int32}"}) &&
    Register<ReduceRows>("DinDistNeighboursReduceRows", {"row_ids: N * int32", "rows: N * float"},
                         {"summed_ids: N * int32", "sums: N * float", "num_rows: int32"}, {"N: int"}) &&
    Register<Finish>("DinDistNeighboursFinish", {"variables: N * resource"}, {}, {"N: int"}) &&
    Kernel<Share>::Register("DinDistShare", {"variable: resource"}, {}, {"fd: int", "fill: int"}, true);

}  // namespace
}  // namespace din
