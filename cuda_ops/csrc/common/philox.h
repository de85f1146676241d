// common/philox.h   Random bits that are a function of (key, counter): Philox4x32-10.
//
// Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". No state, so a token's noise does not
// depend on which tokens were sampled before it or beside it.

#pragma once

#include <cstdint>

namespace octet {

struct Philox {
  uint32_t word[4];
};

inline Philox philox(uint64_t key, const Philox& counter) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  Philox c = counter;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c.word[0], b = uint64_t(0xCD9E8D57u) * c.word[2];
    c = {{uint32_t(b >> 32) ^ c.word[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ c.word[3] ^ k1, uint32_t(a)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

}  // namespace octet
