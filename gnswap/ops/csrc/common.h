// What forward and backward share: scratch memory, how a sample is cut into pieces, the closed form per channel.
//
// Order of summation. A sample is cut into pieces by its shape alone (never by N or by the number of threads), a piece
// is summed by one thread in one order, and pieces are merged in their order in double. So a sample has the same bits
// alone, in any batch and with any number of threads; threads only decide who computes a piece.
#pragma once
#include <cstdlib>
#include <type_traits>

#include "act.h"

namespace gnswap {
namespace {

constexpr int64_t kBlock = 4096;      // elements of a row that are summed in fp32 before going to double
constexpr int64_t kSmallWork = 16384; // elements that are not worth a second thread

GNSWAP_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
GNSWAP_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
GNSWAP_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Grow-only memory that a thread keeps for its next call: an allocation of this size would be new pages each time.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  void* at_least(int64_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = ceil_div(bytes, 4096) * 4096;
      memory_ = std::aligned_alloc(64, static_cast<size_t>(size_));
      if (memory_ == nullptr) std::abort();  // a few MB could not be had
    }
    return memory_;
  }
  // Where the caller of the op keeps what its threads share, and where a thread keeps what is its own.
  static void* shared(int64_t bytes) { static thread_local Scratch s; return s.at_least(bytes); }
  static void* own(int64_t bytes) { static thread_local Scratch s; return s.at_least(bytes); }

 private:
  void* memory_ = nullptr;
  int64_t size_ = 0;
};

// Whether threads share out whole groups, [N, C, S]; else the pieces of all groups.
GNSWAP_INLINE bool group_to_a_thread(const Problem& p) {
  return p.N * p.G >= 2 * p.threads || p.C / p.G * p.S < 2 * kSmallWork;
}

// Calls f(unit) for each unit, on several threads where a unit is `elements` long and that is worth it.
template <class F> void for_each(const Problem& p, int64_t units, int64_t elements, const F& f) {
  const auto body = [](void* context, int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) (*static_cast<const F*>(context))(unit);
  };
  const int64_t grain = max(1, kSmallWork / max(1, elements));
  if (p.threads <= 1 || units <= grain) {
    body(const_cast<F*>(&f), 0, units);
  } else {
    p.parallel_for(units, grain, body, const_cast<F*>(&f));
  }
}

// The steps of one output: with d = x - shift,  xhat = d * inner + inner_bias  and  z = d * slope + offset.
// `shift` is the value of x that the group's mean has in this channel, so that d loses no digits however far
// the mean lies from zero; its rounding is made good in the two offsets.
template <class R> struct Channel { R shift, slope, offset, inner, inner_bias; };

template <class R> GNSWAP_INLINE Channel<R> channel(const Problem& p, int64_t c, double mean, double rstd) {
  const R a = static_cast<const R*>(p.scale)[c], b = static_cast<const R*>(p.shift)[c];
  const R w = static_cast<const R*>(p.weight)[c], o = static_cast<const R*>(p.bias)[c];
  R shift = static_cast<R>(mean - b) / a;
  shift = shift < R(1e30) && shift > R(-1e30) ? shift : R(0);  // a channel with scale 0
  const R inner = static_cast<R>(a * rstd);
  const R inner_bias = static_cast<R>((static_cast<double>(a) * shift + b - mean) * rstd);
  return {shift, inner * w, inner_bias * w + o, inner, inner_bias};
}

// Channel's fields, along and across (see backward.h), each an array [C].
template <class R> struct Coefficients {
  R *shift, *slope, *offset, *inner, *inner_bias, *along, *across;
  static constexpr int64_t kArrays = 7;
  // `stride` values an array: C and some, lest all arrays lie on the same lines of the cache
  Coefficients(R* p, int64_t stride)
      : shift(p), slope(p + stride), offset(p + 2 * stride), inner(p + 3 * stride), inner_bias(p + 4 * stride),
        along(p + 5 * stride), across(p + 6 * stride) {}
  // those of the channels from c on
  Coefficients(const Coefficients& k, int64_t c)
      : shift(k.shift + c), slope(k.slope + c), offset(k.offset + c), inner(k.inner + c), inner_bias(k.inner_bias + c),
        along(k.along + c), across(k.across + c) {}
};

GNSWAP_INLINE int64_t padded(int64_t count) { return ceil_div(count, 16) * 16 + 32; }

// Writes the coefficients of the channels of one group.
template <class R>
GNSWAP_NOINLINE void set_group(const Problem& p, int64_t g, double mean, double rstd, const Coefficients<R>& out) {
  const int64_t D = p.C / p.G;
  const auto set = [&](int64_t c) {
    const Channel<R> k = channel<R>(p, c, mean, rstd);
    out.shift[c] = k.shift;
    out.slope[c] = k.slope;
    out.offset[c] = k.offset;
    out.inner[c] = k.inner;
    out.inner_bias[c] = k.inner_bias;
  };
  if (p.order) {
    for (int64_t i = 0; i < D; ++i) set(p.order[g * D + i]);
  } else {
#pragma GCC ivdep
    for (int64_t c = g * D; c < (g + 1) * D; ++c) set(c);
  }
}

