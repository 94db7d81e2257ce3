// Compiled once per instruction set into the namespace MOLLM_ISA.
//
// A row is swept three times: its maximum, the sum of its exponentials, its gradient. Only the
// first sweep comes from memory; a row of 128256 floats stays in a core's L2 for the others.
//
// Of capped logits the sweep that sums keeps, in a scratch row, what the gradient needs: no
// hyperbolic tangent is computed twice. A cap bounds the logits, so that a small one makes the
// sweep for their maximum superfluous.
#include "rows_kernels.h"

#include <cmath>
#include <limits>

#include "simd.h"

namespace mollm {
namespace {

constexpr int64_t kFlush = 2048;  // floats added before they go into doubles
constexpr float kInfinity = std::numeric_limits<float>::infinity();

MOLLM_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// The last, partial vector: the missing lanes are minus infinity, whose exponential adds nothing.
template <class T>
MOLLM_INLINE f32v load_logits(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  T some[kLanes] = {};
  std::memcpy(some, p, static_cast<size_t>(count) * sizeof(T));
  f32v v = load(some);
  for (int64_t n = count; n < kLanes; ++n) v[n] = -kInfinity;
  return v;
}

template <class T>
MOLLM_INLINE void store_some(T* p, f32v v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  T some[kLanes];
  store(some, v);
  std::memcpy(p, some, static_cast<size_t>(count) * sizeof(T));
}

template <class T>
MOLLM_INLINE double at(const T* p) {
  return load_logits(p, 1)[0];
}

MOLLM_INLINE double at(const double* p) { return *p; }

template <class T>
MOLLM_INLINE void put(T* p, double v) {
  store_some(p, f32v{} + static_cast<float>(v), 1);
}

MOLLM_INLINE void put(double* p, double v) { *p = v; }

MOLLM_INLINE double sum(f32v v) { return sum(widen_low(v) + widen_high(v)); }

// Calls f(n, count) for every vector of [begin, end); all but the last have count == kLanes.
template <class F>
MOLLM_INLINE void for_vectors(int64_t begin, int64_t end, const F& f) {
  int64_t n = begin;
  for (; n + kLanes <= end; n += kLanes) f(n, static_cast<int64_t>(kLanes));
  if (n < end) f(n, end - n);
}

// ---- sweeps in float

template <class T>
static double maximum(const T* z, int64_t count) {
  f32v top = f32v{} - kInfinity;
  for_vectors(0, count, [&](int64_t n, int64_t some) __attribute__((always_inline)) {
    top = maximum(top, load_logits(z + n, some));
  });
  float m = top[0];
  for (int lane = 1; lane < kLanes; ++lane) m = top[lane] > m ? top[lane] : m;
  return m;
}

template <class T>
static double sum_exp(const T* z, int64_t count, double scale, double m) {
  const float s = static_cast<float>(scale), shift = static_cast<float>(m);
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kFlush) {
    f32v partial = {};
    for_vectors(begin, min64(begin + kFlush, count),
                [&](int64_t n, int64_t some) __attribute__((always_inline)) {
                  partial += exp_negative(load_logits(z + n, some) * s - shift);
                });
    total += sum(partial);
  }
  return total;
}

// gradient_j = factor exp(scale z_j - m)
template <class T, class G>
static void write_softmax(const T* z, int64_t count, double scale, double m, double factor,
                          G* gradient) {
  const float s = static_cast<float>(scale), shift = static_cast<float>(m);
  const float f = static_cast<float>(factor);
  for_vectors(0, count, [&](int64_t n, int64_t some) __attribute__((always_inline)) {
    store_some(gradient + n, exp_negative(load_logits(z + n, some) * s - shift) * f, some);
  });
}

// gradient_j = factor terms_j
template <class G>
static void write_terms(const float* terms, int64_t count, double factor, G* gradient) {
  const float f = static_cast<float>(factor);
  for_vectors(0, count, [&](int64_t n, int64_t some) __attribute__((always_inline)) {
    store_some(gradient + n, load_logits(terms + n, some) * f, some);
  });
}

// logits_j = scale z_j - m
template <class T>
static void keep_logits(const T* z, int64_t count, double scale, double m, float* logits) {
  const float s = static_cast<float>(scale), shift = static_cast<float>(m);
  for_vectors(0, count, [&](int64_t n, int64_t some) __attribute__((always_inline)) {
    store_some(logits + n, load_logits(z + n, some) * s - shift, some);
  });
}

template <class V>
struct CappedTo {
  V value, slope;  // c tanh(x / c), and its derivative by x
};

// With a = |x| / c, u = exp(-2a) and w = 1 - u = -expm1(-2a):
//     tanh a = w / (2 - w),  1 - tanh^2 a = 4u / (2 - w)^2.
// Near 0 w has all digits of tanh, near saturation u has all of the derivative. The exponential is
// that of exp_negative, with the 1 of its polynomial added last. A division would cost more than
// all the rest: for d in [1, 2] the quadratic is 1 / d to r <= 1/99, and (1 + r)(1 + r^2) takes
// that to r^4.
MOLLM_INLINE CappedTo<f32v> capped_far(f32v x, float cap, float minus_two_over_cap) {
  constexpr float kLowest = -87.33654f, kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.f;
  const u32v sign = (u32v)x & 0x80000000u;
  const f32v b = (f32v)((u32v)x ^ sign) * minus_two_over_cap;
  const f32v least = select(b < kLowest, f32v{} + kLowest, b);
  const f32v rounded = least * 1.44269504f + kRound;
  const f32v n = rounded - kRound;
  const f32v r = (least - n * kLog2High) - n * kLog2Low;
  f32v q = r * (1.f / 5040) + 1.f / 720;
  q = q * r + 1.f / 120;
  q = q * r + 1.f / 24;
  q = q * r + 1.f / 6;
  q = q * r + 0.5f;
  q = q * (r * r) + r;
  const f32v power = (f32v)(((u32v)rounded + (127u - 0x4b400000u)) << 23);
  const f32v u = q * power + power, w = (1.f - power) - q * power, d = 2.f - w;
  f32v inverse = (d * (32.f / 99) - 144.f / 99) * d + 210.f / 99;
  const f32v rest = 1.f - d * inverse;
  inverse = inverse * rest + inverse;
  inverse = inverse * (rest * rest) + inverse;
  const f32v magnitude = w * (inverse * cap);
  return {(f32v)((u32v)magnitude | sign), u * (4.f * (inverse * inverse))};
}

MOLLM_INLINE bool all_at_most(f32v v, float limit) {  // false of a NaN
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(limit), _CMP_LE_OQ) == 0xffff;
#elif defined(__AVX__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(limit), _CMP_LE_OQ)) == 0xff;
#else
  const i32v larger = ~(v <= limit);
  uint64_t words[kVector / 8], any = 0;
  std::memcpy(words, &larger, sizeof(words));
  for (uint64_t word : words) any |= word;
  return any == 0;
#endif
}

