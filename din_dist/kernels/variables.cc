// The one file that keeps to TensorFlow's C++ interface, and so to the version that it is compiled for: of what the C
// interface declares for variables, wheels export nothing.
#include "variables.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

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

}  // namespace

struct Variable::Held {
  tensorflow::core::RefCountPtr<tensorflow::Var> variable;
  const For use;

  explicit Held(For for_use) : use(for_use) {}

  ~Held() {
    if (!variable) return;
    if (use == For::kWriting) {
      variable->mu()->unlock();
    } else {
      variable->mu()->unlock_shared();
    }
  }
};

Variable::Variable(TF_OpKernelContext* context, int place, For use) : held_(std::make_unique<Held>(use)) {
  if (std::strcmp(TF_Version(), DIN_TENSORFLOW)) {
    throw std::invalid_argument(std::string("The kernels must be compiled for this TensorFlow, ") + TF_Version() +
                                ". Received: for " DIN_TENSORFLOW ". Run launch/setup.sh, or launch/build_kernels.sh.");
  }
  auto* const of_tensorflow = reinterpret_cast<tensorflow::OpKernelContext*>(context);  // as TensorFlow does itself
  tensorflow::core::RefCountPtr<tensorflow::Var> found;
  const auto status =
      tensorflow::LookupResource(of_tensorflow, tensorflow::HandleFromInput(of_tensorflow, place), &found);
  if (!status.ok()) throw std::invalid_argument(std::string(status.message()));
  if (use == For::kWriting) {
    found->mu()->lock();
  } else {
    found->mu()->lock_shared();
  }
  tensorflow::Var* const variable = found.get();
  held_->variable = std::move(found);
  Require(variable->tensor()->dtype() == tensorflow::DT_FLOAT, "a variable must be of float32");
  if (use == For::kWriting && !variable->copy_on_read_mode.load()) {
    // Until now whoever read it may have been given the memory itself. Its lookups have seen to it already, as a rule.
    if (!variable->tensor()->RefCountIsOne()) {
      tensorflow::Tensor own(variable->tensor()->dtype(), variable->tensor()->shape());
      std::memcpy(own.data(), variable->tensor()->data(), variable->tensor()->TotalBytes());
      *variable->tensor() = std::move(own);
    }
    variable->copy_on_read_mode.store(true);
  }
}

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
  values = tensorflow::Tensor(values.dtype(), values.shape(), buffer.get());
}

bool Variable::IsShared() const {
  return dynamic_cast<const SharedMemory*>(tensorflow::DMAHelper::buffer(held_->variable->tensor())) != nullptr;
}

}  // namespace din
