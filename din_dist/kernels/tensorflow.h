// The part of TensorFlow's C interface that the operations use. The C interface is the same for every compiler and
// version, and compiles in seconds.
#pragma once

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensorflow/c/kernels.h"
#include "tensorflow/c/ops.h"
#include "tensorflow/c/tf_tensor.h"

namespace din {

struct Status {
  TF_Status* const status = TF_NewStatus();
  ~Status() { TF_DeleteStatus(status); }
  operator TF_Status*() const { return status; }
  void Check() const {
    if (TF_GetCode(status) != TF_OK) throw std::invalid_argument(TF_Message(status));
  }
};

inline void Require(bool holds, const char* rule) {
  if (!holds) throw std::invalid_argument(rule);
}

// An input or an output.
class Tensor {
 public:
  Tensor() = default;
  Tensor(Tensor&& other) : tensor_(other.tensor_) { other.tensor_ = nullptr; }
  ~Tensor() {
    if (tensor_) TF_DeleteTensor(tensor_);
  }

  static Tensor Input(TF_OpKernelContext* context, int place) {
    Status status;
    Tensor input;
    TF_GetInput(context, place, &input.tensor_, status);
    status.Check();
    return input;
  }

  static Tensor Output(TF_OpKernelContext* context, int place, TF_DataType type, const std::vector<int64_t>& shape) {
    size_t bytes = TF_DataTypeSize(type);
    for (int64_t length : shape) bytes *= length;
    Status status;
    Tensor output;
    output.tensor_ = TF_AllocateOutput(context, place, type, shape.data(), shape.size(), bytes, status);
    status.Check();
    return output;
  }

  template <typename T>
  T* Data() const {
    return static_cast<T*>(TF_TensorData(tensor_));
  }

  int64_t Size() const { return TF_TensorElementCount(tensor_); }
  int64_t Bytes() const { return TF_TensorByteSize(tensor_); }
  TF_DataType Type() const { return TF_TensorType(tensor_); }

  std::vector<int64_t> Shape() const {
    std::vector<int64_t> shape(TF_NumDims(tensor_));
    for (size_t axis = 0; axis < shape.size(); ++axis) shape[axis] = TF_Dim(tensor_, axis);
    return shape;
  }

 private:
  TF_Tensor* tensor_ = nullptr;
};

inline int64_t Attribute(TF_OpKernelConstruction* construction, const char* name) {
  Status status;
  int64_t value = 0;
  TF_OpKernelConstruction_GetAttrInt64(construction, name, &value, status);
  status.Check();
  return value;
}

inline std::string StringAttribute(TF_OpKernelConstruction* construction, const char* name) {
  Status status;
  int32_t list_size = 0, size = 0;
  TF_OpKernelConstruction_GetAttrSize(construction, name, &list_size, &size, status);
  status.Check();
  std::string value(size, '\0');
  TF_OpKernelConstruction_GetAttrString(construction, name, value.data(), value.size(), status);
  status.Check();
  return value;
}

// Returns the entry of a list whose `name` it is, or null.
template <typename Entry, size_t kCount>
const Entry* Find(const Entry (&list)[kCount], const std::string& name) {
  for (const Entry& entry : list) {
    if (name == entry.name) return &entry;
  }
  return nullptr;
}

// Returns the entry of a list that a string attribute names.
template <typename Entry, size_t kCount>
const Entry& NamedBy(TF_OpKernelConstruction* construction, const char* attribute, const Entry (&list)[kCount]) {
  const std::string name = StringAttribute(construction, attribute);
  if (const Entry* found = Find(list, name)) return *found;
  std::string names;
  for (const Entry& entry : list) names += (names.empty() ? "" : ", ") + std::string(entry.name);
  throw std::invalid_argument(std::string(attribute) + " must be one of " + names + ". Received: '" + name + "'.");
}

// Registers an operation for CPUs. `Operation` is constructed from a `TF_OpKernelConstruction*` and has
// `Compute(TF_OpKernelContext*)`. If they throw, the operation fails: a `runtime_error` means an external failure, any
// other exception a wrong call.
template <typename Operation>
struct Kernel {
  static void* Create(TF_OpKernelConstruction* construction) {
    try {
      return new Operation(construction);
    } catch (const std::exception& error) {
      Status status;
      TF_SetStatus(status, TF_INVALID_ARGUMENT, error.what());
      TF_OpKernelConstruction_Failure(construction, status);
      return nullptr;
    }
  }

  static void Compute(void* operation, TF_OpKernelContext* context) {
    Status status;
    try {
      static_cast<Operation*>(operation)->Compute(context);
      return;
    } catch (const std::runtime_error& error) {
      TF_SetStatus(status, TF_UNAVAILABLE, error.what());
    } catch (const std::exception& error) {
      TF_SetStatus(status, TF_INVALID_ARGUMENT, error.what());
    }
    TF_OpKernelContext_Failure(context, status);
  }

  static void Delete(void* operation) { delete static_cast<Operation*>(operation); }

  // `stateful`: the operation runs even if its outputs are unused, and identical calls are not merged.
  static bool Register(const char* name, const std::vector<const char*>& inputs,
                       const std::vector<const char*>& outputs, const std::vector<const char*>& attributes,
                       bool stateful = false) {
    TF_OpDefinitionBuilder* definition = TF_NewOpDefinitionBuilder(name);
    for (const char* input : inputs) TF_OpDefinitionBuilderAddInput(definition, input);
    for (const char* output : outputs) TF_OpDefinitionBuilderAddOutput(definition, output);
    for (const char* attribute : attributes) TF_OpDefinitionBuilderAddAttr(definition, attribute);
    if (stateful) TF_OpDefinitionBuilderSetIsStateful(definition, true);  // it ignores its argument
    TF_OpDefinitionBuilderSetShapeInferenceFunction(
        definition, [](TF_ShapeInferenceContext* context, TF_Status* status) {
          TF_ShapeInferenceContextSetUnknownShape(context, status);
        });
    Status status;
    TF_RegisterOpDefinition(definition, status);
    if (TF_GetCode(status) == TF_OK) {
      TF_RegisterKernelBuilder(name, TF_NewKernelBuilder(name, "CPU", Create, Compute, Delete), status);
    }
    if (TF_GetCode(status) != TF_OK) fprintf(stderr, "din_dist: %s: %s\n", name, TF_Message(status));
    return TF_GetCode(status) == TF_OK;
  }
};

}  // namespace din
