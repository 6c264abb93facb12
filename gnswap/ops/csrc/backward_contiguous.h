// Backward for [N, C, S]: a group is some rows of consecutive elements.
#pragma once
#include "backward.h"

namespace gnswap {
namespace {

// Sums of g, and of g * d, over a row or a part of one, as vectors; with a residual also g itself, its gradient.
template <class T, ActClass A, bool Residual> struct RowSums {
  using V = vec_t<T>;
  static constexpr int64_t W = kLanes<T>;
  const Activation<acc_t<T>> how;
  const Tail<T> tail;
  V shift, slope, offset;
  V s[2], q[2];

  RowSums(const Problem& p) : how(p.act), tail(p.S) {}

  GNSWAP_INLINE void set(const Coefficients<acc_t<T>>& k, int64_t c) {
    shift = splat<V>(k.shift[c]), slope = splat<V>(k.slope[c]), offset = splat<V>(k.offset[c]);
  }
  GNSWAP_INLINE void whole(int j, const T* x, const T* dy, const T* r, T* dr, int64_t at) {
    fetch_to_read(x + at);
    fetch_to_read(dy + at);
    const V d = load(x + at) - shift;
    V z = d * slope + offset;
    if (Residual && r) z += load(r + at);
    const V g = activate_backward<A>(how, z, load(dy + at));
    if (Residual && dr) store(dr + at, g);
    s[j] += g;
    q[j] += g * d;
  }
  // `last` - `first` elements; only the last part of a row may end within a vector.
  GNSWAP_INLINE void part(const T* x, const T* dy, const T* r, T* dr, int64_t first, int64_t last) {
    s[0] = s[1] = q[0] = q[1] = V{};
    int64_t at = first;
    for (; at + 2 * W <= last; at += 2 * W)
      GNSWAP_UNROLL for (int j = 0; j < 2; ++j) whole(j, x, dy, r, dr, at + j * W);
    if (at + W <= last) whole(0, x, dy, r, dr, at), at += W;
    if (at == last) return;
    const V d = tail.load(x + at) - shift;
    V z = d * slope + offset;
    if (Residual && r) z += tail.load(r + at);
    V g = activate_backward<A>(how, z, tail.load(dy + at));
    if (Residual && dr) store_part(dr + at, g, tail.count);
    g = tail.keep(g);
    s[1] += g;
    q[1] += tail.keep(g * d);
  }
};

// Per-channel sums of g, and of g * d, over the rows of a piece (whole rows) of a group, into dbias and dweight [C].
// All tensors start at the sample.
template <class T, ActClass A, bool Residual>
GNSWAP_NOINLINE void piece_gradient_sums(const Problem& p, const T* x, const T* dy, const T* r, T* dr, int64_t position,
                                         Cut::Piece piece, const Coefficients<acc_t<T>>& k, double* dbias,
                                         double* dweight) {
  using R = acc_t<T>;
  RowSums<T, A, Residual> sums(p);
  int64_t row = piece.first_row;
  if (p.S <= kBlock) {
    for (; row + 8 <= piece.last_row; row += 8) {
      vec_t<T> s[8], q[8];
      R total[8], total_d[8];
      for (int64_t i = 0; i < 8; ++i) {
        const int64_t c = channel_index(p, position + row + i);
        sums.set(k, c);
        sums.part(x, dy, r, dr, c * p.S, (c + 1) * p.S);
        s[i] = sums.s[0] + sums.s[1];
        q[i] = sums.q[0] + sums.q[1];
      }
      sums_of_eight(s, total);
      sums_of_eight(q, total_d);
      for (int64_t i = 0; i < 8; ++i) {
        const int64_t c = channel_index(p, position + row + i);
        dbias[c] = total[i];
        dweight[c] = total_d[i];
      }
    }
  }
  for (; row < piece.last_row; ++row) {
    const int64_t c = channel_index(p, position + row), start = c * p.S;
    double total = 0, total_d = 0;
    sums.set(k, c);
    for (int64_t first = 0; first < p.S; first += kBlock) {
      sums.part(x, dy, r, dr, start + first, start + min(p.S, first + kBlock));
      total += sum(sums.s[0] + sums.s[1]);
      total_d += sum(sums.q[0] + sums.q[1]);
    }
    dbias[c] = total;
    dweight[c] = total_d;
  }
}

// dx for the rows of a piece (whole rows). A is kIdentity where g itself is at hand (in `dy`).
template <class T, ActClass A, bool Residual>
GNSWAP_NOINLINE void piece_gradient(const Problem& p, const T* x, const T* dy, const T* r, T* dx, int64_t position,
                                    Cut::Piece piece, const Coefficients<acc_t<T>>& k) {
  using V = vec_t<T>;
  constexpr int64_t W = kLanes<T>;
  const Activation<acc_t<T>> how(p.act);
  for (int64_t row = piece.first_row; row < piece.last_row; ++row) {
    const int64_t c = channel_index(p, position + row), start = c * p.S, end = start + p.S;
    const V shift = splat<V>(k.shift[c]), slope = splat<V>(k.slope[c]), offset_ = splat<V>(k.offset[c]);
    const V along = splat<V>(k.along[c]), across = splat<V>(k.across[c]);
    const auto step = [&](V xv, V dyv, V rv) {
      const V d = xv - shift;
      const V g = activate_backward<A>(how, d * slope + offset_ + rv, dyv);
      return g * slope - (d * along + across);
    };
    const auto whole = [&](int64_t i) {
      fetch_to_write(dx + i);
      const V xv = load(x + i), dyv = load(dy + i);
      return Residual && r ? step(xv, dyv, load(r + i)) : step(xv, dyv, V{});
    };
    int64_t i = start;
    for (; i + 2 * W <= end; i += 2 * W) {
      const V a = whole(i), b = whole(i + W);
      store(dx + i, a);
      store(dx + i + W, b);
    }
    for (; i + W <= end; i += W) store(dx + i, whole(i));
    if (i == end) continue;
    if (p.S >= W) {
      store(dx + end - W, whole(end - W));
    } else {
      const int64_t count = end - i;
      const V rv = Residual && r ? load_part(r + i, count, V{}) : V{};
      store_part(dx + i, step(load_part(x + i, count, V{}), load_part(dy + i, count, V{}), rv), count);
    }
  }
}

// The steps that depend on the activation.
template <class T> struct PieceSteps {
  void (*sums)(const Problem&, const T*, const T*, const T*, T*, int64_t, Cut::Piece, const Coefficients<acc_t<T>>&,
               double*, double*);
  void (*gradient)(const Problem&, const T*, const T*, const T*, T*, int64_t, Cut::Piece,
                   const Coefficients<acc_t<T>>&);
};
template <class T> void backward_contiguous(const Problem& p, PieceSteps<T> step) {
  using R = acc_t<T>;
  const int64_t C = p.C, D = C / p.G, S = p.S, groups = p.N * p.G, sample = C * S;
  Cut cut(D, S);
  cut.pieces /= cut.pieces_a_row;  // whole rows, also where they are long
  cut.pieces_a_row = 1;
  const T *x = static_cast<const T*>(p.x), *dy = static_cast<const T*>(p.dy);
  const T* residual = static_cast<const T*>(p.residual);
  T *dx = static_cast<T*>(p.dx), *dresidual = static_cast<T*>(p.dresidual);
  const R *mean = static_cast<const R*>(p.mean), *rstd = static_cast<const R*>(p.rstd);
  const int64_t stride = padded(C), floats = Coefficients<R>::kArrays * stride, float_size = sizeof(R);
  const bool whole = group_to_a_thread(p);
  const From<T> from(p);
  double* partial = static_cast<double*>(Scratch::shared(p.N * (2 * C * 8 + (whole ? 0 : floats * float_size))));

  const auto sums = [&](int64_t n, int64_t g, int64_t i, const Coefficients<R>& k) {
    const int64_t at = n * sample;
    step.sums(p, x + at, dy + at, offset(residual, at), offset(dresidual, at), g * D, cut.piece(i), k,
              partial + 2 * n * C, partial + (2 * n + 1) * C);
  };
  const auto finish = [&](int64_t n, int64_t g, const Coefficients<R>& k) {
    finish_group(p, g, rstd[n * p.G + g], partial + 2 * n * C, partial + (2 * n + 1) * C, k);
  };
  const auto apply = [&](int64_t n, int64_t g, int64_t i, const Coefficients<R>& k) {
    const int64_t at = n * sample;
    step.gradient(p, x + at, from.dy + at, offset(from.residual, at), dx + at, g * D, cut.piece(i), k);
  };

  if (whole) {
    for_each(p, groups, D * S, [&](int64_t group) {
      const int64_t n = group / p.G, g = group % p.G;
      const Coefficients<R> k(static_cast<R*>(Scratch::own(floats * float_size)), stride);
      set_group(p, g, mean[group], rstd[group], k);
      for (int64_t i = 0; i < cut.pieces; ++i) sums(n, g, i, k);
      finish(n, g, k);
      for (int64_t i = 0; i < cut.pieces; ++i) apply(n, g, i, k);
    });
  } else {
    R* memory = reinterpret_cast<R*>(partial + p.N * 2 * C);
    const auto k = [&](int64_t group) { return Coefficients<R>(memory + group / p.G * floats, stride); };
    const auto each = [&](const auto& f) {
      for_each(p, groups * cut.pieces, D * S / cut.pieces, [&](int64_t unit) {
        const int64_t group = unit / cut.pieces;
        f(group / p.G, group % p.G, unit % cut.pieces, k(group));
      });
    };
    for (int64_t i = 0; i < groups; ++i) set_group(p, i % p.G, mean[i], rstd[i], k(i));
    each(sums);
    for (int64_t i = 0; i < groups; ++i) finish(i / p.G, i % p.G, k(i));
    each(apply);
  }
  sum_over_batch(p, partial);
}

}  // namespace
}  // namespace gnswap
