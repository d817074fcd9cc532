// Masks of a whole tensor: keep bits, and the bit-planes of buckets. The work of one thread, as in masked_adamw.h.
#pragma once
#include "thread_mask.h"

namespace graddrop {

constexpr int kMaxPlanes = 12;  // 4096 buckets

// Whether eight elements from a multiple of eight on always share one Philox call.
GRADDROP_FN bool whole_calls(const TensorRow& row) { return row.local_inner >= row.numel && row.base % 8 == 0; }

GRADDROP_FN bool keeps(const MaskSpec& mask, uint32_t u16) {
  return mask.kind == kBucket ? bucket_active(bucket_of(u16, mask.buckets), mask) : u16 >= mask.threshold;
}

// The keep bits of local elements first .. first + 16. first is a multiple of 16. The tail is zero.
GRADDROP_FN uint32_t keep_bits(const TensorRow& row, const MaskSpec& mask, int64_t first) {
  const int64_t left = row.numel - first;
  const uint32_t in_bounds = left < 16 ? (1u << left) - 1 : 0xffffu;
  if (mask.kind == kOff) return 0;
  if (mask.kind == kFixed) return row.mask_words[first / 32] >> first % 32 & in_bounds;
  if (mask.kind == kBucket && mask.num_planes >= 0) {
    BucketRange range;
    for (int k = mask.num_planes - 1; k >= 0; --k)
      add_plane(range, row.mask_words[k * ((row.numel + 31) / 32) + first / 32] >> first % 32, mask.first_bucket,
                mask.last_bucket, k);
    return in_range(range) & in_bounds;
  }
  if (mask.kind != kBernoulli && mask.kind != kBucket) return in_bounds;

  const uint32_t domain = mask.kind == kBucket ? kDomainBucket : kDomainElement;
  uint32_t bits = 0;
  if (whole_calls(row)) {
#pragma unroll
    for (int i = 0; i < 16; i += 8) {
      const uint64_t call = static_cast<uint64_t>(row.base + first + i) / 8;
      const PhiloxWords words = philox_call(call, mask.draw, domain, row.key);
#pragma unroll
      for (int e = 0; e < 8; ++e) bits |= static_cast<uint32_t>(keeps(mask, uniform16(words, e))) << (i + e);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < 16 && i < left; ++i) {
      const uint32_t u16 = draw_of(global_index(row, first + i), mask.draw, domain, row.key);
      bits |= static_cast<uint32_t>(keeps(mask, u16)) << i;
    }
  }
  return bits & in_bounds;
}

// Thread t writes bytes 16 t .. 16 t + 16; the last thread writes fewer.
GRADDROP_FN void write_bytes(const TensorRow& row, const MaskSpec& mask, int64_t t, uint8_t* out) {
  const int64_t first = t * 16;
  if (first >= row.numel) return;
  const uint32_t bits = keep_bits(row, mask, first);
  if (first + 16 <= row.numel) {
    uint32_t four[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = (bits >> 4 * i & 15) * 0x00204081u & 0x01010101u;  // a bit to each byte
    *reinterpret_cast<uint4*>(out + first) = {four[0], four[1], four[2], four[3]};
  } else {
    for (int i = 0; first + i < row.numel; ++i) out[first + i] = bits >> i & 1;
  }
}

GRADDROP_FN int64_t words_of(const TensorRow& row) { return (row.numel + 31) / 32; }

// Writes word t of each bit-plane of the tensor's buckets.
GRADDROP_FN void write_planes(const TensorRow& row, uint32_t buckets, int num_planes, int64_t t, uint32_t* planes) {
  const int64_t first = t * 32, num_words = words_of(row);
  if (t >= num_words) return;
  uint32_t plane[kMaxPlanes] = {};
  const int count = row.numel - first < 32 ? static_cast<int>(row.numel - first) : 32;
  if (whole_calls(row)) {
#pragma unroll 1
    for (int i = 0; i < count; i += 8) {
      const PhiloxWords words = philox_call(static_cast<uint64_t>(row.base + first + i) / 8, 0, kDomainBucket, row.key);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const uint32_t bucket = i + e < count ? bucket_of(uniform16(words, e), buckets) : 0;
#pragma unroll
        for (int k = 0; k < kMaxPlanes; ++k) plane[k] |= (bucket >> k & 1) << (i + e);
      }
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const uint32_t bucket = bucket_of(draw_of(global_index(row, first + i), 0, kDomainBucket, row.key), buckets);
#pragma unroll
      for (int k = 0; k < kMaxPlanes; ++k) plane[k] |= (bucket >> k & 1) << i;
    }
  }
#pragma unroll
  for (int k = 0; k < kMaxPlanes; ++k)
    if (k < num_planes) planes[k * num_words + t] = plane[k];
}

}  // namespace graddrop
