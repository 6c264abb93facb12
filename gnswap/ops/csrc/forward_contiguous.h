// Forward for [N, C, S]: statistics of a group, then one pass that normalises, adds the residual and activates.
#pragma once
#include "common.h"

namespace gnswap {
namespace {

// A value near the group's mean: the mean of up to 16 elements spread over the group. The sums are taken relative to it,
// which bounds their cancellation: its distance from the mean is at most sqrt(elements / 16) deviations.
struct Probes {
  int64_t count, rows, columns;  // and the step from one to the next
  explicit Probes(const Problem& p) {
    const int64_t elements = p.C / p.G * p.S;
    count = max(1, min(16, elements / 128));
    rows = elements / count / p.S;
    columns = elements / count % p.S;
  }
};

template <class T> GNSWAP_NOINLINE double find_reference(const Problem& p, const Probes& probes, const T* x, int64_t g) {
  using R = acc_t<T>;
  const int64_t first = g * (p.C / p.G);
  int64_t row = probes.rows / 2, column = probes.columns / 2;
  double total = 0;
  for (int64_t i = 0; i < probes.count; ++i) {
    const int64_t c = channel_index(p, first + row);
    total += static_cast<const R*>(p.scale)[c] * value(x[c * p.S + column]) + static_cast<const R*>(p.shift)[c];
    row += probes.rows;
    column += probes.columns;
    if (column >= p.S) {
      column -= p.S;
      row += 1;
    }
  }
  return total / static_cast<double>(probes.count);
}

struct Sums { double first, second; };

// Sums of d and d * d over a piece of a group, d = scale * x + shift - reference, at most kBlock elements in fp32.
// Flat: x starts at the group, whose rows are one; d = x - k.shift[0].
template <class T, bool Flat>
GNSWAP_NOINLINE Sums piece_sums(const Problem& p, const T* x, int64_t position, Cut::Piece piece,
                                const Coefficients<acc_t<T>>& k) {
  using V = vec_t<T>;
  constexpr int64_t W = kLanes<T>;
  const V zero = {};
  V s[4] = {}, q[4] = {};
  for (int64_t row = piece.first_row; row < piece.last_row; ++row) {
    const int64_t c = Flat ? 0 : channel_index(p, position + row);
    const T* at = x + c * p.S;
    const V shift = splat<V>(k.shift[c]), inner = splat<V>(k.inner[c]), bias = splat<V>(k.inner_bias[c]);
    const auto standardise = [&](V v) { return Flat ? v - shift : (v - shift) * inner + bias; };
    const auto add_vector = [&](int j, V d) {
      s[j] += d;
      q[j] += d * d;
    };
    const auto add = [&](int j, int64_t i) {
      fetch_to_read(at + i);
      add_vector(j, standardise(load(at + i)));
    };
    int64_t i = piece.begin;
    for (; i + 4 * W <= piece.end; i += 4 * W)
      GNSWAP_UNROLL for (int j = 0; j < 4; ++j) add(j, i + j * W);
    for (; i + W <= piece.end; i += W) add(0, i);
    const int64_t count = piece.end - i;
    if (count) add_vector(1, first_lanes<T>(count, standardise(load_part(at + i, count, zero))));
  }
  return {sum((s[0] + s[1]) + (s[2] + s[3])), sum((q[0] + q[1]) + (q[2] + q[3]))};
}

// y for a piece of the rows of a group; x, r, y start at the sample.
template <class T, ActClass A, bool Residual>
GNSWAP_NOINLINE void apply_piece(const Problem& p, const T* x, const T* r, T* y, int64_t position, Cut::Piece piece,
                                 const Coefficients<acc_t<T>>& k) {
  using V = vec_t<T>;
  constexpr int64_t W = kLanes<T>;
  constexpr int U = kRowsAtOnce<A>;
  const Activation<acc_t<T>> how(p.act);
  for (int64_t row = piece.first_row; row < piece.last_row; ++row) {
    const int64_t c = channel_index(p, position + row), at = c * p.S;
    const V shift = splat<V>(k.shift[c]), slope = splat<V>(k.slope[c]), offset_ = splat<V>(k.offset[c]);
    const auto step = [&](int64_t i) {
      fetch_to_write(y + at + i);
      V z = (load(x + at + i) - shift) * slope + offset_;
      if (Residual && r) z += load(r + at + i);
      return activate<A>(how, z);
    };
    const int64_t end = piece.end;
    int64_t i = piece.begin;
    for (; i + U * W <= end; i += U * W) {
      V v[U];
      GNSWAP_UNROLL for (int j = 0; j < U; ++j) v[j] = step(i + j * W);
      GNSWAP_UNROLL for (int j = 0; j < U; ++j) store(y + at + i + j * W, v[j]);
    }
    for (; i + W <= end; i += W) store(y + at + i, step(i));
    if (i == end) continue;
    if (end - piece.begin >= W) {  // the last whole vector, part of it a second time: x and y never overlap
      store(y + at + end - W, step(end - W));
    } else {
      V z = (load_part(x + at + i, end - i, V{}) - shift) * slope + offset_;
      if (Residual && r) z += load_part(r + at + i, end - i, V{});
      store_part(y + at + i, activate<A>(how, z), end - i);
    }
  }
}

// The one step of forward_contiguous that depends on the activation.
template <class T>
using ApplyPiece = void (*)(const Problem&, const T*, const T*, T*, int64_t, Cut::Piece, const Coefficients<acc_t<T>>&);

template <class T> void forward_contiguous(const Problem& p, ApplyPiece<T> apply_piece) {
  using R = acc_t<T>;
  const int64_t D = p.C / p.G, S = p.S, groups = p.N * p.G, sample = p.C * S;
  // where channels differ in nothing that the statistics see, a group is one long row
  const bool flat = !p.order && !p.standardised;
  const Probes probes(p);
  const Cut cut(D, S), sums_cut(flat ? 1 : D, flat ? D * S : S);
  const T *x = static_cast<const T*>(p.x), *residual = static_cast<const T*>(p.residual);
  T* y = static_cast<T*>(p.y);

  const auto start = [&](int64_t n, int64_t g, const Coefficients<R>& k) {
    const double reference = find_reference(p, probes, x + n * sample, g);
    if (!flat) {
      set_group(p, g, reference, 1, k);
      return reference;
    }
    k.shift[0] = static_cast<R>(reference);
    return static_cast<double>(k.shift[0]);
  };
  const auto piece = [&](int64_t n, int64_t g, int64_t i, const Coefficients<R>& k) {
    return flat ? piece_sums<T, true>(p, x + n * sample + g * D * S, 0, sums_cut.piece(i), k)
                : piece_sums<T, false>(p, x + n * sample, g * D, sums_cut.piece(i), k);
  };
  const auto finish = [&](int64_t n, int64_t g, double reference, const Sums* all, const Coefficients<R>& k) {
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < sums_cut.pieces; ++i) {
      sum += all[i].first;
      squares += all[i].second;
    }
    const double size = static_cast<double>(D * S);
    const Moments m = moments(reference, sum, squares, size);
    const double rstd = reciprocal_deviation(m.m2, size, p.eps);
    static_cast<R*>(p.mean)[n * p.G + g] = static_cast<R>(m.mean);
    static_cast<R*>(p.rstd)[n * p.G + g] = static_cast<R>(rstd);
    set_group(p, g, m.mean, rstd, k);
  };
  const auto apply = [&](int64_t n, int64_t g, int64_t i, const Coefficients<R>& k) {
    apply_piece(p, x + n * sample, offset(residual, n * sample), y + n * sample, g * D, cut.piece(i), k);
  };
  const int64_t stride = padded(p.C), sums_size = sums_cut.pieces * static_cast<int64_t>(sizeof(Sums));
  const int64_t coefficients_size = Coefficients<R>::kArrays * stride * static_cast<int64_t>(sizeof(R));

