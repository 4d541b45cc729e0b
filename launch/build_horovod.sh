#!/usr/bin/env bash
# Builds the Horovod wheel for the TensorFlow that $PYTHON has (default: the checkout's .venv), and prints the wheel's path.
#
#   launch/build_horovod.sh [--gpu] [--check | --print_env]
#
# The wheel is kept in ${DIN_DIST_CACHE:-~/.cache/din_dist}/wheels/KEY and built only when it is not there: 2 to 3 minutes on
# 2 cores. --gpu builds the NCCL operations, for which it takes nvcc. --check only tells whether the tools for a build are
# there (if one is due), --print_env only shows its settings.
set -euo pipefail

horovod_version=0.28.1

# shellcheck source=launch/common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"
python=${PYTHON:-$venv/bin/python}

device=cpu
action=build
for flag; do
  case $flag in
    --gpu) device=gpu ;;
    --check | --print_env) action=${flag#--} ;;
    *) die "unknown flag $flag. Usage: launch/build_horovod.sh [--gpu] [--check | --print_env]" ;;
  esac
done
command -v "$python" >/dev/null || die "there is no Python at $python. Run launch/setup.sh first, or set PYTHON."

find_cuda() {
  local home=${HOROVOD_CUDA_HOME:-${CUDA_HOME:-/usr/local/cuda}} nvcc
  if [[ ! -x $home/bin/nvcc ]]; then
    nvcc=$(command -v nvcc) ||
      die "--gpu takes nvcc, which is neither in $home/bin nor on PATH. Install the CUDA toolkit, or set HOROVOD_CUDA_HOME to it."
    home=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
  fi
  echo "$home"
}

find_nccl() { # the one that pip installs with tensorflow[and-cuda], unless the user names another
  local home=${HOROVOD_NCCL_HOME:-$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/nccl}
  [[ -f $home/include/nccl.h ]] ||
    die "NCCL is not in $home: no include/nccl.h there. Run launch/setup.sh --gpu, or set HOROVOD_NCCL_HOME to a folder with include/ and lib/."
  echo "$home"
}

# Named by the pinned TensorFlow, so that --check knows the wheel before TensorFlow is installed.
tensorflow_version=$(pinned_version tensorflow)
machine=$("$python" -c 'import platform, sys; print(f"cp{sys.version_info[0]}{sys.version_info[1]}-{platform.machine()}")')
# To be raised with every change to what is built.
declare -A revision=([cpu]=8 [gpu]=9)
key=horovod$horovod_version+${revision[$device]}-tensorflow$tensorflow_version-$machine-$device
folder=$cache/wheels/$key

exit_if_built() {
  local wheel
  for wheel in "$folder"/horovod-*.whl; do
    [[ -f $wheel ]] || continue
    [[ $action == check ]] || echo "$wheel"
    exit 0
  done
}
if [[ $action != print_env ]]; then
  exit_if_built
  require_command 'building Horovod' g++ g++
  require_command 'building Horovod' make make
fi
# Of the headers named here Horovod includes none where it should. Until g++ 13 others brought them along.
settings=(
  "CXXFLAGS=${CXXFLAGS:-} -include cstdint -include stdexcept -include string"
  HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1
  "MAKEFLAGS=-j$(nproc)"
)
if [[ $device == gpu ]]; then
  cuda=$(find_cuda)
  settings+=(HOROVOD_GPU=CUDA HOROVOD_GPU_OPERATIONS=NCCL "HOROVOD_CUDA_HOME=$cuda")
fi
[[ $action != check ]] || exit 0
if [[ $device == gpu ]]; then
  nccl=$(find_nccl)
  settings+=("HOROVOD_NCCL_HOME=$nccl" HOROVOD_NCCL_LINK=SHARED)
fi
if [[ $action == print_env ]]; then
  printf '%s\n' "${settings[@]}"
  exit 0
fi

