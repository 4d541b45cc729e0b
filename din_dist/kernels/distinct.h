// Distinct ids and their inverse.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace din {

constexpr int32_t kNoRow = -1;

// Numbers the distinct ids of `all` in the order of their first occurrence, and finds the number of each id in `all`.
// With `padded`, ids of kNoRow are padding and have no number.
class Distinct {
 public:
  Distinct(const int32_t* all, int64_t count, bool padded = false) : places(count, kNoRow), is_first(count, false) {
    int bits = 4;
    while ((int64_t{1} << bits) < 2 * count) ++bits;
    const size_t mask = (size_t{1} << bits) - 1;
    std::vector<int32_t> slots(mask + 1, kNoRow);  // indices into `ids`
    for (int64_t i = 0; i < count; ++i) {
      if (padded && all[i] == kNoRow) continue;
      size_t slot = (static_cast<uint32_t>(all[i]) * 2654435769u) >> (32 - std::min(bits, 32)) & mask;
      while (slots[slot] != kNoRow && ids[slots[slot]] != all[i]) slot = (slot + 1) & mask;
      if (slots[slot] == kNoRow) {
        slots[slot] = static_cast<int32_t>(ids.size());
        ids.push_back(all[i]);
        is_first[i] = true;
      }
      places[i] = slots[slot];
    }
  }

  std::vector<int32_t> ids, places;
  std::vector<char> is_first;
};

}  // namespace din