// tanh(a) / a to 1e-7 where a^2 <= 1.
MOLLM_INLINE f32v tanh_ratio(f32v square) {
  f32v q = square * -3.523280943633135e-4f + 2.2786476648711633e-3f;
  q = q * square - 7.912485058835692e-3f;
  q = q * square + 2.1461410155256627e-2f;
  q = q * square - 5.386970672481632e-2f;
  q = q * square + 0.1333213930517482f;
  q = q * square - 0.3333327737813325f;
  return q * square + 0.9999999956422977f;
}

// The same. Few logits are beyond their cap: up to it a polynomial takes half the time, and
// 1 - tanh^2 has its digits.
MOLLM_INLINE CappedTo<f32v> capped(f32v x, float cap, float over_cap) {
  const f32v a = x * over_cap, s = a * a;
  if (__builtin_expect(!all_at_most(s, 1.f), 0)) return capped_far(x, cap, -2 * over_cap);
  const f32v t = a * tanh_ratio(s);
  return {t * cap, 1.f - t * t};
}

// 2^y for |y| <= 100: exp_negative's way without its reduction, and a polynomial to 2e-9.
MOLLM_INLINE f32v power_of_two(f32v y) {
  constexpr float kRound = 12582912.f;
  const f32v rounded = y + kRound;
  const f32v f = y - (rounded - kRound);
  f32v p = f * 1.5461444699e-4f + 1.3400428178e-3f;
  p = p * f + 9.6180566785e-3f;
  p = p * f + 5.5503272267e-2f;
  p = p * f + 2.4022650922e-1f;
  p = p * f + 6.9314720670e-1f;
  p = p * f + 1.f;
  return (f32v)((u32v)p + ((u32v)rounded << 23));  // n is in rounded's last bits
}

