// From tensors to a Problem, for both files that take tensors: op.cpp (torch's stable ABI) and eager.cpp (ATen). Before
// it includes this, each defines in an unnamed namespace, for its own tensors:
//
//   Tensor, ScalarType, Kernels* access as `kernels()`,
//   Tensor empty(const int64_t* sizes, const int64_t* strides, int64_t dims, ScalarType dtype),
//   void copy_into(Tensor& target, const Tensor& source), int64_t thread_count() and parallel_for (see problem.h).
#pragma once
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <optional>
#include <vector>

#include "problem.h"

namespace {

using gnswap::Dtype;
using gnswap::Problem;
using Optional = std::optional<Tensor>;

// How the elements of a result lie: the format of x, which is gnswap.ops._reference.memory_format.
struct Layout {
  bool channels_last;
  int64_t dims, sizes[5], strides[5];

  explicit Layout(const Tensor& x) : dims(x.dim()) {
    channels_last = dims >= 4 && !x.is_contiguous() && x.size(1) > 1 && x.stride(1) == 1;
    for (int64_t i = 0; i < dims; ++i) sizes[i] = x.size(i);
    int64_t step = channels_last ? sizes[1] : 1;
    for (int64_t i = dims - 1; i >= 0; --i) {
      strides[i] = channels_last && i == 1 ? 1 : step;
      if (!channels_last || i != 1) step *= sizes[i];
    }
  }
  Tensor empty_like(const Tensor& t) const { return empty(sizes, strides, dims, t.scalar_type()); }

  // `t` itself where its elements lie like this, else a copy that does. Axes of size 1 may have any stride.
  Tensor dense(const Tensor& t) const {
    bool fits = true;
    for (int64_t i = 0; i < dims; ++i) fits = fits && (sizes[i] == 1 || t.stride(i) == strides[i]);
    if (fits) return t;
    Tensor copy = empty_like(t);
    copy_into(copy, t);
    return copy;
  }
  Optional dense(const Optional& t) const { return t.has_value() ? Optional(dense(*t)) : std::nullopt; }
};

float half_to_float(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  float value = exponent == 31   ? (mantissa ? __builtin_nanf("") : __builtin_inff())
                : exponent == 0  ? __builtin_ldexpf(static_cast<float>(mantissa), -24)
                                 : __builtin_ldexpf(static_cast<float>(mantissa + 1024), exponent - 25);
  return bits & 0x8000 ? -value : value;
}

// A [C] vector of any float type in the accumulation type; `absent` everywhere where there is none.
template <class R> class Vector {
 public:
  Vector(const Optional& t, int64_t C, R absent) {
    if (!t.has_value()) {
      copy_.assign(C, absent);
      pointer_ = copy_.data();
      return;
    }
    const int64_t n = t->size(0), stride = t->stride(0);
    const void* data = t->const_data_ptr();
    const ScalarType type = t->scalar_type();
    const bool same = type == (sizeof(R) == 8 ? ScalarType::Double : ScalarType::Float);
    if (same && (stride == 1 || n == 1)) {
      pointer_ = static_cast<const R*>(data);
      return;
    }
    copy_.resize(n);
    for (int64_t i = 0; i < n; ++i) copy_[i] = read(data, type, i * stride);
    pointer_ = copy_.data();
  }
  const R* get() const { return pointer_; }

 private:
  static R read(const void* data, ScalarType type, int64_t i) {
    if (type == ScalarType::Float) return static_cast<R>(static_cast<const float*>(data)[i]);
    if (type == ScalarType::Double) return static_cast<R>(static_cast<const double*>(data)[i]);
    const uint16_t bits = static_cast<const uint16_t*>(data)[i];
    if (type == ScalarType::Half) return static_cast<R>(half_to_float(bits));
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return static_cast<R>(value);
  }
  const R* pointer_ = nullptr;
  std::vector<R> copy_;
};

// channel_order, checked: the kernels index with it.
class Order {
 public:
  explicit Order(const Optional& t) {
    if (!t.has_value()) return;
    const int64_t n = t->size(0), stride = t->stride(0);
    const int64_t* data = static_cast<const int64_t*>(t->const_data_ptr());
    copy_.resize(n);
    std::vector<bool> seen(n);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t c = data[i * stride];
      STD_TORCH_CHECK(c >= 0 && c < n && !seen[c], "channel_order is not a permutation");
      seen[c] = true;
      copy_[i] = c;
    }
  }
  const int64_t* get() const { return copy_.empty() ? nullptr : copy_.data(); }

 private:
  std::vector<int64_t> copy_;
};

// The arguments of both directions beside tensors of the size of x.
struct Affine {
  int64_t num_groups;
  const Optional &weight, &bias;
  int64_t act;
  const Optional &scale, &shift, &order;
};

// What the kernels rely on. The messages are for us: the Python side checks again and says it to the user.
void check_vector(const Optional& t, int64_t C, bool integers) {
  if (!t.has_value()) return;
  const ScalarType type = t->scalar_type();
  const bool floats = type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                      type == ScalarType::BFloat16;
  STD_TORCH_CHECK(t->is_cpu() && t->dim() == 1 && t->size(0) == C, "a vector that is not [C] on the CPU");
  STD_TORCH_CHECK(integers ? type == ScalarType::Long : floats, "a vector of the wrong dtype");
}

