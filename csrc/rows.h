// From rows of logits to losses and gradients: cross-entropy, UCE, KL, and cross-entropy with KL.
// The equations are in mollm_ops/rows.py.
#pragma once

#include <cstdint>

#include "gram.h"

namespace mollm {

// Where one loss goes. `Wide` is double for double logits and float for all others.
struct RowLoss {
  const void* scale;  // Wide [rows], scale_stride apart; of the gradient alone
  int64_t scale_stride;
  void* losses;    // Wide [rows]; null where this loss is not asked for
  void* gradient;  // [rows, vocab], gradient_stride apart; null for none
  int64_t gradient_stride;
};

// From the outputs z0 of a head to logits: z = cap tanh(scale z0 / cap), or scale z0 without a cap.
// Gradients are with respect to z0.
struct LogitMap {
  double scale = 1;  // > 0
  double cap = 0;    // > 0; 0 for none
};

struct LogitRows {
  int64_t rows, vocab;
  DType dtype;           // of both logits
  DType gradient_dtype;  // no wider than dtype
  const void* logits;    // [rows, vocab]
  int64_t stride;
  const void* reference;  // [rows, vocab]; null where kl is not asked for
  int64_t reference_stride;
  const int64_t* target;  // [rows]; negative: loss and gradient 0; vocab or more: loss NaN
  LogitMap map, reference_map;
};

// A gradient may lie in the memory of either row of logits, from its first byte: rows are read
// before they are written.
void rows_cpu(const LogitRows& rows, double eps, const RowLoss& ce, const RowLoss& kl, int threads);

}  // namespace mollm