// What a sweep over the logits of a small cap keeps.
enum class Keeps { kNothing, kProducts, kLogits, kLogitsAndSlopes };

constexpr double kSmallCap = 60;  // exp(+-60) and sums of it are normal floats: no shift is needed

// sum_exp_capped for a cap of at most kSmallCap and m = 0. Most logits are within half their cap,
// where a shorter polynomial is tanh(a) / a to 1e-8.
template <Keeps keeps, class T>
static double sum_exp_small_cap(const T* z, int64_t count, LogitMap map, float* logits,
                                float* slopes, float* products) {
  const float cap = static_cast<float>(map.cap);
  const float to_a = static_cast<float>(map.scale / map.cap);
  const float to_power = static_cast<float>(map.cap * 1.4426950408889634);
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kFlush) {
    f32v partial = {};
    for_vectors(begin, min64(begin + kFlush, count),
                [&](int64_t n, int64_t some) __attribute__((always_inline)) {
                  const f32v z0 = load_logits(z + n, some);
                  const f32v a = z0 * to_a, square = a * a;
                  f32v t, slope;
                  bool far = false;
                  if (all_at_most(square, 0.25f)) {
                    f32v q = square * 1.7131344431e-2f - 5.2984238829e-2f;
                    q = q * square + 1.3324750505e-1f;
                    q = q * square - 3.3333067944e-1f;
                    t = a * (q * square + 9.9999998676e-1f);
                    slope = 1.f - t * t;
                  } else if (all_at_most(square, 1.f)) {
                    t = a * tanh_ratio(square);
                    slope = 1.f - t * t;
                  } else {
                    const auto found = capped_far(a, 1, -2);
                    t = found.value;
                    slope = found.slope;
                    far = true;
                  }
                  f32v e = power_of_two(t * to_power);
                  if (far) e += t - t;  // NaN stays NaN, whose last bits the power would take in
                  if (some == kLanes) {
                    partial += e;
                  } else {
                    for (int64_t lane = 0; lane < some; ++lane) partial[lane] += e[lane];
                  }
                  if constexpr (keeps == Keeps::kProducts) {
                    store_some(products + n, e * slope, some);
                  } else if constexpr (keeps != Keeps::kNothing) {
                    store_some(logits + n, t * cap, some);
                    if constexpr (keeps == Keeps::kLogitsAndSlopes)
                      store_some(slopes + n, slope, some);
                  }
                });
    total += sum(partial);
  }
  return total;
}

template <class T>
static double sum_exp_small_cap(const T* z, int64_t count, LogitMap map, float* logits,
                                float* slopes, float* products) {
  const auto sum_as = [&](auto sweep) { return sweep(z, count, map, logits, slopes, products); };
  if (products) return sum_as(sum_exp_small_cap<Keeps::kProducts, T>);
  if (slopes) return sum_as(sum_exp_small_cap<Keeps::kLogitsAndSlopes, T>);
  if (logits) return sum_as(sum_exp_small_cap<Keeps::kLogits, T>);
  return sum_as(sum_exp_small_cap<Keeps::kNothing, T>);
}

