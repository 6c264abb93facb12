// The ops gnswap_cpu::forward and gnswap_cpu::backward, on torch's stable ABI: this file and the kernels make one
// library that serves every Python and every torch from 2.10 on. The Python side has checked all arguments.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "problem.h"

namespace {

using gnswap::Dtype;
using gnswap::Kernels;
using gnswap::Problem;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// ---- choice of instruction set ----

bool runs_here(const Kernels* kernels) {
#if defined(__x86_64__)
  if (std::strcmp(kernels->name, "avx2") == 0) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (std::strcmp(kernels->name, "avx512") == 0)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  return true;
}

// Widest first.
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> all;
#if defined(__x86_64__)
  for (const Kernels* kernels : {gnswap::kernels_avx512(), gnswap::kernels_avx2()})
    if (runs_here(kernels)) all.push_back(kernels);
#endif
  all.push_back(gnswap::kernels_generic());
  return all;
}

const Kernels*& active() {
  static const Kernels* kernels = runnable().front();
  return kernels;
}

// ---- tensors ----

// Strides of a dense tensor, channels last or contiguous.
std::vector<int64_t> dense_strides(const Tensor& t, bool channels_last) {
  const auto sizes = t.sizes();
  const int64_t dims = t.dim();
  std::vector<int64_t> strides(dims);
  int64_t step = channels_last ? sizes[1] : 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    if (channels_last && i == 1) continue;
    strides[i] = step;
    step *= sizes[i];
  }
  if (channels_last) strides[1] = 1;
  return strides;
}

Tensor empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), type, aoti_torch_device_type_cpu(), 0,
                                                         &handle));
  return Tensor(handle);
}

Tensor empty_like(const Tensor& t, const std::vector<int64_t>& strides) {
  const auto sizes = t.sizes();
  return empty(std::vector<int64_t>(sizes.begin(), sizes.end()), strides, t.scalar_type());
}

// `t` itself where its elements lie as in `strides`, else a copy that does. Axes of size 1 may have any stride.
Tensor dense(const Tensor& t, const std::vector<int64_t>& strides) {
  bool fits = true;
  for (int64_t i = 0; i < t.dim(); ++i) fits = fits && (t.size(i) == 1 || t.stride(i) == strides[i]);
  if (fits) return t;
  Tensor copy = empty_like(t, strides);
  torch::stable::copy_(copy, t);
  return copy;
}

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

void parallel_for(int64_t units, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, units, grain, [&](int64_t first, int64_t last) { body(context, first, last); });
}

struct Layout { bool channels_last; std::vector<int64_t> strides; };

// The format of the outputs, which is gnswap.ops._reference.memory_format.
Layout layout(const Tensor& x) {
  const bool last = x.dim() >= 4 && !x.is_contiguous() && x.size(1) > 1 && x.stride(1) == 1;
  return {last, dense_strides(x, last)};
}

Problem problem(const Tensor& x, const Layout& format, int64_t num_groups, int64_t act) {
  Problem p = {};
  p.N = x.size(0);
  p.C = x.size(1);
  p.S = x.numel() / (p.N * p.C);  // never empty
  p.G = num_groups;
  p.channels_last = format.channels_last || p.S == 1;  // (N, C): both at once, and rows of one element are slow
  p.act = static_cast<gnswap::Act>(act);
  switch (x.scalar_type()) {
    case ScalarType::Float: p.dtype = Dtype::f32; break;
    case ScalarType::Half: p.dtype = Dtype::f16; break;
    case ScalarType::BFloat16: p.dtype = Dtype::bf16; break;
    case ScalarType::Double: p.dtype = Dtype::f64; break;
    default: STD_TORCH_CHECK(false, "x has a dtype without a kernel");
  }
  p.threads = torch::stable::get_num_threads();
  p.parallel_for = parallel_for;
  return p;
}

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

void check(const Tensor& x, int64_t num_groups, double eps, int64_t act, const Optional& weight, const Optional& bias,
           const Optional& residual, const Optional& scale, const Optional& shift, const Optional& order) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 2 && x.dim() <= 5 && x.numel() > 0, "x has the wrong shape or device");
  const int64_t C = x.size(1);
  STD_TORCH_CHECK(num_groups >= 1 && C % num_groups == 0, "num_groups does not divide C");
  // nothing to compute, and the rounding of it would be divided by sqrt(eps)
  STD_TORCH_CHECK(x.numel() > x.size(0) * num_groups, "groups of a single element");
  STD_TORCH_CHECK(eps >= 0 && act >= 0 && act <= gnswap::kLeakyRelu, "eps or act out of range");
  for (const Optional* t : {&weight, &bias, &scale, &shift}) check_vector(*t, C, false);
  check_vector(order, C, true);
  if (residual.has_value()) {
    check_same(*residual, x);
    STD_TORCH_CHECK(residual->scalar_type() == x.scalar_type(), "residual of another dtype");
  }
}

// ---- the ops ----

