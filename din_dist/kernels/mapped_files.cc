// Ends the process if a page of a mapped file cannot be read, for which the kernel raises SIGBUS in any thread. One
// line names the file and the offset, and the exit code is that of wrong input. mapped_files.py calls it with ctypes.
#include <signal.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>

namespace din {
namespace {

constexpr int kMostFiles = 512;
constexpr char kOffset = 1, kTime = 2;  // placeholders in a line for values that are known only at the error

struct MappedFile {
  std::atomic<uintptr_t> begin{0};  // 0: the entry is free
  uintptr_t end = 0;                // the end of the last page
  int64_t offset = 0;               // the offset of `begin` in the file
  char* path = nullptr;
  char* unreadable = nullptr;  // the line to print if the disk reports an error
  char* cut = nullptr;         // the line to print if the file has become shorter
};

MappedFile files[kMostFiles];
int agent = -1;  // file descriptor to which the process reports its exit code
struct sigaction former;
std::atomic<bool> ending{false};

// From here on, only functions that are safe in a signal handler.

void Write(int target, const char* text, size_t size) {
  while (size > 0) {
    const ssize_t written = write(target, text, size);
    if (written <= 0) return;
    text += written;
    size -= written;
  }
}

char* Append(char* at, const char* end, uint64_t number) {
  char digits[24];
  int count = 0;
  do {
    digits[count++] = '0' + number % 10;
    number /= 10;
  } while (number > 0);
  while (count > 0 && at < end) *at++ = digits[--count];
  return at;
}

void Say(const char* line, int64_t offset) {
  static char text[8192];
  char* at = text;
  const char* const end = text + sizeof(text) - 1;
  for (; *line && at < end; ++line) {
    if (*line == kOffset) {
      at = Append(at, end, offset);
    } else if (*line == kTime) {
      at = Append(at, end, time(nullptr));
    } else {
      *at++ = *line;
    }
  }
  *at++ = '\n';
  Write(2, text, at - text);
}

void End(const MappedFile& file, uintptr_t address) {
  if (ending.exchange(true)) {
    for (;;) pause();  // another thread is ending the process
  }
  const int64_t offset = file.offset + (address - file.begin);
  struct stat now;
  const bool is_cut = stat(file.path, &now) == 0 && offset >= now.st_size;
  Say(is_cut ? file.cut : file.unreadable, offset);
  constexpr char kEnds[] = "\nends 2\n\ngone\n";
  if (agent >= 0) Write(agent, kEnds, sizeof(kEnds) - 1);
  _exit(2);
}

void Handle(int number, siginfo_t* info, void* context) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
  for (const MappedFile& file : files) {
    const uintptr_t begin = file.begin;
    if (info->si_code > 0 && begin && begin <= address && address < file.end) End(file, address);
  }
  if (former.sa_flags & SA_SIGINFO) {
    former.sa_sigaction(number, info, context);
  } else if (former.sa_handler != SIG_DFL && former.sa_handler != SIG_IGN) {
    former.sa_handler(number);
  } else {
    signal(number, SIG_DFL);
    if (info->si_code <= 0) raise(number);  // otherwise the same access raises it again
  }
}

}  // namespace
}  // namespace din

#define DIN_EXPORT extern "C" __attribute__((visibility("default")))

// Begins to watch `bytes` from `begin` on. Returns the index of the entry, or -1 if none is free.
DIN_EXPORT int din_dist_watch_file(uintptr_t begin, uint64_t bytes, int64_t offset, const char* path,
                                   const char* unreadable, const char* cut, int agent) {
  using namespace din;
  static const bool installed = [] {
    struct sigaction ours {};
    ours.sa_sigaction = Handle;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&ours.sa_mask);
    return sigaction(SIGBUS, &ours, &former) == 0;
  }();
  din::agent = agent;
  for (int place = 0; installed && place < kMostFiles; ++place) {
    MappedFile& file = files[place];
    if (file.begin) continue;
    const uintptr_t page = sysconf(_SC_PAGESIZE);
    file.end = (begin + bytes + page - 1) / page * page;
    file.offset = offset;
    file.path = strdup(path);
    file.unreadable = strdup(unreadable);
    file.cut = strdup(cut);
    file.begin = begin;
    return place;
  }
  return -1;
}

// Stops watching a file that is about to be unmapped. Its texts are kept, because a handler may be about to use them.
DIN_EXPORT void din_dist_forget_file(int place) { din::files[place].begin = 0; }