// Sum of exp(c tanh(scale z_j / c) - m); where asked, the logits less m, their slopes, and the
// products of exponential and slope are kept.
template <class T>
static double sum_exp_capped(const T* z, int64_t count, LogitMap map, double m, float* logits,
                             float* slopes, float* products) {
  if (map.cap <= kSmallCap) return sum_exp_small_cap(z, count, map, logits, slopes, products);
  const float s = static_cast<float>(map.scale), shift = static_cast<float>(m);
  const float cap = static_cast<float>(map.cap), over_cap = static_cast<float>(1 / map.cap);
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kFlush) {
    f32v partial = {};
    for_vectors(begin, min64(begin + kFlush, count),
                [&](int64_t n, int64_t some) __attribute__((always_inline)) {
                  const auto [y, slope] = capped(load_logits(z + n, some) * s, cap, over_cap);
                  const f32v x = y - shift;
                  const f32v e = exp_negative(x);
                  if (some == kLanes) {
                    partial += e;
                  } else {
                    for (int64_t lane = 0; lane < some; ++lane) partial[lane] += e[lane];
                  }
                  if (logits) store_some(logits + n, x, some);
                  if (slopes) store_some(slopes + n, slope, some);
                  if (products) store_some(products + n, e * slope, some);
                });
    total += sum(partial);
  }
  return total;
}

// exp(-d) + d - 1 for |d| < 1/4, where the plain form cancels.
MOLLM_INLINE f32v phi_series(f32v d) {
  return d * d * (1.f / 2 - d * (1.f / 6 - d * (1.f / 24 - d * (1.f / 120 - d * (1.f / 720)))));
}

struct Shift {
  double m;  // max z
  double x;  // z_t - m
  double S;  // the sum of exp(z_j - m), j != t
  double Z;  // S + exp(x)
};

struct Factors {
  double ce, kl;  // of e_j in the gradient of cross-entropy, of p_j - p_ref_j in that of KL
};

// A row of logits scale z_j; gradients are multiplied by the slopes, if there are any.
template <class T, class Wide>
struct Row {
  const T* z;
  double scale;
  const Wide* slopes;
};

// Returns sum_j p_ref_j phi(log p_ref_j - log p_j); writes the gradients that are not null.
template <class T, class G>
static double sweep_kl(Row<T, float> row, Shift own, Row<T, float> ref_row, Shift ref,
                       int64_t count, Factors factors, G* ce_gradient, G* kl_gradient) {
  const T* z = row.z;
  const T* z_ref = ref_row.z;
  const float* slopes = row.slopes;
  const float s = static_cast<float>(row.scale), s_ref = static_cast<float>(ref_row.scale);
  const float m = static_cast<float>(own.m), m_ref = static_cast<float>(ref.m);
  const float inv = static_cast<float>(1 / own.Z), inv_ref = static_cast<float>(1 / ref.Z);
  const float log_ratio = static_cast<float>(std::log(ref.Z) - std::log(own.Z));
  const float ce = static_cast<float>(factors.ce), kl = static_cast<float>(factors.kl);
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kFlush) {
    f32v partial = {};
    for_vectors(begin, min64(begin + kFlush, count),
                [&](int64_t n, int64_t some) __attribute__((always_inline)) {
                  const f32v x = load_logits(z + n, some) * s - m;
                  const f32v x_ref = load_logits(z_ref + n, some) * s_ref - m_ref;
                  const f32v e = exp_negative(x);
                  const f32v p = e * inv, p_ref = exp_negative(x_ref) * inv_ref;
                  const f32v d = (x_ref - x) - log_ratio;
                  const f32v far = p - p_ref + p_ref * d;
                  const i32v is_near = (d < 0.25f) & (d > -0.25f);
                  const f32v term = select(is_near, p_ref * phi_series(d), far);
                  partial += select(p_ref == 0.f, p, term);
                  f32v to_ce = e * ce, to_kl = (p - p_ref) * kl;
                  if (slopes) {
                    const f32v slope = load_logits(slopes + n, some);
                    to_ce *= slope;
                    to_kl *= slope;
                  }
                  if (ce_gradient) store_some(ce_gradient + n, to_ce, some);
                  if (kl_gradient) store_some(kl_gradient + n, to_kl, some);
                });
    total += sum(partial);
  }
  return total;
}

