// Philox4x32-10: four random 32-bit words from a 128-bit counter and a 64-bit key, no state.
// Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
// The draw layout is in graddrop_kernels/masks/philox.py.
#pragma once
#include "host_device.h"

namespace graddrop {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // key increments a round
constexpr int kPhiloxRounds = 10;

// Domains keep the streams of one key apart: the fourth counter word.
enum Domain : uint32_t { kDomainElement, kDomainBlock, kDomainBucket, kDomainGaussian, kDomainRounding,
                       kDomainMoments };

struct PhiloxWords {
  uint32_t word[4];
};

GRADDROP_FN PhiloxWords philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t high0 = mulhi(c0, kPhiloxM0), low0 = c0 * kPhiloxM0;
    const uint32_t high1 = mulhi(c2, kPhiloxM1), low1 = c2 * kPhiloxM1;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// The keys of all rounds, for code that does many calls under one key.
struct PhiloxKeys {
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
};
GRADDROP_FN PhiloxKeys philox_keys(uint64_t key) {
  PhiloxKeys keys;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    keys.k0[round] = static_cast<uint32_t>(key) + round * kPhiloxW0;
    keys.k1[round] = static_cast<uint32_t>(key >> 32) + round * kPhiloxW1;
  }
  return keys;
}

// Call q of a stream: the draws of elements 8q .. 8q + 7 (16 bits each), or the words of elements 4q .. 4q + 3.
GRADDROP_FN PhiloxWords philox_call(uint64_t q, uint32_t draw, uint32_t domain, uint64_t key) {
  return philox4x32_10(static_cast<uint32_t>(q), static_cast<uint32_t>(q >> 32), draw, domain, key);
}

}  // namespace graddrop