template <class R>
std::tuple<Tensor, Tensor, Tensor> forward_as(const Tensor& input, int64_t num_groups, const Optional& weight,
                                              const Optional& bias, double eps, int64_t act, const Optional& residual,
                                              const Optional& scale, const Optional& shift, const Optional& order) {
  const Layout format = layout(input);
  const Tensor x = dense(input, format.strides), y = empty_like(input, format.strides);
  const ScalarType statistics = sizeof(R) == 8 ? ScalarType::Double : ScalarType::Float;
  const Tensor mean = empty({x.size(0), num_groups}, {num_groups, 1}, statistics);
  const Tensor rstd = empty({x.size(0), num_groups}, {num_groups, 1}, statistics);
  const int64_t C = x.size(1);
  const Vector<R> w(weight, C, 1), b(bias, C, 0), a(scale, C, 1), t(shift, C, 0);
  const Order o(order);
  const Optional r = residual.has_value() ? Optional(dense(*residual, format.strides)) : std::nullopt;

  Problem p = problem(x, format, num_groups, act);
  p.eps = eps;
  p.x = x.const_data_ptr();
  p.residual = r.has_value() ? r->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  p.mean = mean.mutable_data_ptr();
  p.rstd = rstd.mutable_data_ptr();
  p.weight = w.get(), p.bias = b.get(), p.scale = a.get(), p.shift = t.get(), p.order = o.get();
  p.standardised = scale.has_value() || shift.has_value();
  active()->forward(p);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, int64_t num_groups, Optional weight, Optional bias, double eps,
                                           int64_t act, Optional residual, Optional scale, Optional shift,
                                           Optional order) {
  check(x, num_groups, eps, act, weight, bias, residual, scale, shift, order);
  const auto run = x.scalar_type() == ScalarType::Double ? forward_as<double> : forward_as<float>;
  return run(x, num_groups, weight, bias, eps, act, residual, scale, shift, order);
}

// dx, dweight, dbias (in the accumulation type) and dresidual (in the format of x; empty without a residual)
template <class R>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_as(const Tensor& gradient, const Tensor& input, const Tensor& mean,
                                                       const Tensor& rstd, int64_t num_groups, const Optional& weight,
                                                       const Optional& bias, int64_t act, const Optional& residual,
                                                       const Optional& scale, const Optional& shift,
                                                       const Optional& order) {
  const Layout format = layout(input);
  const Tensor x = dense(input, format.strides), dy = dense(gradient, format.strides);
  const Optional r = residual.has_value() ? Optional(dense(*residual, format.strides)) : std::nullopt;
  const Tensor dx = empty_like(x, format.strides);
  const Tensor dresidual = r.has_value() ? empty_like(x, format.strides) : empty({0}, {1}, x.scalar_type());
  const ScalarType statistics = sizeof(R) == 8 ? ScalarType::Double : ScalarType::Float;
  const int64_t C = x.size(1);
  const Tensor dweight = empty({C}, {1}, statistics), dbias = empty({C}, {1}, statistics);
  std::vector<double> sums(2 * C);
  const Vector<R> w(weight, C, 1), b(bias, C, 0), a(scale, C, 1), t(shift, C, 0);
  const Order o(order);

  Problem p = problem(x, format, num_groups, act);
  p.x = x.const_data_ptr();
  p.dy = dy.const_data_ptr();
  p.residual = r.has_value() ? r->const_data_ptr() : nullptr;
  p.dx = dx.mutable_data_ptr();
  p.dresidual = r.has_value() ? dresidual.mutable_data_ptr() : nullptr;
  p.mean = const_cast<void*>(mean.const_data_ptr());
  p.rstd = const_cast<void*>(rstd.const_data_ptr());
  p.weight = w.get(), p.bias = b.get(), p.scale = a.get(), p.shift = t.get(), p.order = o.get();
  p.standardised = scale.has_value() || shift.has_value();
  p.dweight = sums.data(), p.dbias = sums.data() + C;
  active()->backward(p);
  R *dw = static_cast<R*>(dweight.mutable_data_ptr()), *db = static_cast<R*>(dbias.mutable_data_ptr());
  for (int64_t c = 0; c < C; ++c) {
    dw[c] = static_cast<R>(p.dweight[c]);
    db[c] = static_cast<R>(p.dbias[c]);
  }
  return {dx, dweight, dbias, dresidual};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, int64_t num_groups,
                                                    Optional weight, Optional bias, int64_t act, Optional residual,
                                                    Optional scale, Optional shift, Optional order) {
  check(x, num_groups, 0, act, weight, bias, residual, scale, shift, order);
  check_same(dy, x);
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dy of another dtype than x");
  STD_TORCH_CHECK(mean.is_cpu() && rstd.is_cpu() && mean.is_contiguous() && rstd.is_contiguous() &&
                      mean.numel() == x.size(0) * num_groups && rstd.numel() == mean.numel(),
                  "statistics that do not belong to x");
  const auto run = x.scalar_type() == ScalarType::Double ? backward_as<double> : backward_as<float>;
  return run(dy, x, mean, rstd, num_groups, weight, bias, act, residual, scale, shift, order);
}

}  // namespace

STABLE_TORCH_LIBRARY(gnswap_cpu, m) {
  m.def("forward(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, int act, Tensor? residual, "
        "Tensor? scale, Tensor? shift, Tensor? order) -> (Tensor, Tensor, Tensor)");
  m.def("backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, int num_groups, Tensor? weight, Tensor? bias, "
        "int act, Tensor? residual, Tensor? scale, Tensor? shift, Tensor? order) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gnswap_cpu, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
}

// For Python, through ctypes: the instruction set in use, another choice, and who compiled this.
#define GNSWAP_EXPORT extern "C" __attribute__((visibility("default")))
GNSWAP_EXPORT const char* gnswap_cpu_isa() { return active()->name; }
GNSWAP_EXPORT const char* gnswap_cpu_compiler() {
#if defined(__clang__)
  return __VERSION__;
#else
  return "GCC " __VERSION__;
#endif
}
GNSWAP_EXPORT int gnswap_cpu_use_isa(const char* name) {
  for (const Kernels* kernels : runnable()) {
    if (std::strcmp(kernels->name, name) == 0) {
      active() = kernels;
      return 1;
    }
  }
  return 0;
}
