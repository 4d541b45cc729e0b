// Access to TensorFlow's variables in place: rows of a table are read and written without copying the table.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "tensorflow.h"

namespace din {

// A float32 variable, locked as long as this object exists. The lock keeps out this process's other operations: those
// that write to it or, when it is held for writing, all of them. It does not keep out other processes that share the
// variable.
class Variable {
 public:
  enum class For { kReading, kWriting };

  // Locks the variables whose handles are `count` inputs from `place` on. No variable may occur twice.
  static std::vector<Variable> Hold(TF_OpKernelContext* context, int place, int64_t count, For use);

  Variable(Variable&&);
  ~Variable();

  float* Data() const;
  std::vector<int64_t> Shape() const;

  // Moves the values to the first bytes of `file`, memory that processes share; with `fill`, it copies them there. An
  // assignment to the variable gives it memory of its own again.
  void MoveInto(int file, bool fill);
  bool IsShared() const;

 private:
  struct Held;
  explicit Variable(std::unique_ptr<Held> held);

  std::unique_ptr<Held> held_;
};

}  // namespace din