installed=$("$python" - <<'PYTHON'
import importlib.metadata

names = {"tensorflow", "tensorflow-cpu"}
print(*{d.version for d in importlib.metadata.distributions() if d.name.lower().replace("_", "-") in names})
PYTHON
)
[[ $installed == "$tensorflow_version" ]] ||
  die "$python must have the TensorFlow that launch/constraints.txt pins, $tensorflow_version. Found: ${installed:-none}. Run launch/setup.sh."

mkdir -p "$folder"
exec {lock}>"$folder/lock"
flock "$lock" # of two builds at once the second waits,
exit_if_built # and has the wheel of the first

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=$folder/build.log
echo "Building Horovod $horovod_version for $device: once, 2 to 3 minutes on 2 cores (log: $log)" >&2

# The tools stay out of the environment that is built for.
run_pip "$python" "$log" install --require-hashes --no-deps --target "$work/tools" \
  -r <(pinned cmake setuptools wheel cloudpickle packaging psutil pyyaml)
# Horovod's CMake files break on a space in TensorFlow's path: give them a path without.
ln -s "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" "$work/site-packages"
export PYTHONPATH=$work/tools:$work/site-packages
# Checked before anything is unpacked: pip runs a source's setup.py to read its metadata.
run_pip "$python" "$log" download --dest "$work" --require-hashes --no-deps --no-build-isolation --no-binary horovod \
  -r <(pinned horovod)
sdist=$work/horovod-$horovod_version.tar.gz
tar -xzf "$sdist" -C "$work"
source_tree=$work/horovod-$horovod_version

# Ranks of different builds do not understand each other: told apart by their version, so that the preflight sees it.
[[ $(cat "$source_tree/horovod/__init__.py") == *"__version__ = '$horovod_version'"* ]] ||
  die "horovod/__init__.py must give the version, $horovod_version. Adapt launch/build_horovod.sh to this Horovod."
sed -i "s/^__version__ = .*/__version__ = '$horovod_version+din.${revision[$device]}'/" "$source_tree/horovod/__init__.py"

# The opt-in XLA operations include headers that TensorFlow's wheel no longer ships. Nothing else needs that file.
cmake_lists=$source_tree/horovod/tensorflow/CMakeLists.txt
[[ $(grep -c 'xla_mpi_ops\.cc' "$cmake_lists") == 1 ]] ||
  die "horovod/tensorflow/CMakeLists.txt must name xla_mpi_ops.cc on one line. Adapt launch/build_horovod.sh to this Horovod."
sed -i '/xla_mpi_ops\.cc/d' "$cmake_lists"

# Gloo's receiving thread polls without a pause while another thread of its process holds the connection. Where they share
# a core, as workers on CPUs and containers with one CPU do, that takes the core from the holder for a time slice: a small
# message between two such workers took 4 ms. One call lets the holder finish.
gloo=$source_tree/third_party/gloo/gloo
pair=$gloo/transport/tcp/pair.cc
[[ $(grep -A 1 '^  if (!lock) {$' "$pair") == $'  if (!lock) {\n    return;' ]] ||
  die "third_party/gloo/gloo/transport/tcp/pair.cc must return at once where it fails to lock. Adapt launch/build_horovod.sh to this Horovod."
sed -i -e '/^  if (!lock) {$/a \    sched_yield();' -e '/^#include <errno.h>$/i #include <sched.h>' "$pair"

# Where a connection breaks in the middle of a message, Gloo forgets to tell who waits for that message, who then waits out
# the whole time-out.
[[ $(grep -c '^  // Loop through posted send operations\.$' "$pair") == 1 ]] ||
  die "third_party/gloo/gloo/transport/tcp/pair.cc must loop through posted send operations once. Adapt launch/build_horovod.sh to this Horovod."
