// The activations and their derivatives; NaN goes through, and kinks take the side that torch's autograd takes.
#pragma once
#include "problem.h"
#include "vec.h"

namespace gnswap {
namespace {

// Which activations a piece of code can do. Every combination of dtype and activation as code of its own would take
// minutes to compile; the branch that kAny takes for each vector is always predicted and hides behind the memory.
enum ActClass : int {
  kIdentity,
  kMax,    // relu
  kClamp,  // none, relu, relu6
  kAny
};

// Rows (or vectors of a row) that are worked on together; little for kAny, whose step is long enough by itself.
template <ActClass A> constexpr int kRowsAtOnce = A == kAny ? 1 : 4;

template <class R> struct Activation {
  Act act;
  R lower, upper;  // of the result of none, relu, relu6. Variables, not constants: so the compiler finds min and max
  explicit Activation(Act a)
      : act(a), lower(a == kNone ? -R(__builtin_inf()) : R(0)), upper(a == kRelu6 ? R(6) : R(__builtin_inf())) {}
};

template <class V> GNSWAP_INLINE V sigmoid(V z) { return 1 / (1 + exp(-z)); }

// act(z)
template <ActClass A, class R, class V> GNSWAP_INLINE V activate(const Activation<R>& how, V z) {
  const V zero = {};
  if constexpr (A == kIdentity) return z;
  if constexpr (A == kMax || A == kClamp) {
    const V lower = splat<V>(how.lower), upper = splat<V>(how.upper);
    z = select(lower > z, lower, z);
    return A == kMax ? z : select(upper < z, upper, z);
  }
  if (how.act <= kRelu6) return activate<kClamp>(how, z);
  if (how.act == kSilu) return z * sigmoid(z);
  if (how.act == kGelu) return z * R(0.5) * (1 + erf(z * R(0.70710678118654752440L)));
  if (how.act == kHardswish) {
    const V six = splat<V>(R(6));
    V t = z + 3;
    t = select(t < zero, zero, t);
    t = select(t > six, six, t);
    return z * t * R(1.0L / 6);
  }
  if (how.act == kLeakyRelu) return select(z < zero, z * R(0.01L), z);
  return z;
}

// dy * act'(z)
template <ActClass A, class R, class V> GNSWAP_INLINE V activate_backward(const Activation<R>& how, V z, V dy) {
  const V zero = {};
  if constexpr (A == kIdentity) return dy;
  if constexpr (A == kMax || A == kClamp) {
    auto off = z <= splat<V>(how.lower);
    if constexpr (A == kClamp) off |= z >= splat<V>(how.upper);
    return (V)((decltype(off))dy & ~off);
  }
  if (how.act <= kRelu6) return activate_backward<kClamp>(how, z, dy);
  if (how.act == kSilu) {
    const V s = sigmoid(z);
    return dy * s * (1 + z * (1 - s));
  }
  if (how.act == kGelu) {
    const V cdf = R(0.5) * (1 + erf(z * R(0.70710678118654752440L)));
    return dy * (cdf + z * (R(0.39894228040143267794L) * exp(z * z * R(-0.5))));
  }
  if (how.act == kHardswish) {
    const V inside = dy * (z * R(1.0L / 3) + R(0.5));
    return select(z <= splat<V>(R(-3)), zero, select(z >= splat<V>(R(3)), dy, inside));
  }
  if (how.act == kLeakyRelu) return select(z <= zero, dy * R(0.01L), dy);
  return dy;
}

}  // namespace
}  // namespace gnswap
