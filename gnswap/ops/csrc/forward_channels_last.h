// Forward for [N, S, C]: sums per channel down the rows, then one pass that writes y.
#pragma once
#include "common.h"

namespace gnswap {
namespace {

template <class T> void add_probe(const T* x, int64_t C, acc_t<T>* k) {
  constexpr int64_t W = kLanes<T>;
  int64_t c = 0;
  for (; c + W <= C; c += W) store(k + c, load(k + c) + load(x + c));
  if (c < C) store_part(k + c, load_part(k + c, C - c, vec_t<T>{}) + load_part(x + c, C - c, vec_t<T>{}), C - c);
}

// Sums over rows, per channel, of d = x - k and d * d.
template <class T, int Rows>
GNSWAP_NOINLINE void add_rows(const T* x, int64_t C, const acc_t<T>* k, acc_t<T>* s, acc_t<T>* q) {
  using V = vec_t<T>;
  constexpr int64_t W = kLanes<T>;
  int64_t c = 0;
  for (; c + W <= C; c += W) {
    const V kv = load(k + c);
    V s0 = {}, q0 = {}, s1 = {}, q1 = {};  // a few rows by themselves: less is lost in adding to a small sum
    GNSWAP_UNROLL for (int row = 0; row < Rows; row += 2) {
      const V d = load(x + row * C + c) - kv;
      s0 += d;
      q0 += d * d;
      if (row + 1 < Rows) {
        const V e = load(x + (row + 1) * C + c) - kv;
        s1 += e;
        q1 += e * e;
      }
    }
    store(s + c, load(s + c) + (s0 + s1));
    store(q + c, load(q + c) + (q0 + q1));
  }
  if (c < C) {
    const int64_t count = C - c;
    const V kv = load_part(k + c, count, V{});
    V s0 = load_part(s + c, count, V{}), q0 = load_part(q + c, count, V{});
    GNSWAP_UNROLL for (int row = 0; row < Rows; ++row) {
      const V d = load_part(x + row * C + c, count, kv) - kv;
      s0 += d;
      q0 += d * d;
    }
    store_part(s + c, s0, count);
    store_part(q + c, q0, count);
  }
}

constexpr int kSumVectors = kBytes == 64 ? 8 : 4;

// The same for B vectors of channels, whose sums stay in registers.
template <class T, int B>
GNSWAP_INLINE void add_block(const T* x, int64_t C, int64_t rows, const acc_t<T>* k, acc_t<T>* s, acc_t<T>* q) {
  using V = vec_t<T>;
  constexpr int64_t W = kLanes<T>;
  V kv[B], sv[B], qv[B];
  GNSWAP_UNROLL for (int j = 0; j < B; ++j) kv[j] = load(k + j * W), sv[j] = qv[j] = V{};
  for (int64_t row = 0; row < rows; ++row) {
    GNSWAP_UNROLL for (int j = 0; j < B; ++j) {
      fetch_to_read(x + row * C + j * W);
      const V d = load(x + row * C + j * W) - kv[j];
      sv[j] += d;
      qv[j] += d * d;
    }
  }
  GNSWAP_UNROLL for (int j = 0; j < B; ++j) {
    store(s + j * W, load(s + j * W) + sv[j]);
    store(q + j * W, load(q + j * W) + qv[j]);
  }
}

template <class T>
GNSWAP_NOINLINE void add_in_blocks(const T* x, int64_t C, int64_t rows, const acc_t<T>* k, acc_t<T>* s, acc_t<T>* q) {
  const int64_t c = for_each_block<T, kSumVectors>(C, [&](int64_t at, auto vectors) {
    add_block<T, decltype(vectors)::value>(x + at, C, rows, k + at, s + at, q + at);
  });
  if (c == C) return;
  const int64_t count = C - c;
  const vec_t<T> kv = load_part(k + c, count, vec_t<T>{});
  vec_t<T> sv = {}, qv = {};
  for (int64_t row = 0; row < rows; ++row) {
    const vec_t<T> d = load_part(x + row * C + c, count, kv) - kv;
    sv += d;
    qv += d * d;
  }
  store_part(s + c, load_part(s + c, count, vec_t<T>{}) + sv, count);
  store_part(q + c, load_part(q + c, count, vec_t<T>{}) + qv, count);
}

template <class T, ActClass A, bool Residual, int Rows>
GNSWAP_INLINE void apply_some(const T* x, const T* r, T* y, int64_t C, const Coefficients<acc_t<T>>& k,
                              Activation<acc_t<T>> how) {
  using V = vec_t<T>;
  constexpr int64_t W = kLanes<T>;
  int64_t c = 0;
  for (; c + W <= C; c += W) {
    const V shift = load(k.shift + c), slope = load(k.slope + c), offset = load(k.offset + c);
    V z[Rows];
    GNSWAP_UNROLL for (int row = 0; row < Rows; ++row) z[row] = (load(x + row * C + c) - shift) * slope + offset;
    if (Residual && r)
      GNSWAP_UNROLL for (int row = 0; row < Rows; ++row) z[row] += load(r + row * C + c);
    GNSWAP_UNROLL for (int row = 0; row < Rows; ++row) {
      fetch_to_write(y + row * C + c);
      store(y + row * C + c, activate<A>(how, z[row]));
    }
  }
  if (c < C) {
    const int64_t count = C - c;
    const V shift = load_part(k.shift + c, count, V{}), slope = load_part(k.slope + c, count, V{});
    const V offset = load_part(k.offset + c, count, V{});
    GNSWAP_UNROLL for (int row = 0; row < Rows; ++row) {
      V z = (load_part(x + row * C + c, count, V{}) - shift) * slope + offset;
      if (Residual && r) z += load_part(r + row * C + c, count, V{});
      store_part(y + row * C + c, activate<A>(how, z), count);
    }
  }
}

// y for consecutive rows of a sample.
template <class T, ActClass A, bool Residual>
GNSWAP_NOINLINE void apply_rows(const Problem& p, const T* x, const T* r, T* y, int64_t rows,
                                const Coefficients<acc_t<T>>& k) {
  constexpr int U = kRowsAtOnce<A>;
  const Activation<acc_t<T>> how(p.act);
  int64_t row = 0;
  if constexpr (U > 1)
    for (; side_by_side<T>(p) && row + U <= rows; row += U)
      apply_some<T, A, Residual, U>(x + row * p.C, offset(r, row * p.C), y + row * p.C, p.C, k, how);
  for (; row < rows; ++row)
    apply_some<T, A, Residual, 1>(x + row * p.C, offset(r, row * p.C), y + row * p.C, p.C, k, how);
}

// Statistics of a group from the means and M2s of its channels, each over `rows` elements.
inline GNSWAP_NOINLINE Moments group_moments(const double* mean, const double* m2, int64_t D, double rows) {
  constexpr int64_t W = kLanes<double>;
  const double reference = mean[0];
  F64 sums = {}, squares = {};
  int64_t i = 0;
  for (; i + W <= D; i += W) {
    const F64 delta = load(mean + i) - reference;
    sums += delta;
    squares += load(m2 + i) + delta * delta * rows;
  }
  double total = sum(sums), square = sum(squares);
  for (; i < D; ++i) {
    const double delta = mean[i] - reference;
    total += delta;
    square += m2[i] + delta * delta * rows;
  }
  return moments(reference, total * rows, square, static_cast<double>(D) * rows);
}

// Per-channel sums of all chunks -> statistics of the groups -> coefficients of the channels; one sample.
template <class R>
GNSWAP_NOINLINE void finish_sample(const Problem& p, int64_t n, const R* k, const R* sums, int64_t stride, int64_t chunks,
                                   double* __restrict work, const Coefficients<R>& out) {
  const int64_t C = p.C, D = C / p.G;
  double *__restrict mean = work, *__restrict m2 = work + C;  // sums first, in the groups' order at the end
  for (int64_t c = 0; c < C; ++c) mean[c] = m2[c] = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const R *s = sums + 2 * chunk * stride, *q = s + stride;
    add_to(mean, s, C);
    add_to(m2, q, C);
  }
  const double rows = static_cast<double>(p.S), share = 1 / rows;
  const R *scale = static_cast<const R*>(p.scale), *shift = static_cast<const R*>(p.shift);
  for (int64_t c = 0; c < C; ++c) {
    const double s = mean[c], a = scale[c], centred = m2[c] - s * s * share;
    mean[c] = a * (k[c] + s * share) + shift[c];
    m2[c] = (centred > 0 ? centred : 0) * (a * a);
  }
  if (p.order) {
    double *ordered = work + 2 * C, *ordered_m2 = work + 3 * C;
    for (int64_t i = 0; i < C; ++i) {
      ordered[i] = mean[p.order[i]];
      ordered_m2[i] = m2[p.order[i]];
    }
    mean = ordered;
    m2 = ordered_m2;
  }
  for (int64_t g = 0; g < p.G; ++g) {
    const Moments m = group_moments(mean + g * D, m2 + g * D, D, rows);
    const double rstd = reciprocal_deviation(m.m2, static_cast<double>(D) * rows, p.eps);
    static_cast<R*>(p.mean)[n * p.G + g] = static_cast<R>(m.mean);
    static_cast<R*>(p.rstd)[n * p.G + g] = static_cast<R>(rstd);
    set_group(p, g, m.mean, rstd, out);
  }
}

template <class T>
using ApplyRows = void (*)(const Problem&, const T*, const T*, T*, int64_t, const Coefficients<acc_t<T>>&);

template <class T> void forward_channels_last(const Problem& p, ApplyRows<T> apply_rows) {
  using R = acc_t<T>;
  const int64_t C = p.C, S = p.S, rows = rows_per_chunk(p), chunks = ceil_div(S, rows);
  const T *x = static_cast<const T*>(p.x), *residual = static_cast<const T*>(p.residual);
  T* y = static_cast<T*>(p.y);

  // memory of one sample: doubles [4, C] to work in, then coefficients, shifts k and the sums of the chunks
  const int64_t stride = padded(C), floats = (Coefficients<R>::kArrays + 1 + 2 * chunks) * stride;
  const int64_t bytes = padded(4 * C * 8 + floats * static_cast<int64_t>(sizeof(R)));
  struct Sample { double* work; Coefficients<R> coefficients; R *k, *sums; };
  const auto sample_at = [&](void* memory) {
    double* work = static_cast<double*>(memory);
    R* first = reinterpret_cast<R*>(work + 4 * C);
    R* k = first + Coefficients<R>::kArrays * stride;
    return Sample{work, Coefficients<R>(first, stride), k, k + stride};
  };
  // shift: the channel's mean over a few rows spread over the sample, about one in 64
  const int64_t probes = max(1, min(8, S / 64));
  const auto find_shift = [&](int64_t n, R* k) {
    for (int64_t c = 0; c < C; ++c) k[c] = 0;
    for (int64_t i = 0; i < probes; ++i) add_probe(x + (n * S + (2 * i + 1) * S / (2 * probes)) * C, C, k);
    for (int64_t c = 0; c < C; ++c) k[c] /= R(probes);
  };
  const auto chunk_sums = [&](int64_t n, int64_t chunk, const Sample& m) {
    R *s = m.sums + chunk * 2 * stride, *q = s + stride;
    for (int64_t c = 0; c < 2 * stride; ++c) s[c] = 0;
    const int64_t last = min(S, (chunk + 1) * rows);
    int64_t row = chunk * rows;
    for (; in_blocks<T, kSumVectors>(p) && row < last; row += kBlockRows)
      add_in_blocks<T>(x + (n * S + row) * C, C, min(kBlockRows, last - row), m.k, s, q);
    for (; side_by_side<T>(p) && row + 8 <= last; row += 8) add_rows<T, 8>(x + (n * S + row) * C, C, m.k, s, q);
    for (; row < last; ++row) add_rows<T, 1>(x + (n * S + row) * C, C, m.k, s, q);
  };
  const auto chunk_apply = [&](int64_t n, int64_t chunk, const Sample& m) {
    const int64_t first = chunk * rows, at = (n * S + first) * C;
    apply_rows(p, x + at, offset(residual, at), y + at, min(S, first + rows) - first, m.coefficients);
  };
  const auto finish = [&](int64_t n, const Sample& m) {
    finish_sample<R>(p, n, m.k, m.sums, stride, chunks, m.work, m.coefficients);
  };

  if (p.N % p.threads == 0 || C * S < kSmallWork) {  // whole samples, read again from the cache
    for_each(p, p.N, C * S, [&](int64_t n) {
      const Sample m = sample_at(Scratch::own(bytes));
      find_shift(n, m.k);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) chunk_sums(n, chunk, m);
      finish(n, m);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) chunk_apply(n, chunk, m);
    });
    return;
  }
  char* memory = static_cast<char*>(Scratch::shared(p.N * bytes));
  const auto sample = [&](int64_t n) { return sample_at(memory + n * bytes); };
  for_each(p, p.N, probes * C, [&](int64_t n) { find_shift(n, sample(n).k); });
  for_each(p, p.N * chunks, rows * C, [&](int64_t i) { chunk_sums(i / chunks, i % chunks, sample(i / chunks)); });
  for_each(p, p.N, 4 * C, [&](int64_t n) { finish(n, sample(n)); });
  for_each(p, p.N * chunks, rows * C, [&](int64_t i) { chunk_apply(i / chunks, i % chunks, sample(i / chunks)); });
}

}  // namespace
}  // namespace gnswap
