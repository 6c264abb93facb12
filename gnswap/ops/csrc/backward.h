// What both layouts of the backward share.
//
// One pass over x and dy for the sums per channel, one more for dx.
//
// With d = x - shift and g = dy * act'(z), per channel:  dbias = sum g,  dweight = inner * sum(g * d) + inner_bias * dbias,
// and per group, with M = D * S, c1 = sum_c weight * dbias / M and c2 = sum_c weight * dweight / M:
//   dx = scale * rstd * (weight * g - c1 - xhat * c2) = g * slope - d * along - across
// The pre-activation z is computed again from x; nothing but x, mean and rstd has to be kept from the forward.
#pragma once
#include "common.h"

namespace gnswap {
namespace {

// sum of w[c] * v[c] over the channels of a group
template <class R> GNSWAP_NOINLINE double weighted_sum(const Problem& p, int64_t g, const double* v) {
  constexpr int64_t W = kLanes<double>;
  const R* w = static_cast<const R*>(p.weight);
  const int64_t D = p.C / p.G;
  if (p.order) {
    double total = 0;
    for (int64_t i = g * D; i < (g + 1) * D; ++i) total += w[p.order[i]] * v[p.order[i]];
    return total;
  }
  F64 sums = {};
  int64_t c = g * D;
  for (; c + W <= (g + 1) * D; c += W) sums += load_double(w + c) * load(v + c);
  double total = sum(sums);
  for (; c < (g + 1) * D; ++c) total += w[c] * v[c];
  return total;
}

// From the sums of g and g * d of a group's channels: dweight (in place of the second), then along and across.
template <class R>
GNSWAP_NOINLINE void finish_group(const Problem& p, int64_t g, double rstd, double* __restrict dbias,
                                  double* __restrict dweight, const Coefficients<R>& k) {
  const int64_t D = p.C / p.G;
  const double share = 1 / static_cast<double>(D * p.S);
  const R* scale = static_cast<const R*>(p.scale);
  const auto each = [&](const auto& f) {
    if (p.order) {
      for (int64_t i = 0; i < D; ++i) f(p.order[g * D + i]);
    } else {
#pragma GCC ivdep
      for (int64_t c = g * D; c < (g + 1) * D; ++c) f(c);
    }
  };
  each([&](int64_t c) { dweight[c] = dweight[c] * k.inner[c] + dbias[c] * k.inner_bias[c]; });
  const double c1 = weighted_sum<R>(p, g, dbias) * share, c2 = weighted_sum<R>(p, g, dweight) * share;
  each([&](int64_t c) {
    const double step = scale[c] * rstd;
    k.along[c] = static_cast<R>(step * c2 * k.inner[c]);
    k.across[c] = static_cast<R>(step * (c1 + c2 * k.inner_bias[c]));
  });
}

// dweight and dbias: sums over the batch of `partial` [N, 2, C] (g, then g * xhat), in its order.
inline void sum_over_batch(const Problem& p, const double* partial) {
  const auto bytes = static_cast<size_t>(p.C) * sizeof(double);
  std::memcpy(p.dbias, partial, bytes);
  std::memcpy(p.dweight, partial + p.C, bytes);
  for (int64_t n = 1; n < p.N; ++n) {
    add_to(p.dbias, partial + 2 * n * p.C, p.C);
    add_to(p.dweight, partial + (2 * n + 1) * p.C, p.C);
  }
}

// Where there is a residual its gradient is g, so the pass that writes dx can read it instead of computing it again;
// not for half types, whose rounded g would no longer agree with the sums.
template <class T> constexpr bool kReadsBack = sizeof(T) > 2;

// What the pass that writes dx reads: dy and the residual, or g alone.
template <class T> struct From {
  const T *dy, *residual;
  explicit From(const Problem& p)
      : dy(static_cast<const T*>(reads_back(p) ? p.dresidual : p.dy)),
        residual(reads_back(p) ? nullptr : static_cast<const T*>(p.residual)) {}
  static bool reads_back(const Problem& p) { return kReadsBack<T> && p.dresidual; }
};

}  // namespace
}  // namespace gnswap
