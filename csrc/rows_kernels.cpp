// Compiled once per instruction set into the namespace MOLLM_ISA.
//
// A row is swept three times: its maximum, the sum of its exponentials, its gradient. Only the
// first sweep comes from memory; a row of 128256 floats stays in a core's L2 for the others.
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
MOLLM_INLINE f32x16 load_logits(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  T some[kLanes] = {};
  std::memcpy(some, p, static_cast<size_t>(count) * sizeof(T));
  f32x16 v = load(some);
  for (int64_t n = count; n < kLanes; ++n) v[n] = -kInfinity;
  return v;
}

template <class T>
MOLLM_INLINE void store_some(T* p, f32x16 v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  T some[kLanes];
  store(some, v);
  std::memcpy(p, some, static_cast<size_t>(count) * sizeof(T));
}

template <class T>
MOLLM_INLINE double at(const T* p) { return load_logits(p, 1)[0]; }

MOLLM_INLINE double at(const double* p) { return *p; }

template <class T>
MOLLM_INLINE void put(T* p, double v) { store_some(p, f32x16{} + static_cast<float>(v), 1); }

MOLLM_INLINE void put(double* p, double v) { *p = v; }

MOLLM_INLINE double sum(f32x16 v) { return sum(widen_low(v) + widen_high(v)); }

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
  f32x16 top = f32x16{} - kInfinity;
  for_vectors(0, count, [&](int64_t n, int64_t some) __attribute__((always_inline)) {
    top = maximum(top, load_logits(z + n, some));
  });
  float m = top[0];
  for (int lane = 1; lane < kLanes; ++lane) m = top[lane] > m ? top[lane] : m;
  return m;
}

template <class T>
static double sum_exp(const T* z, int64_t count, double m) {
  const float shift = static_cast<float>(m);
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kFlush) {
    f32x16 partial = {};
    for_vectors(begin, min64(begin + kFlush, count),
                [&](int64_t n, int64_t some) __attribute__((always_inline)) {
                  partial += exp_negative(load_logits(z + n, some) - shift);
                });
    total += sum(partial);
  }
  return total;
}

// gradient_j = factor exp(z_j - m)
template <class T, class G>
static void write_softmax(const T* z, int64_t count, double m, double factor, G* gradient) {
  const float shift = static_cast<float>(m), f = static_cast<float>(factor);
  for_vectors(0, count, [&](int64_t n, int64_t some) __attribute__((always_inline)) {
    store_some(gradient + n, exp_negative(load_logits(z + n, some) - shift) * f, some);
  });
}