// ---- the same sweeps in double

static double maximum(const double* z, int64_t count) {
  double m = z[0];
  for (int64_t n = 1; n < count; ++n) m = z[n] > m ? z[n] : m;
  return m;
}

static double sum_exp(const double* z, int64_t count, double scale, double m) {
  double total = 0;
  for (int64_t n = 0; n < count; ++n) total += std::exp(scale * z[n] - m);
  return total;
}

static void write_softmax(const double* z, int64_t count, double scale, double m, double factor,
                          double* gradient) {
  for (int64_t n = 0; n < count; ++n) gradient[n] = factor * std::exp(scale * z[n] - m);
}

static void write_terms(const double* terms, int64_t count, double factor, double* gradient) {
  for (int64_t n = 0; n < count; ++n) gradient[n] = factor * terms[n];
}

static void keep_logits(const double* z, int64_t count, double scale, double m, double* logits) {
  for (int64_t n = 0; n < count; ++n) logits[n] = scale * z[n] - m;
}

static CappedTo<double> capped(double x, double cap) {
  const double a = std::fabs(x) / cap, u = std::exp(-2 * a), w = -std::expm1(-2 * a);
  return {std::copysign(cap * (w / (2 - w)), x), 4 * u / ((2 - w) * (2 - w))};
}

static double sum_exp_capped(const double* z, int64_t count, LogitMap map, double m, double* logits,
                             double* slopes, double* products) {
  double total = 0;
  for (int64_t n = 0; n < count; ++n) {
    const auto [y, slope] = capped(map.scale * z[n], map.cap);
    const double e = std::exp(y - m);
    total += e;
    if (logits) logits[n] = y - m;
    if (slopes) slopes[n] = slope;
    if (products) products[n] = e * slope;
  }
  return total;
}

// exp(-d) + d - 1 for |d| <= 0.1.
static double phi_series(double d) {
  double series = 0, term = 1;
  for (int k = 2; k < 13; ++k) series += term *= (k == 2 ? d * d / 2 : -d / k);
  return series;
}

static double sweep_kl(Row<double, double> row, Shift own, Row<double, double> ref_row, Shift ref,
                       int64_t count, Factors factors, double* ce_gradient, double* kl_gradient) {
  const double log_ratio = std::log(ref.Z) - std::log(own.Z);
  double total = 0;
  for (int64_t n = 0; n < count; ++n) {
    const double x = row.scale * row.z[n] - own.m;
    const double x_ref = ref_row.scale * ref_row.z[n] - ref.m;
    const double e = std::exp(x), p = e / own.Z, p_ref = std::exp(x_ref) / ref.Z;
    const double d = (x_ref - x) - log_ratio;
    const double term = std::fabs(d) <= 0.1 ? p_ref * phi_series(d) : p - p_ref + p_ref * d;
    total += p_ref == 0 ? p : term;
    const double slope = row.slopes ? row.slopes[n] : 1;
    if (ce_gradient) ce_gradient[n] = e * factors.ce * slope;
    if (kl_gradient) kl_gradient[n] = (p - p_ref) * factors.kl * slope;
  }
  return total;
}

// ---- one row

// Cross-entropy or UCE of a row, from sums alone.
struct LogLoss {
  double loss;
  double at_others;  // dL/dz_j = at_others * e_j, j != t
  double at_target;  // dL/dz_t
};