  // Here and everywhere a second pass goes the way of the first. Backwards it would meet what was read last, but x is in
  // the cache either way, and what has to be fetched is the result's memory: a quarter of the time.
  if (group_to_a_thread(p)) {
    for_each(p, groups, D * S, [&](int64_t group) {
      const int64_t n = group / p.G, g = group % p.G;
      Sums* all = static_cast<Sums*>(Scratch::own(sums_size + coefficients_size));
      const Coefficients<R> k(reinterpret_cast<R*>(all + sums_cut.pieces), stride);
      const double reference = start(n, g, k);
      for (int64_t i = 0; i < sums_cut.pieces; ++i) all[i] = piece(n, g, i, k);
      finish(n, g, reference, all, k);
      for (int64_t i = 0; i < cut.pieces; ++i) apply(n, g, i, k);
    });
    return;
  }
  // memory of one group: its reference, the sums of its pieces, coefficients
  const int64_t bytes = padded(64 + sums_size + coefficients_size);
  char* memory = static_cast<char*>(Scratch::shared(groups * bytes));
  const auto reference = [&](int64_t group) { return reinterpret_cast<double*>(memory + group * bytes); };
  const auto all = [&](int64_t group) { return reinterpret_cast<Sums*>(memory + group * bytes + 64); };
  const auto k = [&](int64_t group) {
    return Coefficients<R>(reinterpret_cast<R*>(memory + group * bytes + 64 + sums_size), stride);
  };
  for (int64_t i = 0; i < groups; ++i) *reference(i) = start(i / p.G, i % p.G, k(i));
  for_each(p, groups * sums_cut.pieces, D * S / sums_cut.pieces, [&](int64_t unit) {
    const int64_t group = unit / sums_cut.pieces, i = unit % sums_cut.pieces;
    all(group)[i] = piece(group / p.G, group % p.G, i, k(group));
  });
  for (int64_t i = 0; i < groups; ++i) finish(i / p.G, i % p.G, *reference(i), all(i), k(i));
  for_each(p, groups * cut.pieces, D * S / cut.pieces, [&](int64_t unit) {
    const int64_t group = unit / cut.pieces;
    apply(group / p.G, group % p.G, unit % cut.pieces, k(group));
  });
}

}  // namespace
}  // namespace gnswap
