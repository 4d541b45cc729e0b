// The only file that uses TensorFlow's C++ interface, and is therefore tied to the version that it is compiled for. The
// C interface declares functions for variables, but wheels do not export them.
#include "variables.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>

#include "tensorflow/c/c_api.h"
#include "tensorflow/core/common_runtime/dma_helper.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"

namespace din {
namespace {

class SharedMemory : public tensorflow::TensorBuffer {
 public:
  SharedMemory(void* data, size_t bytes) : TensorBuffer(data), bytes_(bytes) {}
  ~SharedMemory() override { munmap(data(), bytes_); }

  size_t size() const override { return bytes_; }
  tensorflow::TensorBuffer* root_buffer() override { return this; }
  void FillAllocationDescription(tensorflow::AllocationDescription*) const override {}

 private:
  const size_t bytes_;
};

// Returns memory that is about to be freed to the system. TensorFlow's allocator would keep it for later.
void GiveBack(void* data, size_t bytes) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

}  // namespace

struct Variable::Held {
  tensorflow::core::RefCountPtr<tensorflow::Var> variable;
  const For use;
  bool locked = false;

  void Lock() {
    if (use == For::kWriting) {
      variable->mu()->lock();
    } else {
      variable->mu()->lock_shared();
    }
    locked = true;
    Require(variable->tensor()->dtype() == tensorflow::DT_FLOAT, "a variable must be of float32");
  }

  // Makes readers copy the values from now on, and copies them once if a reader may still share the memory.
  // TensorFlow's lookups usually have done so already.
  void KeepFromReaders() {
    if (variable->copy_on_read_mode.load()) return;
    tensorflow::Tensor& values = *variable->tensor();
    if (!values.RefCountIsOne()) {
      tensorflow::Tensor own(values.dtype(), values.shape());
      std::memcpy(own.data(), values.data(), values.TotalBytes());
      values = std::move(own);
    }
    variable->copy_on_read_mode.store(true);
  }

  ~Held() {
    if (!locked) return;
    if (use == For::kWriting) {
      variable->mu()->unlock();
    } else {
      variable->mu()->unlock_shared();
    }
  }
};

std::vector<Variable> Variable::Hold(TF_OpKernelContext* context, int place, int64_t count, For use) {
  if (std::strcmp(TF_Version(), DIN_TENSORFLOW)) {
    throw std::invalid_argument(std::string("The kernels must be compiled for this TensorFlow, ") + TF_Version() +
                                ". Received: for " DIN_TENSORFLOW ". Run launch/build_kernels.sh.");
  }
  auto* const of_tensorflow = reinterpret_cast<tensorflow::OpKernelContext*>(context);  // TensorFlow does the same
  std::vector<Variable> variables;
  std::vector<Held*> by_address;
  for (int64_t i = 0; i < count; ++i) {
    auto held = std::unique_ptr<Held>(new Held{{}, use});
    const auto handle = tensorflow::HandleFromInput(of_tensorflow, place + static_cast<int>(i));
    const auto status = tensorflow::LookupResource(of_tensorflow, handle, &held->variable);
    if (!status.ok()) throw std::invalid_argument(std::string(status.message()));
    by_address.push_back(held.get());
    variables.push_back(Variable(std::move(held)));
  }
  // Locks in the same order in which TensorFlow locks several variables.
  const auto address = [](const Held* held) { return held->variable->mu(); };
  std::sort(by_address.begin(), by_address.end(),
            [&](const Held* a, const Held* b) { return std::less<>()(address(a), address(b)); });
  for (size_t i = 1; i < by_address.size(); ++i) {
    Require(address(by_address[i - 1]) != address(by_address[i]), "no variable may be named twice");
  }
  for (Held* held : by_address) {
    held->Lock();
    if (use == For::kWriting) held->KeepFromReaders();
  }
  return variables;
}

Variable::Variable(std::unique_ptr<Held> held) : held_(std::move(held)) {}
Variable::Variable(Variable&&) = default;
Variable::~Variable() = default;

float* Variable::Data() const { return static_cast<float*>(held_->variable->tensor()->data()); }

std::vector<int64_t> Variable::Shape() const {
  const auto sizes = held_->variable->tensor()->shape().dim_sizes();
  return {sizes.begin(), sizes.end()};
}

void Variable::MoveInto(int file, bool fill) {
  tensorflow::Tensor& values = *held_->variable->tensor();
  const size_t bytes = values.TotalBytes();
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (memory == MAP_FAILED) throw std::invalid_argument(std::string("shared memory: ") + std::strerror(errno));
  const tensorflow::core::RefCountPtr<SharedMemory> buffer(new SharedMemory(memory, bytes));
  if (fill) std::memcpy(memory, values.data(), bytes);
  if (values.RefCountIsOne() && !IsShared()) GiveBack(values.data(), bytes);
  values = tensorflow::Tensor(values.dtype(), values.shape(), buffer.get());
}

bool Variable::IsShared() const {
  return dynamic_cast<const SharedMemory*>(tensorflow::DMAHelper::buffer(held_->variable->tensor())) != nullptr;
}

}  // namespace din
