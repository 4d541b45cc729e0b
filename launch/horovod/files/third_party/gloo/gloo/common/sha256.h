// SHA-256 (FIPS 180-4) and HMAC with it (RFC 2104): proofs that a peer knows the key of its job. Small messages only: it is
// not made for speed.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

namespace gloo {

using Digest = std::array<uint8_t, 32>;

class Sha256 {
 public:
  void update(const void* data, size_t size) {
    auto bytes = static_cast<const uint8_t*>(data);
    total_ += size;
    while (size > 0) {
      const size_t taken = std::min(size, block_.size() - filled_);
      std::memcpy(block_.data() + filled_, bytes, taken);
      filled_ += taken;
      bytes += taken;
      size -= taken;
      if (filled_ == block_.size()) {
        addBlock();
        filled_ = 0;
      }
    }
  }

  Digest finish() {
    const uint64_t bits = total_ * 8;
    const uint8_t one = 0x80, zero = 0;
    update(&one, 1);
    while (filled_ != 56) update(&zero, 1);
    for (int shift = 56; shift >= 0; shift -= 8) {
      const uint8_t byte = bits >> shift;
      update(&byte, 1);
    }
    Digest digest;
    for (size_t i = 0; i < digest.size(); i++) digest[i] = state_[i / 4] >> (24 - i % 4 * 8);
    return digest;
  }

 private:
  static uint32_t rotated(uint32_t word, int bits) { return word >> bits | word << (32 - bits); }

  void addBlock() {
    static const uint32_t constants[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    uint32_t words[64];
    for (int i = 0; i < 16; i++) {
      words[i] = uint32_t{block_[4 * i]} << 24 | uint32_t{block_[4 * i + 1]} << 16 | uint32_t{block_[4 * i + 2]} << 8 |
          uint32_t{block_[4 * i + 3]};
    }
    for (int i = 16; i < 64; i++) {
      const uint32_t early = words[i - 15], late = words[i - 2];
      words[i] = words[i - 16] + (rotated(early, 7) ^ rotated(early, 18) ^ early >> 3) + words[i - 7] +
          (rotated(late, 17) ^ rotated(late, 19) ^ late >> 10);
    }
    uint32_t a = state_[0], b = state_[1], c = state_[2], d = state_[3];
    uint32_t e = state_[4], f = state_[5], g = state_[6], h = state_[7];
    for (int i = 0; i < 64; i++) {
      const uint32_t first =
          h + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) + ((e & f) ^ (~e & g)) + constants[i] + words[i];
      const uint32_t second = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      h = g;
      g = f;
      f = e;
      e = d + first;
      d = c;
      c = b;
      b = a;
      a = first + second;
    }
    const uint32_t mixed[8] = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; i++) state_[i] += mixed[i];
  }

  std::array<uint32_t, 8> state_{
      {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}};
  std::array<uint8_t, 64> block_;
  size_t filled_ = 0;
  uint64_t total_ = 0;
};

// Each part is preceded by its length, so that no two lists of parts are the same bytes.
class Hmac {
 public:
  explicit Hmac(const std::string& key) {
    std::array<uint8_t, 64> padded{};
    if (key.size() > padded.size()) {
      Sha256 hash;
      hash.update(key.data(), key.size());
      const Digest digest = hash.finish();
      std::memcpy(padded.data(), digest.data(), digest.size());
    } else {
      std::memcpy(padded.data(), key.data(), key.size());
    }
    for (auto& byte : padded) byte ^= 0x36;
    inner_.update(padded.data(), padded.size());
    for (auto& byte : padded) byte ^= 0x36 ^ 0x5c;
    outer_.update(padded.data(), padded.size());
  }

  void update(const void* data, size_t size) { inner_.update(data, size); }

  Hmac& add(const void* data, size_t size) {
    uint8_t length[8];
    for (int i = 0; i < 8; i++) length[i] = uint64_t{size} >> (56 - 8 * i);
    update(length, sizeof(length));
    update(data, size);
    return *this;
  }

  Hmac& add(const std::string& part) { return add(part.data(), part.size()); }

  Digest finish() {
    const Digest digest = inner_.finish();
    outer_.update(digest.data(), digest.size());
    return outer_.finish();
  }

 private:
  Sha256 inner_, outer_;
};

// In a time that does not depend on where the two differ.
inline bool isSame(const void* one, const void* other, size_t size) {
  auto first = static_cast<const volatile uint8_t*>(one);
  auto second = static_cast<const volatile uint8_t*>(other);
  uint8_t difference = 0;
  for (size_t i = 0; i < size; i++) difference |= first[i] ^ second[i];
  return difference == 0;
}

inline std::string toHex(const uint8_t* bytes, size_t size) {
  static const char digits[] = "0123456789abcdef";
  std::string text;
  for (size_t i = 0; i < size; i++) {
    text += digits[bytes[i] >> 4];
    text += digits[bytes[i] & 15];
  }
  return text;
}

} // namespace gloo
