// Vectors of 16 floats and 8 doubles in the compiler's own vector extension, and the conversions
// from and to the 16-bit formats. Included only by sources that are compiled once per instruction
// set: everything is static and always inlined, so no copy leaks into another set's code.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace mollm {
namespace {

#define MOLLM_INLINE static inline __attribute__((always_inline))

constexpr int kLanes = 16;

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class V, class T>
MOLLM_INLINE V load_bits(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

MOLLM_INLINE f32x16 select(i32x16 mask, f32x16 yes, f32x16 no) {
  return (f32x16)(((i32x16)yes & mask) | ((i32x16)no & ~mask));
}

MOLLM_INLINE f32x16 load(const float* p) { return load_bits<f32x16>(p); }

MOLLM_INLINE f32x16 load(const bf16* p) {
  return (f32x16)(__builtin_convertvector(load_bits<u16x16>(p), u32x16) << 16);
}

// Of 32 elements those at even and those at odd places, two instructions from one load.
MOLLM_INLINE void load_pairs(const bf16* p, f32x16* even, f32x16* odd) {
  const u32x16 both = load_bits<u32x16>(p);
  *even = (f32x16)(both << 16);
  *odd = (f32x16)(both & 0xffff0000u);
}

// A half is 2^112 too small when its bits are moved under a float's exponent; the product also
// normalises subnormal halves. Infinity and NaN need the float's own top exponent.
MOLLM_INLINE f32x16 load(const fp16* p) {
  const u32x16 h = __builtin_convertvector(load_bits<u16x16>(p), u32x16);
  const u32x16 magnitude = (h & 0x7fff) << 13;
  const f32x16 finite = (f32x16)magnitude * 0x1p112f;
  const u32x16 special = magnitude | 0x7f800000u;
  const i32x16 is_special = (i32x16)(magnitude >= (0x7c00u << 13));
  return (f32x16)((u32x16)select(is_special, (f32x16)special, finite) | ((h & 0x8000) << 16));
}

MOLLM_INLINE void store(float* p, f32x16 v) { std::memcpy(p, &v, sizeof(v)); }

// Round to nearest, ties to even; a NaN stays a quiet NaN. The instruction takes numbers below the
// smallest normal float for zero.
MOLLM_INLINE void store(bf16* p, f32x16 v) {
#ifdef __AVX512BF16__
  const __m256bh out = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &out, sizeof(out));
#else
  const u32x16 bits = (u32x16)v;
  const u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const u32x16 is_nan = (u32x16)((bits & 0x7fffffffu) > 0x7f800000u);
  const u32x16 quiet = (bits >> 16) | 0x40u;
  const u16x16 out = __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), u16x16);
  std::memcpy(p, &out, sizeof(out));
#endif
}

// Subnormal halves are rounded by adding 0.5, whose last bit is the half's last subnormal bit.
MOLLM_INLINE void store(fp16* p, f32x16 v) {
  const u32x16 sign = (u32x16)v & 0x80000000u;
  const u32x16 magnitude = (u32x16)v ^ sign;
  const u32x16 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const u32x16 tiny = (u32x16)((f32x16)magnitude + 0.5f) - 0x3f000000u;
  const u32x16 is_tiny = (u32x16)(magnitude < (113u << 23));
  const u32x16 overflows = (u32x16)(magnitude >= 0x47800000u);
  const u32x16 is_nan = (u32x16)(magnitude > 0x7f800000u);
  const u32x16 inf_or_nan = 0x7c00u | (is_nan & 0x200u);
  u32x16 half = (tiny & is_tiny) | (normal & ~is_tiny);
  half = (inf_or_nan & overflows) | (half & ~overflows);
  const u16x16 out = __builtin_convertvector(half | (sign >> 16), u16x16);
  std::memcpy(p, &out, sizeof(out));
}

MOLLM_INLINE f64x8 widen_low(f32x16 v) {
  f32x8 half;
  std::memcpy(&half, &v, sizeof(half));
  return __builtin_convertvector(half, f64x8);
}

MOLLM_INLINE f64x8 widen_high(f32x16 v) {
  f32x8 half;
  std::memcpy(&half, reinterpret_cast<const char*>(&v) + sizeof(half), sizeof(half));
  return __builtin_convertvector(half, f64x8);
}

MOLLM_INLINE f32x16 maximum(f32x16 a, f32x16 b) { return select(a > b, a, b); }

// exp(x) for x <= 0, 0 below the smallest normal float. With n the integer next to x / log 2 and
// r = x - n log 2, |r| <= log(2) / 2, it is 2^n times the Taylor polynomial of exp(r), whose first
// missing term is 5e-9. log 2 is split so that n * kLog2High is exact. Measured against double over
// [-87.3, 0]: at most 1 ulp with fused multiply-add.
MOLLM_INLINE f32x16 exp_negative(f32x16 x) {
  constexpr float kLowest = -87.33654f, kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves no bits for a fraction
  const i32x16 vanishes = x < kLowest;
  const f32x16 rounded = x * 1.44269504f + kRound;
  const f32x16 n = rounded - kRound;
  const f32x16 r = (x - n * kLog2High) - n * kLog2Low;
  f32x16 p = r * (1.f / 5040) + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const f32x16 power = (f32x16)(((u32x16)rounded + (127u - 0x4b400000u)) << 23);
  return select(vanishes, f32x16{}, p * power);
}

// Of every lane.
template <class V>
MOLLM_INLINE V square_root(V x) {
  using S = std::remove_reference_t<decltype(x[0])>;
  S lanes[sizeof(V) / sizeof(S)];
  std::memcpy(lanes, &x, sizeof(x));
  for (S& lane : lanes) lane = sqrt(lane);
  std::memcpy(&x, lanes, sizeof(x));
  return x;
}
MOLLM_INLINE float square_root(float x) { return sqrtf(x); }
MOLLM_INLINE double square_root(double x) { return sqrt(x); }

MOLLM_INLINE double sum(f64x8 v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

}  // namespace
}  // namespace mollm