sed -i 's,^  // Loop through posted send operations\.$,\
  std::vector<WeakNonOwningPtr<UnboundBuffer>> under_way{rx_.ubuf};\
  for (auto\& op : tx_) under_way.push_back(op.ubuf);\
  for (auto\& one : under_way) {\
    NonOwningPtr<UnboundBuffer> buffer(one);\
    if (buffer) buffer->signalException(ex);\
  }\
&,' "$pair"

# In an all-gather Gloo sends its part before it says that it is ready to receive. Of two ranks, which have one connection, the later
# one says so behind all of its part, and its link carries one direction at a time.
allgatherv=$gloo/allgatherv.cc
[[ $(grep -A 1 -E '^      out->send\(sendRank, slot, byteOffsets' "$allgatherv" | grep -cE '^      out->(send|recv)\(') == 2 ]] ||
  die "third_party/gloo/gloo/allgatherv.cc must send and receive on two lines, one after the other. Adapt launch/build_horovod.sh to this Horovod."
sed -i '/^      out->send(sendRank, slot, byteOffsets/{h;d};/^      out->recv(recvRank, slot, byteOffsets/G' "$allgatherv"

# Few bytes, as those of a layer's statistics and all by which the ranks agree on what is ready, are summed in fewer steps.
[[ $(grep -cE '^    case detail::AllreduceOptionsImpl::UNSPECIFIED:$|^#include "gloo/types\.h"$' "$gloo/allreduce.cc") == 2 ]] ||
  die "third_party/gloo/gloo/allreduce.cc must choose an algorithm in one place. Adapt launch/build_horovod.sh to this Horovod."
cp "$root/launch/recursive_doubling.h" "$gloo"
sed -i -e 's,^#include "gloo/types\.h"$,#include "gloo/recursive_doubling.h"\n&,' \
  -e 's/^    case detail::AllreduceOptionsImpl::UNSPECIFIED:$/&\
      if (totalBytes <= kMostBytesToDouble) {\
        recursiveDoubling(opts, reduceInputs, broadcastOutputs);\
        break;\
      }\
      \/\/ fallthrough/' "$gloo/allreduce.cc"

# When a worker dies while the others join anew, Gloo throws there. Nothing catches it: all of them abort, and the elastic job
# with them (horovod/horovod issue 3264). Caught, it is an hvd.init() that failed and can be tried again. The rank -1 tells a
# worker whose host is no longer wanted, which was aborted likewise.
common=$source_tree/horovod/common
[[ $(grep -cE '^ *(global_gloo_context\.Initialize\(ParseGlooIface|state\.process_set_table\.Initialize\(global_gloo_context)' "$common/operations.cc") == 2 &&
  $(grep -cE 'horovod_global\.initialization_done = false;' "$common/operations.cc") == 2 &&
  $(grep -c '// Signals that this host is not part of the job' "$common/gloo/gloo_context.cc") == 1 ]] ||
  die "horovod/common must initialize Gloo in operations.cc and notice removed hosts in gloo_context.cc. Adapt launch/build_horovod.sh to this Horovod."
sed -i -e '/^ *state\.process_set_table\.Initialize(global_gloo_context);/d' \
  -e '/horovod_global\.initialization_done = false;/a \    horovod_global.initialization_failed = false;' \
  -e 's/^ *global_gloo_context\.Initialize(ParseGlooIface());/    try {\
      global_gloo_context.Initialize(ParseGlooIface());\
      state.process_set_table.Initialize(global_gloo_context);\
    } catch (const std::exception\& error) {\
      LOG(DEBUG) << "Horovod could not be initialized: " << error.what();\
      state.process_set_table.Finalize(global_gloo_context, SHUT_DOWN_ERROR);\
      global_gloo_context.Finalize();\
      state.initialization_failed = true;\
      return;\
    }/' "$common/operations.cc"

