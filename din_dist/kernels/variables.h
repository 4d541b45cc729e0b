// TensorFlow's variables, where they are: a table is read and written by its rows, and never copied.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "tensorflow.h"

namespace din {

// A float32 variable whose handle is an input; held against others' writing, or all others' use, as long as this is there.
class Variable {
 public:
  enum class For { kReading, kWriting };

  Variable(TF_OpKernelContext* context, int place, For use);
  Variable(Variable&&);
  ~Variable();

  float* Data() const;
  std::vector<int64_t> Shape() const;

  // From now on the values are those in the first bytes of `file`, memory that processes share; `fill`: puts them there.
  // Until somebody assigns to the variable, which gives it memory of its own again.
  void MoveInto(int file, bool fill);
  bool IsShared() const;

 private:
  struct Held;
  std::unique_ptr<Held> held_;
};

}  // namespace din
