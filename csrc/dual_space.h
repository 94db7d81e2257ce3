// From the Gram matrix of K gradients to the weights of a common descent direction.
//
// One text for host and device. Everything happens in float64 on the correlation matrix
// C_ij = G_ij / (|g_i| |g_j|), that is on unit gradients; weights are scaled back at the end.
// Every quadratic problem here is a non-negative least squares problem
//     minimise  y'Ay / 2 - b'y   over y >= 0,
// solved exactly by trying every set of positive variables (a face).
#pragma once

#include <math.h>
#include <stdint.h>

#include "host_device.h"

namespace mollm {

constexpr int kMaxObjectives = 8;        // every face is tried: 2^K - 1 small systems
constexpr double kNegligible = 1e-12;    // G_ii below this share of the largest: objective dropped
constexpr double kSingular = 1e-14;      // relative Cholesky pivot of a dependent face
constexpr double kEdge = 1e-6;           // |r_i|^2 of a unit gradient below which edges are noise
constexpr double kStationaryGap = 1e-6;  // a Pareto gap below this is zero
constexpr double kCertificate = 1e-9;    // g_k . d < -kCertificate |g_k| |d|

enum class Status : int { kDual = 0, kMinNorm = 1, kStationary = 2, kNonFinite = 3, kRule = 4 };
enum class Length : int { kMean = 0, kMinNorm = 1, kFirst = 2 };

struct Solution {
  double weights[kMaxObjectives];  // of sum_k w_k g_k; the direction of descent is its negative
  double pareto_gap;
  Status status;
};

// The objectives that take part, as unit gradients.
struct Cone {
  int n;                                     // how many
  int index[kMaxObjectives];                 // objective of each
  double norm[kMaxObjectives];               // |g|
  double C[kMaxObjectives][kMaxObjectives];  // correlations
};

struct Quadratic {
  int n;
  double A[kMaxObjectives][kMaxObjectives];
  double b[kMaxObjectives];
};

// In place: rows and columns 0..n-1 of A become the Cholesky factor; false if A is singular.
MOLLM_HD inline bool cholesky(int n, double A[][kMaxObjectives]) {
  for (int j = 0; j < n; ++j) {
    double pivot = A[j][j];
    const double smallest = kSingular * pivot;
    for (int k = 0; k < j; ++k) pivot -= A[j][k] * A[j][k];
    if (!(pivot > smallest)) return false;
    A[j][j] = sqrt(pivot);
    for (int i = j + 1; i < n; ++i) {
      double sum = A[i][j];
      for (int k = 0; k < j; ++k) sum -= A[i][k] * A[j][k];
      A[i][j] = sum / A[j][j];
    }
  }
  return true;
}

MOLLM_HD inline void cholesky_solve(int n, const double L[][kMaxObjectives], double* x) {
  for (int i = 0; i < n; ++i) {
    for (int k = 0; k < i; ++k) x[i] -= L[i][k] * x[k];
    x[i] /= L[i][i];
  }
  for (int i = n - 1; i >= 0; --i) {
    for (int k = i + 1; k < n; ++k) x[i] -= L[k][i] * x[k];
    x[i] /= L[i][i];
  }
}

MOLLM_HD inline double quadratic_form(int n, const double A[][kMaxObjectives], const double* y) {
  double sum = 0;
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) sum += y[i] * A[i][j] * y[j];
  return sum;
}

// The stationary point whose positive variables are those in `face` (a bit mask), and the value
// there; false if there is none.
MOLLM_HD inline bool face_solution(const Quadratic& q, unsigned face, double* y, double* value) {
  int at[kMaxObjectives], n = 0;
  for (int i = 0; i < q.n; ++i) {
    y[i] = 0;
    if (face >> i & 1u) at[n++] = i;
  }
  double L[kMaxObjectives][kMaxObjectives], x[kMaxObjectives];
  for (int i = 0; i < n; ++i) {
    x[i] = q.b[at[i]];
    for (int j = 0; j <= i; ++j) L[i][j] = q.A[at[i]][at[j]];
  }
  if (!cholesky(n, L)) return false;
  cholesky_solve(n, L, x);
  for (int i = 0; i < n; ++i) {
    if (!(x[i] >= 0)) return false;
    y[at[i]] = x[i];
  }
  *value = quadratic_form(q.n, q.A, y) / 2;
  for (int i = 0; i < n; ++i) *value -= q.b[at[i]] * x[i];
  return true;
}

// Tries the faces one after the other. The CUDA solver tries one per thread instead.
struct EveryFace {
  MOLLM_HD void operator()(const Quadratic& q, double* y) const {
    double best = 0, candidate[kMaxObjectives], value;
    for (int i = 0; i < q.n; ++i) y[i] = 0;
    for (unsigned face = 1; face < (1u << q.n); ++face) {
      if (!face_solution(q, face, candidate, &value) || !(value < best)) continue;
      best = value;
      for (int i = 0; i < q.n; ++i) y[i] = candidate[i];
    }
  }
};