# A rank whose message fails tells its own caller and goes on to the next, while the others still wait for its part in the
# failed one: all of them for the whole time-out. Left at once, its connections close, by which the others know.
[[ $(grep -A 1 '^  Status status;$' "$common/operations.cc") == *$'\n  try {'* &&
  $(grep -cE '^    status = Status::UnknownError\(ex\.what\(\)\);$|^  if \(!status\.in_progress\(\)\) \{$' "$common/operations.cc") == 2 ]] ||
  die "horovod/common/operations.cc must catch what a message throws in one place. Adapt launch/build_horovod.sh to this Horovod."
sed -i -e '/^  Status status;$/{N;s/\n  try {$/\
  std::exception_ptr broken;&/}' \
  -e 's/^    status = Status::UnknownError(ex\.what());$/&\
    broken = std::current_exception();/' \
  -e '/^  if (!status\.in_progress()) {$/,/^  }$/s/^  }$/&\
  if (broken) std::rethrow_exception(broken);/' "$common/operations.cc"
sed -i '/\/\/ Signals that this host is not part of the job/a \      SetEnv(HOROVOD_RANK, "-1");' "$common/gloo/gloo_context.cc"

# Finalizing the global process set does nothing, for only the global Gloo context counts as enabled: its connections stay open
# until it is initialized anew. A rank that has left an operation, and waits for the others to do so too, then never tells
# those who wait for its part of that operation. Replaced by an empty context, it lets go of them.
[[ $(grep -c '^  gloo_context\.Finalize();$' "$common/process_set.cc") == 1 ]] ||
  die "horovod/common/process_set.cc must finalize Gloo's context in one place. Adapt launch/build_horovod.sh to this Horovod."
sed -i 's/^  gloo_context\.Finalize();$/  gloo_context = GlooContext();/' "$common/process_set.cc"

# Horovod's thread looks for messages at fixed times, each a round over all ranks: often takes much of a worker's only core, seldom makes
# a step with some twenty messages wait. Here it is told what is added, and looks at those times only while something waits for other
# ranks; else every 20 ms. Who has something to say need not wait that long for those who have not yet: they come when they have.
queue=$common/tensor_queue
[[ $(grep -c '^  return Status::OK();$' "$queue.cc") == 2 && $(grep -c '^#include "logging\.h"$' "$queue.cc") == 1 &&
  $(grep -cE '^  TensorQueue\(\) = default;$|^#include <mutex>$' "$queue.h") == 2 &&
  $(grep -A 2 '^  if (sleep_duration > ' "$common/operations.cc") == *$'{\n    std::this_thread::sleep_for(sleep_duration);\n  }' ]] ||
  die "horovod/common must add tensors in tensor_queue.cc and sleep in operations.cc once. Adapt launch/build_horovod.sh to this Horovod."
sed -i -e 's/^#include <mutex>$/#include <chrono>\n&/' \
  -e 's/^  TensorQueue() = default;$/&\
  bool HasTensors() const;\
  static void WaitForTensors(std::chrono::steady_clock::duration at_most);/' "$queue.h"
sed -i -e 's/^  return Status::OK();$/  TellOfTensors();\n&/' \
  -e 's/^#include "logging\.h"$/&\
\
#include <condition_variable>/' \
  -e 's/^\/\/ Add a TensorTableEntry as well as its message to the queue\.$/namespace {\
std::mutex added_mutex;\
std::condition_variable added;\
bool has_added = false;\
\
void TellOfTensors() {\
  {\
    std::lock_guard<std::mutex> guard(added_mutex);\
    has_added = true;\
  }\
  added.notify_one();\
}\
} \/\/ namespace\
\
bool TensorQueue::HasTensors() const {\
  std::lock_guard<std::mutex> guard(mutex_);\
  return !tensor_table_.empty();\
}\
\
\/\/ Until a tensor is added to any queue.\
void TensorQueue::WaitForTensors(std::chrono::steady_clock::duration at_most) {\
  std::unique_lock<std::mutex> lock(added_mutex);\
  added.wait_for(lock, at_most, [] { return has_added; });\
  has_added = false;\
}\
\
&/' "$queue.cc"
sed -i '/^  if (sleep_duration > /{N;N;s/.*/  bool tensors_wait = false;\
  for (auto process_set_id : state.process_set_table.Ids()) {\
    tensors_wait |= state.process_set_table.Get(process_set_id).tensor_queue.HasTensors();\
  }\
  if (!tensors_wait) sleep_duration += std::chrono::milliseconds(20);\
  TensorQueue::WaitForTensors(sleep_duration);/}' "$common/operations.cc"

