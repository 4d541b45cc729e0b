// Memory that lasts for one call.
#pragma once

#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

namespace din {

// An uninitialised array of floats. The memory of earlier calls is reused, because the system has to clear each page
// that a process touches for the first time.
class Floats {
 public:
  explicit Floats(int64_t size) {
    if (size == 0) return;
    Pool& pool = ThePool();
    std::lock_guard<std::mutex> lock(pool.mutex);
    auto found = pool.free.lower_bound(size);
    if (found == pool.free.end() && !pool.free.empty()) pool.free.erase(std::prev(found));  // room for a larger one
    if (found == pool.free.end()) {
      size_ = size + size / 8;
      floats_.reset(new float[size_]);
    } else {
      size_ = found->first;
      floats_ = std::move(found->second);
      pool.free.erase(found);
    }
  }

  Floats(Floats&&) = default;

  ~Floats() {
    if (!floats_) return;
    Pool& pool = ThePool();
    std::lock_guard<std::mutex> lock(pool.mutex);
    pool.free.emplace(size_, std::move(floats_));
  }

  float* data() const { return floats_.get(); }

 private:
  struct Pool {
    std::mutex mutex;
    std::multimap<int64_t, std::unique_ptr<float[]>> free;
  };

  static Pool& ThePool() {
    static Pool* const pool = new Pool;  // never freed, because threads may outlive static objects
    return *pool;
  }

  int64_t size_ = 0;
  std::unique_ptr<float[]> floats_;
};

}  // namespace din
