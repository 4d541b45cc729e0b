// A few threads that share the shards of a pass.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace din {

class Threads {
 public:
  // Returns the threads of the process, which end with it.
  static Threads& Get() {
    static Threads* const threads = new Threads;
    return *threads;
  }

  // Runs shard(0) to shard(count - 1) on `num_threads` threads, including the calling one. If two callers overlap, the
  // second runs its shards alone. Exceptions of shards are rethrown.
  void Run(int num_threads, int count, const std::function<void(int)>& shard) {
    std::unique_lock<std::mutex> mine(busy_, std::try_to_lock);
    if (num_threads == 1 || count == 1 || !mine) {
      for (int i = 0; i < count; ++i) shard(i);
      return;
    }
    while (static_cast<int>(threads_.size()) < num_threads - 1) {
      threads_.emplace_back([this] { Work(); });
      threads_.back().detach();
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      shard_ = &shard;
      count_ = count;
      next_ = 0;
      left_ = waiting_ = count;
    }
    wake_.notify_all();
    Take();
    Spin([this] { return left_ == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return left_ == 0; });
    count_ = 0;
    if (problem_) std::rethrow_exception(std::exchange(problem_, nullptr));
  }

 private:
  // Spins for a while, because passes follow each other within tens of microseconds. Waking a thread takes longer, and
  // much longer if all cores are busy.
  template <typename Condition>
  static void Spin(const Condition& holds) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(200);
    while (!holds() && std::chrono::steady_clock::now() < until) {
    }
  }

  // Runs shards until none is left.
  void Take() {
    for (;;) {
      const std::function<void(int)>* shard;
      int mine;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (next_ >= count_) return;
        mine = next_++;
        --waiting_;
        shard = shard_;
      }
      std::exception_ptr problem;
      try {
        (*shard)(mine);
      } catch (...) {
        problem = std::current_exception();
      }
      std::lock_guard<std::mutex> lock(mutex_);
      if (problem) problem_ = problem;
      if (--left_ == 0) done_.notify_all();
    }
  }

  void Work() {
    for (;;) {
      Spin([this] { return waiting_ > 0; });
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return next_ < count_; });
      }
      Take();
    }
  }

  std::mutex busy_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* shard_ = nullptr;
  std::exception_ptr problem_;  // the exception of a shard
  int count_ = 0, next_ = 0;
  std::atomic<int> waiting_{0}, left_{0};  // shards not yet taken, and shards not yet finished
};

// Runs `part(begin, end)` over parts of [0, count), each of at least `least` numbers.
inline void InParts(int num_threads, int64_t count, int64_t least, const std::function<void(int64_t, int64_t)>& part) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(num_threads, count / least));
  Threads::Get().Run(num_threads, static_cast<int>(parts),
                     [&](int at) { part(count * at / parts, count * (at + 1) / parts); });
}

}  // namespace din