# A worker that joins anew sets all parameters anew: first Horovod's defaults, then those of the environment. The default cycle of 1 ms then
# lands in the place of the fusion threshold, which becomes 1 MB, where a cycle was given before. A worker that is new has 128 MB. Where
# each rank decides by itself which messages travel as one, as it does for those it remembers, they disagree, and are aborted.
parameters=$common/parameter_manager.cc
[[ $(grep -A 1 '^  } else {$' "$parameters" | grep -c '^    Eigen::VectorXd v = TunableParameter::BestValue();$') == 1 ]] ||
  die "horovod/common/parameter_manager.cc must set parameters that are not fixed in one place. Adapt launch/build_horovod.sh to this Horovod."
sed -i '/^  } else {$/{N;s/^  } else {\(\n    Eigen::VectorXd v = TunableParameter::BestValue();\)$/  } else if (fixed_values_.find(variable) == fixed_values_.end()) {\1/}' "$parameters"

# TensorFlow no longer exports the function by which Horovod asks for a GPU's stream, so a wheel that calls it does not load.
# Its class for streams tells as much, by a virtual function that takes no exported name.
mpi_ops=$source_tree/horovod/tensorflow/mpi_ops.cc
[[ $(grep -cE '^GpuStreamHandle AsGpuStreamValue\(Stream\* stream\);$|^#include "tensorflow/compiler/xla/stream_executor/stream\.h"$' "$mpi_ops") == 2 ]] ||
  die "horovod/tensorflow/mpi_ops.cc must declare AsGpuStreamValue once. Adapt launch/build_horovod.sh to this Horovod."
sed -i 's,^#include "tensorflow/compiler/xla/stream_executor/stream\.h"$,&\
GpuStreamHandle stream_executor::gpu::AsGpuStreamValue(Stream* stream) {\
  return static_cast<GpuStreamHandle>(stream->platform_specific_handle().stream);\
},' "$mpi_ops"

if [[ $device == gpu && ! ${HOROVOD_NCCL_HOME:-} ]]; then
  # pip's package has only libnccl.so.2, but linkers look for libnccl.so. At run time the wheel finds it relative to itself:
  # $ORIGIN is horovod/tensorflow in site-packages. Left alone, CMake would write this build's temporary folder there.
  mkdir "$work/nccl"
  ln -s "$nccl/lib/libnccl.so.2" "$work/nccl/libnccl.so"
  # shellcheck disable=SC2016
  settings+=("HOROVOD_NCCL_LIB=$work/nccl" "LDFLAGS=${LDFLAGS:-} "'-Wl,-rpath,$ORIGIN/../../nvidia/nccl/lib')
  sed -i '/^project(/a set(CMAKE_SKIP_RPATH ON)' "$source_tree/CMakeLists.txt"
fi

env "${settings[@]}" HOROVOD_CMAKE="$work/tools/cmake/data/bin/cmake" \
  "$python" -m pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir "$work" "$source_tree" >"$log" 2>&1 ||
  die "Horovod did not build: $(grep -m 1 -E ': (fatal )?error:|CMake Error' "$log"). Log: $log"
wheel=$(basename "$work"/horovod-*.whl)
mv "$work/$wheel" "$folder/$wheel.part"
mv "$folder/$wheel.part" "$folder/$wheel" # whole or not at all
exit_if_built
