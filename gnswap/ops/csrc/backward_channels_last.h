// Backward for [N, S, C]: a vector holds neighbouring channels, and sums run down the rows.
#pragma once
#include "backward.h"

namespace gnswap {
namespace {

template <class T, ActClass A, bool Residual, int Rows>
GNSWAP_INLINE void some_sums(const T* x, const T* dy, const T* r, T* dr, int64_t C, const Coefficients<acc_t<T>>& k,
                               acc_t<T>* s, acc_t<T>* q, Activation<acc_t<T>> how) {
  using V = vec_t<T>;
  constexpr int64_t W = kLanes<T>;
  int64_t c = 0;
  for (; c + W <= C; c += W) {
    const V shift = load(k.shift + c), slope = load(k.slope + c), offset = load(k.offset + c);
    V sv = {}, qv = {};
    GNSWAP_UNROLL for (int row = 0; row < Rows; ++row) {
      const int64_t at = row * C + c;
      const V d = load(x + at) - shift;
      V z = d * slope + offset;
      if (Residual && r) z += load(r + at);
      const V g = activate_backward<A>(how, z, load(dy + at));
      if (Residual && dr) store(dr + at, g);
      sv += g;
      qv += g * d;
    }
    store(s + c, load(s + c) + sv);
    store(q + c, load(q + c) + qv);
  }
  if (c == C) return;
  const int64_t count = C - c;
  const V zero = {}, shift = load_part(k.shift + c, count, zero), slope = load_part(k.slope + c, count, zero);
  const V offset = load_part(k.offset + c, count, zero);
  V sv = load_part(s + c, count, zero), qv = load_part(q + c, count, zero);
  for (int row = 0; row < Rows; ++row) {
    const int64_t at = row * C + c;
    const V d = load_part(x + at, count, zero) - shift;
    V z = d * slope + offset;
    if (Residual && r) z += load_part(r + at, count, zero);
    const V g = activate_backward<A>(how, z, load_part(dy + at, count, zero));
    if (Residual && dr) store_part(dr + at, g, count);
    sv += g;
    qv += g * d;
  }
  store_part(s + c, sv, count);
  store_part(q + c, qv, count);
}

// Vectors of a block. Sums gain by blocks in rows of up to twice the length at which dx does.
constexpr int kBackwardVectors = 4;

// What z is computed with, for B vectors of channels from c on.
template <class T, int B> struct InRegisters {
  vec_t<T> shift[B], slope[B], offset[B];
  GNSWAP_INLINE InRegisters(const Coefficients<acc_t<T>>& k, int64_t c) {
    GNSWAP_UNROLL for (int j = 0; j < B; ++j) {
      const int64_t channel = c + j * kLanes<T>;
      shift[j] = load(k.shift + channel), slope[j] = load(k.slope + channel), offset[j] = load(k.offset + channel);
    }
  }
};

// The same for B vectors of channels, whose coefficients and sums stay in registers.
template <class T, ActClass A, bool Residual, int B>
GNSWAP_INLINE void block_sums(const T* x, const T* dy, const T* r, T* dr, int64_t C, int64_t rows, int64_t c,
                              const Coefficients<acc_t<T>>& k, acc_t<T>* s, acc_t<T>* q, Activation<acc_t<T>> how) {
  using V = vec_t<T>;
  constexpr int64_t W = kLanes<T>;
  const InRegisters<T, B> of(k, c);
  V sv[B], qv[B];
  GNSWAP_UNROLL for (int j = 0; j < B; ++j) sv[j] = qv[j] = V{};
  for (int64_t row = 0; row < rows; ++row) {
    GNSWAP_UNROLL for (int j = 0; j < B; ++j) {
      const int64_t at = row * C + c + j * W;
      fetch_to_read(x + at);
      fetch_to_read(dy + at);
      const V d = load(x + at) - of.shift[j];
      V z = d * of.slope[j] + of.offset[j];
      if (Residual && r) z += load(r + at);
      const V g = activate_backward<A>(how, z, load(dy + at));
      if (Residual && dr) store(dr + at, g);
      sv[j] += g;
      qv[j] += g * d;
    }
  }
  GNSWAP_UNROLL for (int j = 0; j < B; ++j) {
    const int64_t channel = c + j * W;
    store(s + channel, load(s + channel) + sv[j]);
    store(q + channel, load(q + channel) + qv[j]);
  }
}

template <class T, ActClass A, bool Residual, int Rows>
GNSWAP_INLINE void some_gradient(const T* x, const T* dy, const T* r, T* dx, int64_t C, const Coefficients<acc_t<T>>& k,
                                   Activation<acc_t<T>> how) {
  using V = vec_t<T>;
  constexpr int64_t W = kLanes<T>;
  int64_t c = 0;
  for (; c + W <= C; c += W) {
    const V shift = load(k.shift + c), slope = load(k.slope + c), offset = load(k.offset + c);
    const V along = load(k.along + c), across = load(k.across + c);
    V result[Rows];
    GNSWAP_UNROLL for (int row = 0; row < Rows; ++row) {
      const V d = load(x + row * C + c) - shift;
      V z = d * slope + offset;
      if (Residual && r) z += load(r + row * C + c);
      const V g = activate_backward<A>(how, z, load(dy + row * C + c));
      result[row] = g * slope - (d * along + across);
    }
    GNSWAP_UNROLL for (int row = 0; row < Rows; ++row) {
      fetch_to_write(dx + row * C + c);
      store(dx + row * C + c, result[row]);
    }
  }
  if (c == C) return;
  const int64_t count = C - c;
  const V zero = {}, shift = load_part(k.shift + c, count, zero), slope = load_part(k.slope + c, count, zero);
  const V offset = load_part(k.offset + c, count, zero), along = load_part(k.along + c, count, zero);
  const V across = load_part(k.across + c, count, zero);
  for (int row = 0; row < Rows; ++row) {
    const V d = load_part(x + row * C + c, count, zero) - shift;
    V z = d * slope + offset;
    if (Residual && r) z += load_part(r + row * C + c, count, zero);
    const V g = activate_backward<A>(how, z, load_part(dy + row * C + c, count, zero));
    store_part(dx + row * C + c, g * slope - (d * along + across), count);
  }
}

// The same for B vectors of channels, whose coefficients stay in registers.
template <class T, ActClass A, bool Residual, int B>
GNSWAP_INLINE void block_gradient(const T* x, const T* dy, const T* r, T* dx, int64_t C, int64_t rows, int64_t c,
                                  const Coefficients<acc_t<T>>& k, Activation<acc_t<T>> how) {
  using V = vec_t<T>;
  constexpr int64_t W = kLanes<T>;
  const InRegisters<T, B> of(k, c);
  V along[B], across[B];
  GNSWAP_UNROLL for (int j = 0; j < B; ++j) along[j] = load(k.along + c + j * W), across[j] = load(k.across + c + j * W);
  for (int64_t row = 0; row < rows; ++row) {
    GNSWAP_UNROLL for (int j = 0; j < B; ++j) {
      const int64_t at = row * C + c + j * W;
      fetch_to_write(dx + at);
      const V d = load(x + at) - of.shift[j];
      V z = d * of.slope[j] + of.offset[j];
      if (Residual && r) z += load(r + at);
      const V g = activate_backward<A>(how, z, load(dy + at));
      store(dx + at, g * of.slope[j] - (d * along[j] + across[j]));
    }
  }
}

// Both for consecutive rows of a sample.
template <class T, ActClass A, bool Residual>
GNSWAP_NOINLINE void rows_sums(const Problem& p, const T* x, const T* dy, const T* r, T* dr, int64_t rows,
                               const Coefficients<acc_t<T>>& k, acc_t<T>* s, acc_t<T>* q) {
  constexpr int U = kRowsAtOnce<A>;
  const Activation<acc_t<T>> how(p.act);
  const int64_t C = p.C;
  int64_t row = 0;
  for (; A != kAny && in_blocks<T, 2 * kBackwardVectors>(p) && row < rows; row += kBlockRows) {
    const int64_t first = row * C, some = min(kBlockRows, rows - row);
    const T *x0 = x + first, *dy0 = dy + first, *r0 = offset(r, first);
    T* dr0 = offset(dr, first);
    const int64_t c = for_each_block<T, kBackwardVectors>(C, [&](int64_t channel, auto vectors) {
      block_sums<T, A, Residual, decltype(vectors)::value>(x0, dy0, r0, dr0, C, some, channel, k, s, q, how);
    });
    const Coefficients<acc_t<T>> rest(k, c);
    for (int64_t at = c; c < C && at < some * C; at += C)
      some_sums<T, A, Residual, 1>(x0 + at, dy0 + at, offset(r0, at), offset(dr0, at), C - c, rest, s + c, q + c, how);
  }
  if constexpr (U > 1) {
    for (; row + U <= rows; row += U) {
      const int64_t at = row * C;
      some_sums<T, A, Residual, U>(x + at, dy + at, offset(r, at), offset(dr, at), C, k, s, q, how);
    }
  }
  for (; row < rows; ++row) {
    const int64_t at = row * C;
    some_sums<T, A, Residual, 1>(x + at, dy + at, offset(r, at), offset(dr, at), C, k, s, q, how);
  }
}

template <class T, ActClass A, bool Residual>
GNSWAP_NOINLINE void rows_gradient(const Problem& p, const T* x, const T* dy, const T* r, T* dx, int64_t rows,
                                   const Coefficients<acc_t<T>>& k) {
  constexpr int U = kRowsAtOnce<A>;
  const Activation<acc_t<T>> how(p.act);
  const int64_t C = p.C;
  int64_t row = 0;
  for (; A != kAny && in_blocks<T, kBackwardVectors>(p) && row < rows; row += kBlockRows) {
    const int64_t first = row * C, some = min(kBlockRows, rows - row);
    const T *x0 = x + first, *dy0 = dy + first, *r0 = offset(r, first);
    T* dx0 = dx + first;
    const int64_t c = for_each_block<T, kBackwardVectors>(C, [&](int64_t channel, auto vectors) {
      block_gradient<T, A, Residual, decltype(vectors)::value>(x0, dy0, r0, dx0, C, some, channel, k, how);
    });
    const Coefficients<acc_t<T>> rest(k, c);
    for (int64_t at = c; c < C && at < some * C; at += C)
      some_gradient<T, A, Residual, 1>(x0 + at, dy0 + at, offset(r0, at), dx0 + at, C - c, rest, how);
  }
  if constexpr (U > 1)
    for (; row + U <= rows; row += U)
      some_gradient<T, A, Residual, U>(x + row * C, dy + row * C, offset(r, row * C), dx + row * C, C, k, how);
  for (; row < rows; ++row)
    some_gradient<T, A, Residual, 1>(x + row * C, dy + row * C, offset(r, row * C), dx + row * C, C, k, how);
}

// Sums of all chunks -> dbias and dweight of the sample (`partial` [2, C]) -> coefficients of dx.
template <class R>
GNSWAP_NOINLINE void finish_gradient(const Problem& p, int64_t n, const R* sums, int64_t stride, int64_t chunks,
                                     double* __restrict partial, const Coefficients<R>& k) {
  const int64_t C = p.C;
  for (int64_t c = 0; c < 2 * C; ++c) partial[c] = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const R *s = sums + 2 * chunk * stride, *q = s + stride;
    add_to(partial, s, C);
    add_to(partial + C, q, C);
  }
  const R* rstd = static_cast<const R*>(p.rstd) + n * p.G;
  for (int64_t g = 0; g < p.G; ++g) finish_group(p, g, rstd[g], partial, partial + C, k);
}

// The steps that depend on the activation.
template <class T> struct RowSteps {
  void (*sums)(const Problem&, const T*, const T*, const T*, T*, int64_t, const Coefficients<acc_t<T>>&, acc_t<T>*,
               acc_t<T>*);
  void (*gradient)(const Problem&, const T*, const T*, const T*, T*, int64_t, const Coefficients<acc_t<T>>&);
};

template <class T> void backward_channels_last(const Problem& p, RowSteps<T> step) {
  using R = acc_t<T>;
  const int64_t C = p.C, S = p.S, rows = rows_per_chunk(p), chunks = ceil_div(S, rows);
  const T *x = static_cast<const T*>(p.x), *dy = static_cast<const T*>(p.dy);
  const T* residual = static_cast<const T*>(p.residual);
  T *dx = static_cast<T*>(p.dx), *dresidual = static_cast<T*>(p.dresidual);
  const From<T> from(p);

  // memory of one sample: coefficients and sums of the chunks
  const int64_t stride = padded(C), floats = (Coefficients<R>::kArrays + 2 * chunks) * stride;
  const int64_t bytes = floats * static_cast<int64_t>(sizeof(R));
  struct Sample { Coefficients<R> coefficients; R* sums; };
  const auto sample_at = [&](void* memory) {
    R* first = static_cast<R*>(memory);
    return Sample{Coefficients<R>(first, stride), first + Coefficients<R>::kArrays * stride};
  };
  const auto start = [&](int64_t n, const Sample& m) {
    const R *mean = static_cast<const R*>(p.mean) + n * p.G, *rstd = static_cast<const R*>(p.rstd) + n * p.G;
    for (int64_t g = 0; g < p.G; ++g) set_group(p, g, mean[g], rstd[g], m.coefficients);
  };
  const auto chunk_sums = [&](int64_t n, int64_t chunk, const Sample& m) {
    R *s = m.sums + chunk * 2 * stride, *q = s + stride;
    for (int64_t c = 0; c < 2 * stride; ++c) s[c] = 0;
    const int64_t first = chunk * rows, at = (n * S + first) * C;
    step.sums(p, x + at, dy + at, offset(residual, at), offset(dresidual, at), min(S, first + rows) - first,
              m.coefficients, s, q);
  };
  const auto chunk_apply = [&](int64_t n, int64_t chunk, const Sample& m) {
    const int64_t first = chunk * rows, at = (n * S + first) * C;
    step.gradient(p, x + at, from.dy + at, offset(from.residual, at), dx + at, min(S, first + rows) - first,
                  m.coefficients);
  };

  double* partial = static_cast<double*>(Scratch::shared(p.N * (2 * C * 8 + bytes)));
  if (p.N % p.threads == 0 || C * S < kSmallWork) {
    for_each(p, p.N, C * S, [&](int64_t n) {
      const Sample m = sample_at(Scratch::own(bytes));
      start(n, m);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) chunk_sums(n, chunk, m);
      finish_gradient<R>(p, n, m.sums, stride, chunks, partial + 2 * n * C, m.coefficients);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) chunk_apply(n, chunk, m);
    });
  } else {
    char* memory = reinterpret_cast<char*>(partial + p.N * 2 * C);
    const auto sample = [&](int64_t n) { return sample_at(memory + n * bytes); };
    for_each(p, p.N, 4 * C, [&](int64_t n) { start(n, sample(n)); });
    for_each(p, p.N * chunks, rows * C, [&](int64_t i) { chunk_sums(i / chunks, i % chunks, sample(i / chunks)); });
    for_each(p, p.N, 4 * C, [&](int64_t n) {
      const Sample m = sample(n);
      finish_gradient<R>(p, n, m.sums, stride, chunks, partial + 2 * n * C, m.coefficients);
    });
    for_each(p, p.N * chunks, rows * C, [&](int64_t i) { chunk_apply(i / chunks, i % chunks, sample(i / chunks)); });
  }
  sum_over_batch(p, partial);
}

}  // namespace
}  // namespace gnswap
