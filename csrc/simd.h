// Vectors as wide as a register, in the compiler's own vector extension, and the conversions from
// and to the 16-bit formats. Wider ones GCC keeps in memory, several times slower. Included only by
// sources that are compiled once per instruction set: everything is static and always inlined, so
// no copy leaks into another set's code.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX__
#include <immintrin.h>
#endif

namespace mollm {
namespace {

#define MOLLM_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kVector = 64, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kVector = 32, kRegisters = 16;
#elif defined(__x86_64__)
constexpr int kVector = 16, kRegisters = 16;
#else
constexpr int kVector = 16, kRegisters = 32;
#endif
constexpr int kLanes = kVector / 4;

typedef float f32v __attribute__((vector_size(kVector)));
typedef int32_t i32v __attribute__((vector_size(kVector)));
typedef uint32_t u32v __attribute__((vector_size(kVector)));
typedef uint16_t u16v __attribute__((vector_size(kVector / 2)));
typedef double f64v __attribute__((vector_size(kVector)));
typedef float f32h __attribute__((vector_size(kVector / 2)));

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

MOLLM_INLINE f32v select(i32v mask, f32v yes, f32v no) {
  return (f32v)(((i32v)yes & mask) | ((i32v)no & ~mask));
}

MOLLM_INLINE f32v load(const float* p) { return load_bits<f32v>(p); }

MOLLM_INLINE f32v load(const bf16* p) {
  return (f32v)(__builtin_convertvector(load_bits<u16v>(p), u32v) << 16);
}

// Of two vectors' elements those at even and those at odd places, two instructions from one load.
MOLLM_INLINE void load_pairs(const bf16* p, f32v* even, f32v* odd) {
  const u32v both = load_bits<u32v>(p);
  *even = (f32v)(both << 16);
  *odd = (f32v)(both & 0xffff0000u);
}

MOLLM_INLINE f32v add_products(f32v sum, f32v x, f32v y) { return sum + x * y; }

// sum + x y, of two elements to a lane. The instruction takes what is below the smallest
// normal float for zero.
MOLLM_INLINE f32v add_products(f32v sum, u32v x, u32v y) {
#ifdef __AVX512BF16__
  return (f32v)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
#else
  sum += (f32v)(x << 16) * (f32v)(y << 16);
  return sum + (f32v)(x & 0xffff0000u) * (f32v)(y & 0xffff0000u);
#endif
}

MOLLM_INLINE f32v load(const fp16* p) {
#if defined(__AVX512F__)  // the masked form, for GCC 12 warns of the other's own definition
  return (f32v)_mm512_maskz_cvtph_ps(0xffff, load_bits<__m256i>(p));
#elif defined(__F16C__)
  return (f32v)_mm256_cvtph_ps(load_bits<__m128i>(p));
#else
  // A half is 2^112 too small when its bits are moved under a float's exponent; the product also
  // normalises subnormal halves. Infinity and NaN need the float's own top exponent.
  const u32v h = __builtin_convertvector(load_bits<u16v>(p), u32v);
  const u32v magnitude = (h & 0x7fff) << 13;
  const f32v finite = (f32v)magnitude * 0x1p112f;
  const u32v special = magnitude | 0x7f800000u;
  const i32v is_special = (i32v)(magnitude >= (0x7c00u << 13));
  return (f32v)((u32v)select(is_special, (f32v)special, finite) | ((h & 0x8000) << 16));
#endif
}

MOLLM_INLINE void store(float* p, f32v v) { std::memcpy(p, &v, sizeof(v)); }

// Round to nearest, ties to even; a NaN stays a quiet NaN. The instruction takes numbers below the
// smallest normal float for zero.
MOLLM_INLINE void store(bf16* p, f32v v) {
#ifdef __AVX512BF16__
  const __m256bh out = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &out, sizeof(out));
#else
  const u32v bits = (u32v)v;
  const u32v rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const u32v is_nan = (u32v)((bits & 0x7fffffffu) > 0x7f800000u);
  const u32v quiet = (bits >> 16) | 0x40u;
  const u16v out = __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), u16v);
  std::memcpy(p, &out, sizeof(out));
#endif
}

MOLLM_INLINE void store(fp16* p, f32v v) {
#if defined(__AVX512F__)
  const __m256i out = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  const __m128i out = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  // Subnormal halves are rounded by adding 0.5, whose last bit is the half's last subnormal bit.
  const u32v sign = (u32v)v & 0x80000000u;
  const u32v magnitude = (u32v)v ^ sign;
  const u32v normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const u32v tiny = (u32v)((f32v)magnitude + 0.5f) - 0x3f000000u;
  const u32v is_tiny = (u32v)(magnitude < (113u << 23));
  const u32v overflows = (u32v)(magnitude >= 0x47800000u);
  const u32v is_nan = (u32v)(magnitude > 0x7f800000u);
  const u32v inf_or_nan = 0x7c00u | (is_nan & 0x200u);
  u32v half = (tiny & is_tiny) | (normal & ~is_tiny);
  half = (inf_or_nan & overflows) | (half & ~overflows);
  const u16v out = __builtin_convertvector(half | (sign >> 16), u16v);
#endif
  std::memcpy(p, &out, sizeof(out));
}

MOLLM_INLINE f64v widen_low(f32v v) {
  f32h half;
  std::memcpy(&half, &v, sizeof(half));
  return __builtin_convertvector(half, f64v);
}

MOLLM_INLINE f64v widen_high(f32v v) {
  f32h half;
  std::memcpy(&half, reinterpret_cast<const char*>(&v) + sizeof(half), sizeof(half));
  return __builtin_convertvector(half, f64v);
}

MOLLM_INLINE f32v maximum(f32v a, f32v b) { return select(a > b, a, b); }

// exp(x) for x <= 0, 0 below the smallest normal float. With n the integer next to x / log 2 and
// r = x - n log 2, |r| <= log(2) / 2, it is 2^n times the Taylor polynomial of exp(r), whose first
// missing term is 5e-9. log 2 is split so that n * kLog2High is exact. Measured against double over
// [-87.3, 0]: at most 1 ulp with fused multiply-add.
MOLLM_INLINE f32v exp_negative(f32v x) {
  constexpr float kLowest = -87.33654f, kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves no bits for a fraction
  const i32v vanishes = x < kLowest;
  const f32v rounded = x * 1.44269504f + kRound;
  const f32v n = rounded - kRound;
  const f32v r = (x - n * kLog2High) - n * kLog2Low;
  f32v p = r * (1.f / 5040) + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const f32v power = (f32v)(((u32v)rounded + (127u - 0x4b400000u)) << 23);
  return select(vanishes, f32v{}, p * power);
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

MOLLM_INLINE double sum(f64v v) {
  for (int half = kLanes / 4; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) v[lane] += v[lane + half];
  return v[0];
}

}  // namespace
}  // namespace mollm