// `p + at`, or null where p is null
template <class T> GNSWAP_INLINE T* offset(T* p, int64_t at) { return p ? p + at : nullptr; }

GNSWAP_INLINE int64_t channel_index(const Problem& p, int64_t position) {
  return p.order ? p.order[position] : position;
}

// How the `rows` rows of a group in an [N, C, S] tensor are cut: pieces of whole rows, or of a part of one long row.
struct Cut {
  int64_t rows, length, rows_a_piece, pieces_a_row, pieces;
  Cut(int64_t rows_, int64_t length_) : rows(rows_), length(length_) {
    rows_a_piece = max(1, kBlock / length);
    pieces_a_row = ceil_div(length, kBlock);
    pieces = ceil_div(rows, rows_a_piece) * pieces_a_row;
  }
  struct Piece { int64_t first_row, last_row, begin, end; };
  Piece piece(int64_t i) const {
    if (pieces == 1) return {0, rows, 0, length};  // the common case, without divisions
    const int64_t row = i / pieces_a_row * rows_a_piece, begin = i % pieces_a_row * kBlock;
    return {row, min(rows, row + rows_a_piece), begin, min(length, begin + kBlock)};
  }
};

// Asks for the memory that a loop at `p` will come to in a while. The hardware does so by itself where memory is read as
// one stream; here there are two to four, one of them written. A third of the time; a few pages ahead, since the other
// processors of a machine make memory slow. What lies behind the end of a tensor is asked for in vain, and harmless.
constexpr uintptr_t kAhead = 8192;
template <class T> GNSWAP_INLINE void fetch_to_read(const T* p) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + kAhead));
}
template <class T> GNSWAP_INLINE void fetch_to_write(T* p) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + kAhead), 1);
}

struct Moments { double mean, m2; };  // m2: sum of squared deviations from the mean

// From sums of d and d * d over n elements, d relative to `reference`.
GNSWAP_INLINE Moments moments(double reference, double sum, double squares, double n) {
  const double delta = sum / n, m2 = squares - sum * delta;
  return {reference + delta, m2 > 0 ? m2 : 0};
}

// target += source, `count` values of the accumulation type into doubles
template <class R> inline void add_to(double* target, const R* source, int64_t count) {
  constexpr int64_t W = kLanes<double>;
  int64_t i = 0;
  for (; i + W <= count; i += W) store(target + i, load(target + i) + load_double(source + i));
  for (; i < count; ++i) target[i] += source[i];
}

GNSWAP_INLINE double reciprocal_deviation(double m2, double n, double eps) { return 1 / __builtin_sqrt(m2 / n + eps); }

// Whether the forward works on rows of an [S, C] sample side by side, so that coefficients and sums are read once for
// some. With AVX-512 short rows of a large sample do better one after another, as one stream of memory.
template <class T> GNSWAP_INLINE bool side_by_side(const Problem& p) {
  const int64_t row = p.C * static_cast<int64_t>(sizeof(T));
  return kBytes < 64 || row > 2048 || row * p.S <= 262144;
}

// Whether rows of an [S, C] sample are worked on in blocks of channels whose sums and coefficients stay in registers.
// A block of B vectors is as wide as registers go; where that is a small part of a row, memory is read in bits and pieces,
// and sums in the cache are faster.
template <class T, int B> GNSWAP_INLINE bool in_blocks(const Problem& p) {
  return p.C <= (kBytes == 64 ? 4 : 1) * B * kLanes<T>;
}
constexpr int64_t kBlockRows = 32;  // summed by themselves: less is lost in adding to a small sum

// Calls f(c, vectors) for each block of channels, `vectors` an integral_constant; what is left is less than a vector.
template <class T, int B, class F> GNSWAP_INLINE int64_t for_each_block(int64_t C, const F& f) {
  constexpr int64_t W = kLanes<T>;
  int64_t c = 0;
  for (; c + B * W <= C; c += B * W) f(c, std::integral_constant<int, B>());
  const auto rest = [&](auto vectors) {
    if (vectors >= B || c + vectors * W > C) return;
    f(c, vectors);
    c += vectors * W;
  };
  rest(std::integral_constant<int, 4>());
  rest(std::integral_constant<int, 2>());
  rest(std::integral_constant<int, 1>());
  return c;
}

// Rows of an [S, C] sample that one thread sums at a time in fp32: at most some 32 000 elements, and so that the chunks
// of a sample are alike and of an even number.
GNSWAP_INLINE int64_t rows_per_chunk(const Problem& p) {
  const int64_t most = max(16, min(128, 32768 / p.C / 8 * 8));
  return p.S > most ? ceil_div(p.S, ceil_div(p.S, 2 * most) * 2) : p.S;
}

}  // namespace
}  // namespace gnswap
