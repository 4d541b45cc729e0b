// TensorFlow's variables, where they are: a table is read and written by its rows, and never copied.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "tensorflow.h"

namespace din {

// A float32 variable, held against this process' other operations that write to it, or use it at all, as long as this is
// there. Of one that processes share the others must be held off by other means.
class Variable {
 public:
  enum class For { kReading, kWriting };

  // Of those whose handles are `count` inputs from `place` on, no variable twice.
  static std::vector<Variable> Hold(TF_OpKernelContext* context, int place, int64_t count, For use);

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
  explicit Variable(std::unique_ptr<Held> held);

  std::unique_ptr<Held> held_;
};

}  // namespace din