// exp(-d) + d - 1 for |d| < 1/4, where the plain form cancels.
MOLLM_INLINE f32x16 phi_series(f32x16 d) {
  return d * d *
         (1.f / 2 - d * (1.f / 6 - d * (1.f / 24 - d * (1.f / 120 - d * (1.f / 720)))));
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

// Returns sum_j p_ref_j phi(log p_ref_j - log p_j); writes the gradients that are not null.
template <class T, class G>
static double sweep_kl(const T* z, Shift own, const T* z_ref, Shift ref, int64_t count,
                       Factors factors, G* ce_gradient, G* kl_gradient) {
  const float m = static_cast<float>(own.m), m_ref = static_cast<float>(ref.m);
  const float inv = static_cast<float>(1 / own.Z), inv_ref = static_cast<float>(1 / ref.Z);
  const float log_ratio = static_cast<float>(std::log(ref.Z) - std::log(own.Z));
  const float ce = static_cast<float>(factors.ce), kl = static_cast<float>(factors.kl);
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kFlush) {
    f32x16 partial = {};
    for_vectors(begin, min64(begin + kFlush, count),
                [&](int64_t n, int64_t some) __attribute__((always_inline)) {
                  const f32x16 x = load_logits(z + n, some) - m;
                  const f32x16 x_ref = load_logits(z_ref + n, some) - m_ref;
                  const f32x16 e = exp_negative(x);
                  const f32x16 p = e * inv, p_ref = exp_negative(x_ref) * inv_ref;
                  const f32x16 d = (x_ref - x) - log_ratio;
                  const f32x16 far = p - p_ref + p_ref * d;
                  const i32x16 is_near = (d < 0.25f) & (d > -0.25f);
                  const f32x16 term = select(is_near, p_ref * phi_series(d), far);
                  partial += select(p_ref == 0.f, p, term);
                  if (ce_gradient) store_some(ce_gradient + n, e * ce, some);
                  if (kl_gradient) store_some(kl_gradient + n, (p - p_ref) * kl, some);
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

static double sum_exp(const double* z, int64_t count, double m) {
  double total = 0;
  for (int64_t n = 0; n < count; ++n) total += std::exp(z[n] - m);
  return total;
}

static void write_softmax(const double* z, int64_t count, double m, double factor,
                          double* gradient) {
  for (int64_t n = 0; n < count; ++n) gradient[n] = factor * std::exp(z[n] - m);
}

static double phi(double d) {
  if (std::fabs(d) > 0.1) return std::expm1(-d) + d;
  double series = 0, term = 1;
  for (int k = 2; k < 13; ++k) series += term *= (k == 2 ? d * d / 2 : -d / k);
  return series;
}

static double sweep_kl(const double* z, Shift own, const double* z_ref, Shift ref, int64_t count,
                       Factors factors, double* ce_gradient, double* kl_gradient) {
  const double log_ratio = std::log(ref.Z) - std::log(own.Z);
  double total = 0;
  for (int64_t n = 0; n < count; ++n) {
    const double x = z[n] - own.m, x_ref = z_ref[n] - ref.m;
    const double e = std::exp(x), p = e / own.Z, p_ref = std::exp(x_ref) / ref.Z;
    total += p_ref > 0 ? p_ref * phi((x_ref - x) - log_ratio) : p;
    if (ce_gradient) ce_gradient[n] = e * factors.ce;
    if (kl_gradient) kl_gradient[n] = (p - p_ref) * factors.kl;
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
static Shift shift_of(const T* z, int64_t t, int64_t V) {
  const double m = maximum(z, V), x = at(z + t) - m;
  const double S = sum_exp(z, t, m) + sum_exp(z + t + 1, V - t - 1, m);
  return {m, x, S, S + std::exp(x)};
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
static void row(const LogitRows& rows, double eps, const RowLoss& ce, const RowLoss& kl,
                int64_t r) {
  const int64_t t = rows.target[r], V = rows.vocab;
  if (t < 0 || t >= V) {
    const double loss = t < 0 ? 0 : std::numeric_limits<double>::quiet_NaN();
    skip_row<Wide, G>(ce, r, V, loss);
    skip_row<Wide, G>(kl, r, V, loss);
    return;
  }
  const T* z = static_cast<const T*>(rows.logits) + r * rows.stride;
  G* ce_gradient = gradient_at<G>(ce, r);
  G* kl_gradient = gradient_at<G>(kl, r);

  const Shift own = shift_of(z, t, V);
  const LogLoss log = log_loss(own, eps);
  const double ce_scale = ce.losses ? scale_at<Wide>(ce, r) : 0;
  if (kl.losses) {
    const T* z_ref = static_cast<const T*>(rows.reference) + r * rows.reference_stride;
    const Factors factors = {log.at_others * ce_scale, scale_at<Wide>(kl, r)};
    set_loss<Wide>(kl, r, sweep_kl(z, own, z_ref, shift_of(z_ref, t, V), V, factors, ce_gradient,
                                   kl_gradient));
  } else if (ce_gradient) {
    write_softmax(z, V, own.m, log.at_others * ce_scale, ce_gradient);
  }
  set_loss<Wide>(ce, r, log.loss);
  if (ce_gradient) put(ce_gradient + t, log.at_target * ce_scale);
}

static void any_row(const LogitRows& rows, double eps, const RowLoss& ce, const RowLoss& kl,
                    int64_t r) {
  const bool same = rows.dtype == rows.gradient_dtype;
  switch (rows.dtype) {
    case DType::kFloat64: return row<double, double, double>(rows, eps, ce, kl, r);
    case DType::kBFloat16: return row<float, bf16, bf16>(rows, eps, ce, kl, r);
    case DType::kFloat16: return row<float, fp16, fp16>(rows, eps, ce, kl, r);
    case DType::kFloat32:
      if (same) return row<float, float, float>(rows, eps, ce, kl, r);
      if (rows.gradient_dtype == DType::kBFloat16)
        return row<float, float, bf16>(rows, eps, ce, kl, r);
      return row<float, float, fp16>(rows, eps, ce, kl, r);
  }
}

}  // namespace

namespace MOLLM_ISA {
extern const RowKernels row_kernels;
const RowKernels row_kernels = {any_row};
}  // namespace MOLLM_ISA

}  // namespace mollm
