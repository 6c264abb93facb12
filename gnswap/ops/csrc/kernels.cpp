// The kernels for one instruction set: compiled once for each, with GNSWAP_ISA naming it. Everything but the table
// is in unnamed namespaces, so that the linker can never take a function of one set for that of another.
#include "backward_channels_last.h"
#include "backward_contiguous.h"
#include "forward_channels_last.h"
#include "forward_contiguous.h"

namespace gnswap {
namespace {

template <class T, ActClass A, bool Residual> void forward(const Problem& p) {
  p.channels_last ? forward_channels_last<T>(p, apply_rows<T, A, Residual>)
                  : forward_contiguous<T>(p, apply_piece<T, A, Residual>);
}

template <class T, ActClass A, bool Residual> void backward(const Problem& p) {
  const bool back = From<T>::reads_back(p);
  if (p.channels_last) {
    const auto gradient = back ? rows_gradient<T, kIdentity, false> : rows_gradient<T, A, Residual>;
    backward_channels_last<T>(p, {rows_sums<T, A, Residual>, gradient});
  } else {
    const auto gradient = back ? piece_gradient<T, kIdentity, false> : piece_gradient<T, A, Residual>;
    backward_contiguous<T>(p, {piece_gradient_sums<T, A, Residual>, gradient});
  }
}

// fp32 without transcendental functions is what must be fast; everything else shares one piece of code per dtype.
#define GNSWAP_RUN(direction)                                                                            \
  void run_##direction(const Problem& p) {                                                               \
    switch (p.dtype) {                                                                                   \
      case Dtype::f16: return direction<half, kAny, true>(p);                                            \
      case Dtype::bf16: return direction<bfloat, kAny, true>(p);                                         \
      case Dtype::f64: return direction<double, kAny, true>(p);                                          \
      case Dtype::f32: break;                                                                            \
    }                                                                                                    \
    if (p.act > kRelu6) return direction<float, kAny, true>(p);                                          \
    if (p.act != kRelu)                                                                                  \
      return p.residual ? direction<float, kClamp, true>(p) : direction<float, kClamp, false>(p);        \
    return p.residual ? direction<float, kMax, true>(p) : direction<float, kMax, false>(p);              \
  }

GNSWAP_RUN(forward)
GNSWAP_RUN(backward)

}  // namespace

#define GNSWAP_JOIN2(a, b) a##b
#define GNSWAP_JOIN(a, b) GNSWAP_JOIN2(a, b)
#define GNSWAP_STRING2(a) #a
#define GNSWAP_STRING(a) GNSWAP_STRING2(a)

const Kernels* GNSWAP_JOIN(kernels_, GNSWAP_ISA)() {
  static const Kernels table = {GNSWAP_STRING(GNSWAP_ISA), run_forward, run_backward};
  return &table;
}

}  // namespace gnswap