// The point of smallest norm in the convex hull of vectors with inner products `gram`, as convex
// weights; returns that norm. The points (v_i, t) of the lifted problem turn sum(w) = 1 into a
// cone, where the problem is one of non-negative least squares.
template <class Nnls>
MOLLM_HD double min_norm_point(int n, const double gram[][kMaxObjectives], const Nnls& nnls,
                               double* w) {
  double smallest = gram[0][0];  // near it lies the answer, so t = 1 must not drown it
  for (int i = 1; i < n; ++i) smallest = fmin(smallest, gram[i][i]);
  Quadratic q;
  q.n = n;
  for (int i = 0; i < n; ++i) {
    q.b[i] = 1;
    for (int j = 0; j < n; ++j) q.A[i][j] = gram[i][j] / smallest + 1;
  }
  nnls(q, w);
  double total = 0;
  for (int i = 0; i < n; ++i) total += w[i];
  for (int i = 0; i < n; ++i) w[i] /= total;
  return sqrt(fmax(quadratic_form(n, gram, w), 0.0));
}

// Reads the Gram matrix (row major, K x K); false where an entry is not finite.
MOLLM_HD inline bool read_cone(int K, const double* G, Cone* cone) {
  double largest = 0;
  for (int i = 0; i < K * K; ++i)
    if (!isfinite(G[i])) return false;
  for (int k = 0; k < K; ++k) largest = fmax(largest, G[k * K + k]);
  cone->n = 0;
  for (int k = 0; k < K; ++k) {
    const double square = G[k * K + k];
    if (!(square > 0) || square < kNegligible * largest) continue;
    cone->index[cone->n] = k;
    cone->norm[cone->n++] = sqrt(square);
  }
  for (int i = 0; i < cone->n; ++i)
    for (int j = 0; j < cone->n; ++j)
      cone->C[i][j] =
          i == j ? 1 : G[cone->index[i] * K + cone->index[j]] / cone->norm[i] / cone->norm[j];
  return true;
}

MOLLM_HD inline Solution empty_solution(Status status) {
  Solution s;
  for (int k = 0; k < kMaxObjectives; ++k) s.weights[k] = 0;
  s.pareto_gap = 0;
  s.status = status;
  return s;
}

// The length that the direction is given. Objectives that were dropped are not the first.
template <class Nnls>
MOLLM_HD double length_of(int K, const double* G, const Cone& cone, Length length,
                          const Nnls& nnls) {
  if (length == Length::kFirst) return cone.norm[0];
  if (length == Length::kMean) {
    double sum = 0;
    for (int i = 0; i < K * K; ++i) sum += G[i] / (K * K);
    return sqrt(fmax(sum, 0.0));
  }
  double raw[kMaxObjectives][kMaxObjectives], w[kMaxObjectives];
  for (int i = 0; i < cone.n; ++i)
    for (int j = 0; j < cone.n; ++j) raw[i][j] = G[cone.index[i] * K + cone.index[j]];
  return min_norm_point(cone.n, raw, nnls, w);
}

// |sum_i y_i g_i/|g_i||
MOLLM_HD inline double norm_of(const Cone& cone, const double* y) {
  return sqrt(fmax(quadratic_form(cone.n, cone.C, y), 0.0));
}

// The weights of the original gradients for the direction scale * sum_i y_i g_i/|g_i|.
MOLLM_HD inline void write_weights(const Cone& cone, const double* y, double scale, Solution* s) {
  for (int i = 0; i < cone.n; ++i) s->weights[cone.index[i]] = scale * y[i] / cone.norm[i];
}

MOLLM_HD inline bool descends_on_all(const Cone& cone, const double* y) {
  const double norm = norm_of(cone, y);
  for (int i = 0; i < cone.n; ++i) {
    double along = 0;
    for (int j = 0; j < cone.n; ++j) along += cone.C[i][j] * y[j];
    if (!(along > kCertificate * norm)) return false;
  }
  return true;
}

// lambda = C^-1 alpha, alpha_i = 1 / sqrt((C^-1)_ii) = |r_i|: the sum of the unit dual vectors.
// False where the edges of the dual cone mean nothing.
MOLLM_HD inline bool dual_centre(const Cone& cone, double* lambda) {
  double L[kMaxObjectives][kMaxObjectives];
  for (int i = 0; i < cone.n; ++i)
    for (int j = 0; j < cone.n; ++j) L[i][j] = cone.C[i][j];
  if (!cholesky(cone.n, L)) return false;
  for (int i = 0; i < cone.n; ++i) lambda[i] = 0;
  for (int i = 0; i < cone.n; ++i) {
    double column[kMaxObjectives];
    for (int j = 0; j < cone.n; ++j) column[j] = i == j;
    cholesky_solve(cone.n, L, column);
    if (!(column[i] > 0) || 1 / column[i] < kEdge) return false;
    for (int j = 0; j < cone.n; ++j) lambda[j] += column[j] / sqrt(column[i]);
  }
  return descends_on_all(cone, lambda);
}