// Never 1 - p: S / Z keeps its digits.
LogLoss log_loss(const Shift& z, double eps) {
  const double e_t = std::exp(z.x);
  if (eps > 0) {
    const double s = (1 - eps) * e_t / (z.S + eps * e_t);
    return {std::log1p(s), -s / z.Z, s * (z.S / z.Z)};
  }
  const double loss = z.x > -30 ? std::log1p(z.S / e_t) : std::log(z.Z) - z.x;
  return {loss, 1 / z.Z, -(z.S / z.Z)};
}

// Reference and model are added up in the same order: where they agree, KL is exactly zero.
template <class T>
static Shift shift_of(const T* z, int64_t t, int64_t V, double scale) {
  const double m = scale * maximum(z, V), x = scale * at(z + t) - m;
  const double S = sum_exp(z, t, scale, m) + sum_exp(z + t + 1, V - t - 1, scale, m);
  return {m, x, S, S + std::exp(x)};
}

// What a sweep over capped logits keeps; null for what nobody needs.
template <class Wide>
struct Kept {
  Wide* logits;    // z_j - m
  Wide* slopes;    // dz_j / d(scale z0_j)
  Wide* products;  // exp(z_j - m) slope_j, j != t

  Kept from(int64_t n) const {
    return {logits ? logits + n : nullptr, slopes ? slopes + n : nullptr,
            products ? products + n : nullptr};
  }
};

template <class T, class Wide>
static Shift capped_shift_of(const T* z, int64_t t, int64_t V, LogitMap map, Kept<Wide> kept) {
  const double m = map.cap > kSmallCap ? capped(map.scale * maximum(z, V), map.cap).value : 0;
  const auto sum_of = [&](int64_t begin, int64_t end) {
    const Kept<Wide> to = kept.from(begin);
    return sum_exp_capped(z + begin, end - begin, map, m, to.logits, to.slopes, to.products);
  };
  const double S = sum_of(0, t) + sum_of(t + 1, V);
  const CappedTo<double> target = capped(map.scale * at(z + t), map.cap);
  const double x = target.value - m;
  if (kept.logits) kept.logits[t] = static_cast<Wide>(x);
  if (kept.slopes) kept.slopes[t] = static_cast<Wide>(target.slope);
  return {m, x, S, S + std::exp(x)};
}

// A row of KL whose logits, or those of the other row, are capped: in scratch rows, less m.
template <class T, class Wide>
static Row<Wide, Wide> kept_row(const T* z, int64_t t, int64_t V, LogitMap map, Wide* logits,
                                Wide* slopes, Shift* shift) {
  if (map.cap > 0) {
    *shift = capped_shift_of<T, Wide>(z, t, V, map, {logits, slopes, nullptr});
  } else {
    *shift = shift_of(z, t, V, map.scale);
    keep_logits(z, V, map.scale, shift->m, logits);
    slopes = nullptr;
  }
  shift->m = 0;
  return {logits, 1, slopes};
}

template <class Wide>
double scale_at(const RowLoss& to, int64_t r) {
  return static_cast<const Wide*>(to.scale)[r * to.scale_stride];
}

template <class Wide>
void set_loss(const RowLoss& to, int64_t r, double loss) {
  if (to.losses) static_cast<Wide*>(to.losses)[r] = static_cast<Wide>(loss);
}

template <class G>
G* gradient_at(const RowLoss& to, int64_t r) {
  return to.gradient ? static_cast<G*>(to.gradient) + r * to.gradient_stride : nullptr;
}

template <class Wide, class G>
void skip_row(const RowLoss& to, int64_t r, int64_t vocab, double loss) {
  set_loss<Wide>(to, r, loss);
  if (G* gradient = gradient_at<G>(to, r))
    std::memset(static_cast<void*>(gradient), 0, static_cast<size_t>(vocab) * sizeof(G));
}