void check_same(const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == x.dim(), "tensors that do not belong together");
  for (int64_t i = 0; i < x.dim(); ++i) STD_TORCH_CHECK(t.size(i) == x.size(i), "tensors of different shapes");
}

void check(const Tensor& x, const Affine& a, double eps, const Optional& residual) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 2 && x.dim() <= 5 && x.numel() > 0, "x has the wrong shape or device");
  const int64_t C = x.size(1);
  STD_TORCH_CHECK(a.num_groups >= 1 && C % a.num_groups == 0, "num_groups does not divide C");
  // nothing to compute, and the rounding of it would be divided by sqrt(eps)
  STD_TORCH_CHECK(x.numel() > x.size(0) * a.num_groups, "groups of a single element");
  STD_TORCH_CHECK(eps >= 0 && a.act >= 0 && a.act <= gnswap::kLeakyRelu, "eps or act out of range");
  for (const Optional* t : {&a.weight, &a.bias, &a.scale, &a.shift}) check_vector(*t, C, false);
  check_vector(a.order, C, true);
  if (residual.has_value()) {
    check_same(*residual, x);
    STD_TORCH_CHECK(residual->scalar_type() == x.scalar_type(), "residual of another dtype");
  }
}

// The Problem of both directions, and the memory that its vectors lie in.
template <class R> class Call {
 public:
  Call(const Tensor& x, const Layout& format, const Affine& a)
      : weight_(a.weight, x.size(1), 1), bias_(a.bias, x.size(1), 0), scale_(a.scale, x.size(1), 1),
        shift_(a.shift, x.size(1), 0), order_(a.order) {
    p.N = x.size(0);
    p.C = x.size(1);
    p.S = x.numel() / (p.N * p.C);  // never empty
    p.G = a.num_groups;
    p.channels_last = format.channels_last || p.S == 1;  // (N, C): both at once, and rows of one element are slow
    p.act = static_cast<gnswap::Act>(a.act);
    switch (x.scalar_type()) {
      case ScalarType::Float: p.dtype = Dtype::f32; break;
      case ScalarType::Half: p.dtype = Dtype::f16; break;
      case ScalarType::BFloat16: p.dtype = Dtype::bf16; break;
      case ScalarType::Double: p.dtype = Dtype::f64; break;
      default: STD_TORCH_CHECK(false, "x has a dtype without a kernel");
    }
    p.x = x.const_data_ptr();
    p.weight = weight_.get(), p.bias = bias_.get(), p.scale = scale_.get(), p.shift = shift_.get();
    p.standardised = a.scale.has_value() || a.shift.has_value();
    p.order = order_.get();
    p.threads = thread_count();
    p.parallel_for = parallel_for;
  }
  Problem p = {};

 private:
  Vector<R> weight_, bias_, scale_, shift_;
  Order order_;
};

// y, and the statistics [N, G] into `mean` and `rstd`; arguments that `check` has passed.
template <class R>
Tensor normalise(const Tensor& input, const Affine& a, double eps, const Optional& residual, void* mean, void* rstd) {
  const Layout format(input);
  const Tensor x = format.dense(input), y = format.empty_like(x);
  const Optional r = format.dense(residual);
  Call<R> call(x, format, a);
  Problem& p = call.p;
  p.eps = eps;
  p.residual = r.has_value() ? r->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  p.mean = mean, p.rstd = rstd;
  kernels()->forward(p);
  return y;
}

struct Gradients { Tensor x; Optional residual; };

// Gradients of x and the residual (in the layout of x), and of weight and bias into two arrays [C].
template <class R>
Gradients differentiate(const Tensor& gradient, const Tensor& input, const void* mean, const void* rstd,
                        const Affine& a, const Optional& residual, R* dweight, R* dbias) {
  const Layout format(input);
  const Tensor x = format.dense(input), dy = format.dense(gradient);
  const Optional r = format.dense(residual);
  const Tensor dx = format.empty_like(x);
  const Optional dresidual = r.has_value() ? Optional(format.empty_like(x)) : std::nullopt;
  Call<R> call(x, format, a);
  Problem& p = call.p;
  std::vector<double> sums(2 * p.C);
  p.dy = dy.const_data_ptr();
  p.residual = r.has_value() ? r->const_data_ptr() : nullptr;
  p.dx = dx.mutable_data_ptr();
  p.dresidual = r.has_value() ? dresidual->mutable_data_ptr() : nullptr;
  p.mean = const_cast<void*>(mean), p.rstd = const_cast<void*>(rstd);
  p.dweight = sums.data(), p.dbias = sums.data() + p.C;
  kernels()->backward(p);
  for (int64_t c = 0; c < p.C; ++c) {
    dweight[c] = static_cast<R>(p.dweight[c]);
    dbias[c] = static_cast<R>(p.dbias[c]);
  }
  return {dx, dresidual};
}

ScalarType statistics_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  const int64_t* first = sizes.begin();
  const int64_t strides[] = {sizes.size() == 2 ? first[1] : 1, 1};
  return empty(first, strides, static_cast<int64_t>(sizes.size()), dtype);
}

}  // namespace