// The part common to all rules: drops negligible objectives, finds the Pareto gap and the min-norm
// point `hull` of the unit gradients. False where the answer is already in *s.
template <class Nnls>
MOLLM_HD bool open_cone(int K, const double* G, const Nnls& nnls, Cone* cone, double* hull,
                        Solution* s) {
  *s = empty_solution(Status::kNonFinite);
  if (!read_cone(K, G, cone)) return false;
  s->status = Status::kStationary;
  if (cone->n == 0) return false;
  s->pareto_gap = fmin(min_norm_point(cone->n, cone->C, nnls, hull), 1.0);
  return true;
}

// The centre of the dual cone, arXiv 2412.20412 section III.B; where that cone has no usable edges,
// the min-norm point of the unit gradients.
template <class Nnls>
MOLLM_HD Solution dual_space_solution(int K, const double* G, Length length, const Nnls& nnls) {
  Cone cone;
  Solution s;
  double hull[kMaxObjectives], y[kMaxObjectives];
  if (!open_cone(K, G, nnls, &cone, hull, &s)) return s;
  const bool dual = dual_centre(cone, y);
  if (!dual && (s.pareto_gap <= kStationaryGap || !descends_on_all(cone, hull))) return s;
  const double tau = length_of(K, G, cone, length, nnls);
  if (!(tau > 0)) return s;
  s.status = dual ? Status::kDual : Status::kMinNorm;
  const double* centre = dual ? y : hull;
  write_weights(cone, centre, tau / norm_of(cone, centre), &s);
  return s;
}

// MGDA: the min-norm point of the convex hull of the gradients, as they are or (`normalize`) all
// scaled to the norm `length`.
template <class Nnls>
MOLLM_HD Solution min_norm_solution(int K, const double* G, bool normalize, Length length,
                                    const Nnls& nnls) {
  Cone cone;
  Solution s;
  double y[kMaxObjectives];
  if (!open_cone(K, G, nnls, &cone, y, &s) || s.pareto_gap <= kStationaryGap) return s;
  const double tau = normalize ? length_of(K, G, cone, length, nnls) : 1;
  if (!(tau > 0)) return s;
  s.status = Status::kMinNorm;
  if (normalize) {
    write_weights(cone, y, tau, &s);
    return s;
  }
  double raw[kMaxObjectives][kMaxObjectives];
  for (int i = 0; i < cone.n; ++i)
    for (int j = 0; j < cone.n; ++j) raw[i][j] = G[cone.index[i] * K + cone.index[j]];
  min_norm_point(cone.n, raw, nnls, y);
  for (int i = 0; i < cone.n; ++i) s.weights[cone.index[i]] = y[i];
  return s;
}

// Adds to y the coefficients of the point of the dual cone {x : g_i . x >= 0} nearest to
// sum_i c_i g_i/|g_i|, that is c + v with v >= 0 minimising |sum_i (c_i + v_i) g_i/|g_i||.
template <class Nnls>
MOLLM_HD void add_projection(const Cone& cone, const double* c, const Nnls& nnls, double* y) {
  Quadratic q;
  double v[kMaxObjectives];
  q.n = cone.n;
  for (int i = 0; i < cone.n; ++i) {
    q.b[i] = 0;
    for (int j = 0; j < cone.n; ++j) {
      q.A[i][j] = cone.C[i][j];
      q.b[i] -= cone.C[i][j] * c[j];
    }
  }
  nnls(q, v);
  for (int i = 0; i < cone.n; ++i) y[i] += c[i] + v[i];
}

// `project`: the point of the dual cone nearest to sum_k c_k g_k. `upgrad`: the mean over k of the
// points nearest to c_k g_k. With `normalize` every g_k is first scaled to the norm `length`.
template <class Nnls>
MOLLM_HD Solution projected_solution(int K, const double* G, const double* preferences,
                                     bool each_alone, bool normalize, Length length,
                                     const Nnls& nnls) {
  Cone cone;
  Solution s;
  double hull[kMaxObjectives], c[kMaxObjectives], y[kMaxObjectives];
  if (!open_cone(K, G, nnls, &cone, hull, &s) || s.pareto_gap <= kStationaryGap) return s;
  const double tau = normalize ? length_of(K, G, cone, length, nnls) : 1;
  double size = 0;
  for (int i = 0; i < cone.n; ++i) {
    y[i] = 0;
    c[i] = preferences[cone.index[i]] * (normalize ? 1 : cone.norm[i]);
    size = fmax(size, fabs(c[i]));
  }
  if (!(size > 0 && tau > 0)) return s;
  for (int i = 0; i < cone.n; ++i) c[i] /= size;  // as a number near 1, for the certificates
  if (each_alone) {
    for (int k = 0; k < cone.n; ++k) {
      double only[kMaxObjectives];
      for (int i = 0; i < cone.n; ++i) only[i] = i == k ? c[i] / K : 0;
      add_projection(cone, only, nnls, y);
    }
  } else {
    add_projection(cone, c, nnls, y);
  }
  if (norm_of(cone, y) <= kStationaryGap) return s;
  s.status = Status::kRule;
  write_weights(cone, y, size * tau, &s);
  return s;
}

}  // namespace mollm