template <class Wide, class T, class G>
static void row(const LogitRows& rows, double eps, const RowLoss& ce, const RowLoss& kl, int64_t r,
                void* scratch) {
  const int64_t t = rows.target[r], V = rows.vocab;
  if (t < 0 || t >= V) {
    const double loss = t < 0 ? 0 : std::numeric_limits<double>::quiet_NaN();
    skip_row<Wide, G>(ce, r, V, loss);
    skip_row<Wide, G>(kl, r, V, loss);
    return;
  }
  const T* z = static_cast<const T*>(rows.logits) + r * rows.stride;
  const LogitMap map = rows.map, ref_map = rows.reference_map;
  G* ce_gradient = gradient_at<G>(ce, r);
  G* kl_gradient = gradient_at<G>(kl, r);
  const double ce_scale = ce.losses ? map.scale * scale_at<Wide>(ce, r) : 0;

  Shift own;
  double slope = 1;  // at the target
  if (!kl.losses) {
    Wide* products = map.cap > 0 && ce_gradient ? static_cast<Wide*>(scratch) : nullptr;
    own = map.cap > 0 ? capped_shift_of<T, Wide>(z, t, V, map, {nullptr, nullptr, products})
                      : shift_of(z, t, V, map.scale);
    const double factor = log_loss(own, eps).at_others * ce_scale;
    if (products) {
      slope = capped(map.scale * at(z + t), map.cap).slope;
      write_terms(products, V, factor, ce_gradient);
    } else if (ce_gradient) {
      write_softmax(z, V, map.scale, own.m, factor, ce_gradient);
    }
  } else {
    const T* z_ref = static_cast<const T*>(rows.reference) + r * rows.reference_stride;
    const double kl_scale = map.scale * scale_at<Wide>(kl, r);
    const auto factors = [&] { return Factors{log_loss(own, eps).at_others * ce_scale, kl_scale}; };
    Shift ref;
    double loss;
    if (map.cap > 0 || ref_map.cap > 0) {
      Wide* kept = static_cast<Wide*>(scratch);
      const auto row = kept_row(z, t, V, map, kept, kept + V, &own);
      const auto ref_row = kept_row<T, Wide>(z_ref, t, V, ref_map, kept + 2 * V, nullptr, &ref);
      if (row.slopes) slope = row.slopes[t];
      loss = sweep_kl(row, own, ref_row, ref, V, factors(), ce_gradient, kl_gradient);
    } else {
      own = shift_of(z, t, V, map.scale);
      ref = shift_of(z_ref, t, V, ref_map.scale);
      loss = sweep_kl(Row<T, Wide>{z, map.scale, nullptr}, own,
                      Row<T, Wide>{z_ref, ref_map.scale, nullptr}, ref, V, factors(), ce_gradient,
                      kl_gradient);
    }
    set_loss<Wide>(kl, r, loss);
  }
  const LogLoss log = log_loss(own, eps);
  set_loss<Wide>(ce, r, log.loss);
  if (ce_gradient) put(ce_gradient + t, log.at_target * slope * ce_scale);
}

static void any_row(const LogitRows& rows, double eps, const RowLoss& ce, const RowLoss& kl,
                    int64_t r, void* scratch) {
  const bool same = rows.dtype == rows.gradient_dtype;
  switch (rows.dtype) {
    case DType::kFloat64: return row<double, double, double>(rows, eps, ce, kl, r, scratch);
    case DType::kBFloat16: return row<float, bf16, bf16>(rows, eps, ce, kl, r, scratch);
    case DType::kFloat16: return row<float, fp16, fp16>(rows, eps, ce, kl, r, scratch);
    case DType::kFloat32:
      if (same) return row<float, float, float>(rows, eps, ce, kl, r, scratch);
      if (rows.gradient_dtype == DType::kBFloat16)
        return row<float, float, bf16>(rows, eps, ce, kl, r, scratch);
      return row<float, float, fp16>(rows, eps, ce, kl, r, scratch);
  }
}

}  // namespace

namespace MOLLM_ISA {
extern const RowKernels row_kernels;
const RowKernels row_kernels = {any_row};
}  // namespace MOLLM_ISA

}  // namespace mollm
