// CRC-32C (Castagnoli; RFC 3720, appendix B.4) of what travels between ranks: TCP's own sum of 16 bits lets one of some ten
// thousand changed packets pass.
//
// By the processor's instruction where it has one. That takes three cycles for eight bytes but can begin another each cycle, so
// long data are done as three parts at a time, whose sums are then put together.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace gloo {
namespace crc32c {

constexpr uint32_t kPolynomial = 0x82f63b78; // reflected

using Table = std::array<std::array<uint32_t, 256>, 8>;

// Of each byte, followed by 0 to 7 zeros.
inline const Table& byteTable() {
  static const Table table = [] {
    Table made;
    for (uint32_t byte = 0; byte < 256; byte++) {
      uint32_t sum = byte;
      for (int bit = 0; bit < 8; bit++) sum = sum & 1 ? sum >> 1 ^ kPolynomial : sum >> 1;
      made[0][byte] = sum;
    }
    for (uint32_t byte = 0; byte < 256; byte++) {
      for (int zeros = 1; zeros < 8; zeros++) {
        made[zeros][byte] = made[zeros - 1][byte] >> 8 ^ made[0][made[zeros - 1][byte] & 255];
      }
    }
    return made;
  }();
  return table;
}

// These take and give the sum as it is in between, before it is inverted.
inline uint32_t extendByTable(uint32_t sum, const uint8_t* bytes, size_t size) {
  const auto& table = byteTable();
  for (; size >= 8; bytes += 8, size -= 8) {
    sum ^= uint32_t{bytes[0]} | uint32_t{bytes[1]} << 8 | uint32_t{bytes[2]} << 16 | uint32_t{bytes[3]} << 24;
    sum = table[7][sum & 255] ^ table[6][sum >> 8 & 255] ^ table[5][sum >> 16 & 255] ^ table[4][sum >> 24] ^
        table[3][bytes[4]] ^ table[2][bytes[5]] ^ table[1][bytes[6]] ^ table[0][bytes[7]];
  }
  for (; size > 0; bytes++, size--) sum = sum >> 8 ^ table[0][(sum ^ *bytes) & 255];
  return sum;
}

#if defined(__x86_64__) || defined(__aarch64__)

constexpr size_t kPart = 1024; // bytes

// What a sum becomes when kPart zeros follow, for each value of each of its four bytes.
inline const std::array<std::array<uint32_t, 256>, 4>& zerosTable() {
  static const auto table = [] {
    std::array<std::array<uint32_t, 256>, 4> made;
    const std::array<uint8_t, kPart> zeros{};
    for (int place = 0; place < 4; place++) {
      for (uint32_t byte = 0; byte < 256; byte++) {
        made[place][byte] = extendByTable(byte << 8 * place, zeros.data(), zeros.size());
      }
    }
    return made;
  }();
  return table;
}

inline uint32_t followedByZeros(uint32_t sum) {
  const auto& table = zerosTable();
  return table[0][sum & 255] ^ table[1][sum >> 8 & 255] ^ table[2][sum >> 16 & 255] ^ table[3][sum >> 24];
}

#if defined(__x86_64__)
#define GLOO_CRC32C_TARGET __attribute__((target("sse4.2")))
#define GLOO_CRC32C_BYTE(sum, byte) _mm_crc32_u8(sum, byte)
#define GLOO_CRC32C_WORD(sum, word) static_cast<uint32_t>(_mm_crc32_u64(sum, word))
inline bool hasInstruction() { return __builtin_cpu_supports("sse4.2"); }
#else
#define GLOO_CRC32C_TARGET __attribute__((target("+crc")))
#define GLOO_CRC32C_BYTE(sum, byte) __crc32cb(sum, byte)
#define GLOO_CRC32C_WORD(sum, word) __crc32cd(sum, word)
inline bool hasInstruction() { return getauxval(AT_HWCAP) & HWCAP_CRC32; }
#endif

GLOO_CRC32C_TARGET inline uint32_t extendByInstruction(uint32_t sum, const uint8_t* bytes, size_t size) {
  uint64_t word, second, third;
  for (; size >= 3 * kPart; bytes += 3 * kPart, size -= 3 * kPart) {
    uint32_t sums[3] = {sum, 0, 0};
    for (size_t i = 0; i < kPart; i += 8) {
      std::memcpy(&word, bytes + i, 8);
      std::memcpy(&second, bytes + i + kPart, 8);
      std::memcpy(&third, bytes + i + 2 * kPart, 8);
      sums[0] = GLOO_CRC32C_WORD(sums[0], word);
      sums[1] = GLOO_CRC32C_WORD(sums[1], second);
      sums[2] = GLOO_CRC32C_WORD(sums[2], third);
    }
    sum = followedByZeros(followedByZeros(sums[0]) ^ sums[1]) ^ sums[2];
  }
  for (; size >= 8; bytes += 8, size -= 8) {
    std::memcpy(&word, bytes, 8);
    sum = GLOO_CRC32C_WORD(sum, word);
  }
  for (; size > 0; bytes++, size--) sum = GLOO_CRC32C_BYTE(sum, *bytes);
  return sum;
}

#endif

// The checksum of some data, which `sum` is the checksum of what came before of: 0 at the start.
inline uint32_t extend(uint32_t sum, const void* data, size_t size) {
  auto bytes = static_cast<const uint8_t*>(data);
#if defined(__x86_64__) || defined(__aarch64__)
  static const bool fast = hasInstruction();
  if (fast) {
    return ~extendByInstruction(~sum, bytes, size);
  }
#endif
  return ~extendByTable(~sum, bytes, size);
}

} // namespace crc32c
} // namespace gloo
