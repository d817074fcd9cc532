// float32, bfloat16 and float16 in memory: 32-bit words of one or two elements, read and written up to four words at a
// time. Rounding is to nearest even, and a NaN stays a NaN. The host and the device give the same bits.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../host_device.h"

namespace graddrop {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

GRADDROP_FN float widen(float x) { return x; }
GRADDROP_FN float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
GRADDROP_FN float widen(Float16 x) { return __half2float(__half(__half_raw{x.bits})); }

GRADDROP_FN void narrow(float x, float& out) { out = x; }
GRADDROP_FN void narrow(float x, BFloat16& out) { out.bits = __nv_bfloat16_raw(__float2bfloat16_rn(x)).x; }
GRADDROP_FN void narrow(float x, Float16& out) { out.bits = __half_raw(__float2half_rn(x)).x; }

// Reads two elements from the words of their group: one word, or two for float32.
GRADDROP_FN void unpack(const uint32_t* word, float& a, float& b, float) {
  a = float_of(word[0]), b = float_of(word[1]);
}
GRADDROP_FN void unpack(const uint32_t* word, float& a, float& b, BFloat16) {
  a = float_of(*word << 16), b = float_of(*word & 0xffff0000u);
}
GRADDROP_FN void unpack(const uint32_t* word, float& a, float& b, Float16) {
  a = widen(Float16{static_cast<uint16_t>(*word)}), b = widen(Float16{static_cast<uint16_t>(*word >> 16)});
}

GRADDROP_FN uint32_t pack(float a, float b, BFloat16) {
  const __nv_bfloat162_raw pair = __floats2bfloat162_rn(a, b);
  return pair.x | static_cast<uint32_t>(pair.y) << 16;
}
GRADDROP_FN uint32_t pack(float a, float b, Float16) {
  const __half2_raw pair = __floats2half2_rn(a, b);
  return pair.x | static_cast<uint32_t>(pair.y) << 16;
}

// Puts the ones of two elements that are to be written into the words of their group.
GRADDROP_FN void merge(uint32_t* word, float a, float b, bool write_a, bool write_b, float) {
  if (write_a) word[0] = bits_of(a);
  if (write_b) word[1] = bits_of(b);
}
template <typename T>
GRADDROP_FN void merge(uint32_t* word, float a, float b, bool write_a, bool write_b, T type) {
  const uint32_t written = (write_a ? 0xffffu : 0) | (write_b ? 0xffff0000u : 0);
  *word = (pack(a, b, type) & written) | (*word & ~written);
}

// kCount neighbouring elements, in one access of 8 or 16 bytes when the address is a multiple of that.
template <typename T, int kCount>
struct Group {
  static constexpr int kWordsAPair = sizeof(T) / 2;
  uint32_t word[sizeof(T) * kCount / 4];
};

// In assembly, because nvcc splits stores of several words, and does not know that an address read from a table is one
// of global memory.
GRADDROP_FN uint4 load_words(const uint4* source) {
#if defined(__CUDA_ARCH__)
  uint4 words;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(source));
  return words;
#else
  return *source;
#endif
}
GRADDROP_FN uint2 load_words(const uint2* source) {
#if defined(__CUDA_ARCH__)
  uint2 words;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "l"(source));
  return words;
#else
  return *source;
#endif
}
GRADDROP_FN void store_words(uint4* target, uint4 words) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
#else
  *target = words;
#endif
}
GRADDROP_FN void store_words(uint2* target, uint2 words) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(target), "r"(words.x), "r"(words.y) : "memory");
#else
  *target = words;
#endif
}

template <typename T>
GRADDROP_FN void load(Group<T, 16 / sizeof(T)>& group, const T* source) {
  const uint4 words = load_words(reinterpret_cast<const uint4*>(source));
  group.word[0] = words.x, group.word[1] = words.y, group.word[2] = words.z, group.word[3] = words.w;
}
template <typename T>
GRADDROP_FN void load(Group<T, 8 / sizeof(T)>& group, const T* source) {
  const uint2 words = load_words(reinterpret_cast<const uint2*>(source));
  group.word[0] = words.x, group.word[1] = words.y;
}
template <typename T>
GRADDROP_FN void store(T* target, const Group<T, 16 / sizeof(T)>& group) {
  store_words(reinterpret_cast<uint4*>(target), uint4{group.word[0], group.word[1], group.word[2], group.word[3]});
}
template <typename T>
GRADDROP_FN void store(T* target, const Group<T, 8 / sizeof(T)>& group) {
  store_words(reinterpret_cast<uint2*>(target), uint2{group.word[0], group.word[1]});
}

}  // namespace graddrop
