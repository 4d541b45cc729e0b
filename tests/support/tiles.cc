// Runs AMX's tiles on processors without: preloaded, it takes the signal of an illegal instruction, and does what the
// instruction would have done. Where a real processor would fault, it ends the process with a line.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, chapters 3 and 4: LDTILECFG,
// TILELOADD, TILESTORED, TDPBF16PS, TILERELEASE.
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>

namespace {

struct Tile {
  int rows, row_bytes;
  uint8_t data[16][64];
};

thread_local bool configured = false;
thread_local Tile tiles[8];
std::atomic<long> configurations{0}, releases{0}, products{0};

[[noreturn]] void Fault(const char* what) {
  fprintf(stderr, "tiles: %s\n", what);
  abort();
}

void Configure(const uint8_t* from) {
  if (from[0] != 1) Fault("the palette must be 1");
  for (int i = 1; i < 16; ++i) {
    if (from[i]) Fault("reserved bytes must be 0, and so must be the row to start at");
  }
  for (int t = 0; t < 16; ++t) {
    uint16_t row_bytes;
    memcpy(&row_bytes, from + 16 + 2 * t, 2);
    const int rows = from[48 + t];
    if (t >= 8 && (row_bytes || rows)) Fault("there are eight tiles");
    if (row_bytes > 64 || rows > 16 || !row_bytes != !rows) Fault("a tile has up to 16 rows of 64 bytes");
    if (t < 8) {
      tiles[t] = Tile{};
      tiles[t].rows = rows;
      tiles[t].row_bytes = row_bytes;
    }
  }
  configured = true;
  ++configurations;
}

Tile& At(int number) {
  if (!configured || number > 7 || !tiles[number].rows) Fault("this tile is not configured");
  return tiles[number];
}

float FromBfloat16(uint16_t bits) {
  const uint32_t whole = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &whole, 4);
  return value;
}

void MultiplyAdd(Tile& c, const Tile& a, const Tile& b) {
  if (&c == &a || &c == &b || &a == &b) Fault("the tiles of a product must differ");
  if (a.row_bytes / 4 != b.rows || c.row_bytes != b.row_bytes || c.rows != a.rows) Fault("the tiles must fit");
  ++products;
  for (int m = 0; m < c.rows; ++m) {
    for (int n = 0; n < c.row_bytes / 4; ++n) {
      float sums[2] = {0, 0}, before;
      for (int k = 0; k < a.row_bytes / 4; ++k) {
        for (int half = 0; half < 2; ++half) {
          uint16_t left, right;
          memcpy(&left, &a.data[m][4 * k + 2 * half], 2);
          memcpy(&right, &b.data[k][4 * n + 2 * half], 2);
          sums[half] = __builtin_fmaf(FromBfloat16(left), FromBfloat16(right), sums[half]);
        }
      }
      memcpy(&before, &c.data[m][4 * n], 4);
      before += sums[0] + sums[1];
      memcpy(&c.data[m][4 * n], &before, 4);
    }
  }
}

// The order of registers in an instruction, 0 to 15.
constexpr int kRegisters[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// What an instruction reads of memory: a first row, and the bytes from row to row.
struct Memory {
  uint8_t* first;
  int64_t step;
  int length;  // bytes of the instruction from `modrm` on
};

Memory Address(const uint8_t* modrm, const greg_t* registers, bool index_high, bool base_high) {
  const int mode = modrm[0] >> 6;
  int base = modrm[0] & 7, length = 1;
  int64_t step = 0;
  bool absolute = false;
  if (base == 4) {
    const uint8_t sib = modrm[1];
    const int index = (sib >> 3 & 7) + 8 * index_high;
    if (index != 4) step = registers[kRegisters[index]] << (sib >> 6);
    base = sib & 7;
    length = 2;
    absolute = mode == 0 && base == 5;
  } else if (mode == 0 && base == 5) {
    Fault("an address relative to the instruction is not known here");
  }
  int64_t at = absolute ? 0 : registers[kRegisters[base + 8 * base_high]];
  if (mode == 1) {
    at += static_cast<int8_t>(modrm[length]);
    length += 1;
  } else if (mode == 2 || absolute) {
    int32_t more;
    memcpy(&more, modrm + length, 4);
    at += more;
    length += 4;
  }
  return {reinterpret_cast<uint8_t*>(at), step, length};
}

void Illegal(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const uint8_t* at = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  if (at[0] != 0xC4 || (at[1] & 31) != 2 || at[2] & 0x84) Fault("an illegal instruction that is none of a tile's");
  const bool index_high = !(at[1] & 0x40), base_high = !(at[1] & 0x20);
  const int prefix = at[2] & 3, vector = ~(at[2] >> 3) & 15, reg = at[4] >> 3 & 7, rm = at[4] & 7;
  const bool of_memory = at[4] >> 6 != 3;
  const Memory memory = of_memory ? Address(at + 4, registers, index_high, base_high) : Memory{nullptr, 0, 1};
  if (at[3] == 0x49 && prefix == 0) {
    if (of_memory) {
      Configure(memory.first);
    } else {
      configured = false;
      ++releases;
    }
  } else if (at[3] == 0x4B && of_memory && (prefix == 3 || prefix == 1)) {
    Tile& tile = At(reg);
    for (int r = 0; r < tile.rows; ++r) memcpy(tile.data[r], memory.first + r * memory.step, tile.row_bytes);
  } else if (at[3] == 0x4B && of_memory && prefix == 2) {
    const Tile& tile = At(reg);
    for (int r = 0; r < tile.rows; ++r) memcpy(memory.first + r * memory.step, tile.data[r], tile.row_bytes);
  } else if (at[3] == 0x5C && prefix == 2 && !of_memory) {
    MultiplyAdd(At(reg), At(rm), At(vector));
  } else {
    Fault("an instruction of tiles that is not known here");
  }
  registers[REG_RIP] += 4 + memory.length;
}

__attribute__((constructor)) void Start() {
  struct sigaction action = {};
  action.sa_sigaction = Illegal;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
}

__attribute__((destructor)) void End() {
  const char* path = getenv("DIN_DIST_TEST_TILES");
  FILE* to = path && products ? fopen(path, "w") : nullptr;
  if (!to) return;
  fprintf(to, "%ld %ld %ld\n", configurations.load(), releases.load(), products.load());
  fclose(to);
}

}  // namespace

// The system's, but for its permission to use tiles.
extern "C" long syscall(long number, ...) {
  va_list list;
  va_start(list, number);
  long a[6];
  for (long& one : a) one = va_arg(list, long);
  va_end(list);
  if (number == SYS_arch_prctl && a[0] == 0x1023) return 0;
  register long r10 __asm__("r10") = a[3];
  register long r8 __asm__("r8") = a[4];
  register long r9 __asm__("r9") = a[5];
  long result;
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "0"(number), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10), "r"(r8), "r"(r9)
                   : "rcx", "r11", "memory");
  if (result >= -4095 && result < 0) {
    errno = static_cast<int>(-result);
    return -1;
  }
  return result;
}
