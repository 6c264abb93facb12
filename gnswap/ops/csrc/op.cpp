// The ops gnswap_cpu::forward and gnswap_cpu::backward, on torch's stable ABI: this file and the kernels make one
// library that serves every Python and every torch from 2.10 on. The Python side has checked all arguments.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "problem.h"

namespace {

using gnswap::Kernels;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

const Kernels*& kernels() {
  static const Kernels* chosen = runnable().front();
  return chosen;
}

// ---- what tensors.h asks for ----

Tensor empty(const int64_t* sizes, const int64_t* strides, int64_t dims, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, type, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

void copy_into(Tensor& target, const Tensor& source) { torch::stable::copy_(target, source); }

int64_t thread_count() { return torch::stable::get_num_threads(); }

void parallel_for(int64_t units, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, units, grain, [&](int64_t first, int64_t last) { body(context, first, last); });
}

}  // namespace

#include "tensors.h"

namespace {

// ---- the ops ----

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, int64_t num_groups, Optional weight, Optional bias, double eps,
                                           int64_t act, Optional residual, Optional scale, Optional shift,
                                           Optional order) {
  const Affine a{num_groups, weight, bias, act, scale, shift, order};
  check(x, a, eps, residual);
  const Tensor mean = empty({x.size(0), num_groups}, statistics_type(x));
  const Tensor rstd = empty({x.size(0), num_groups}, statistics_type(x));
  const auto run = x.scalar_type() == ScalarType::Double ? normalise<double> : normalise<float>;
  return {run(x, a, eps, residual, mean.mutable_data_ptr(), rstd.mutable_data_ptr()), mean, rstd};
}

// dx, dweight, dbias (in the accumulation type) and dresidual (in the format of x; empty without a residual)
template <class R>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_as(const Tensor& dy, const Tensor& x, const Tensor& mean,
                                                       const Tensor& rstd, const Affine& a, const Optional& residual) {
  const Tensor dweight = empty({x.size(1)}, statistics_type(x)), dbias = empty({x.size(1)}, statistics_type(x));
  R *dw = static_cast<R*>(dweight.mutable_data_ptr()), *db = static_cast<R*>(dbias.mutable_data_ptr());
  const auto [dx, dr] = differentiate<R>(dy, x, mean.const_data_ptr(), rstd.const_data_ptr(), a, residual, dw, db);
  return {dx, dweight, dbias, dr.has_value() ? *dr : empty({0}, x.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, int64_t num_groups,
                                                    Optional weight, Optional bias, int64_t act, Optional residual,
                                                    Optional scale, Optional shift, Optional order) {
  const Affine a{num_groups, weight, bias, act, scale, shift, order};
  check(x, a, 0, residual);
  check_same(dy, x);
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dy of another dtype than x");
  STD_TORCH_CHECK(mean.is_cpu() && rstd.is_cpu() && mean.is_contiguous() && rstd.is_contiguous() &&
                      mean.numel() == x.size(0) * num_groups && rstd.numel() == mean.numel(),
                  "statistics that do not belong to x");
  const auto run = x.scalar_type() == ScalarType::Double ? backward_as<double> : backward_as<float>;
  return run(dy, x, mean, rstd, a, residual);
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

// For Python, through ctypes: the instruction set in use, another choice, and who compiled this; for eager.cpp, which
// is a library of its own, the kernels themselves.
#define GNSWAP_EXPORT extern "C" __attribute__((visibility("default")))
GNSWAP_EXPORT const char* gnswap_cpu_isa() { return kernels()->name; }
GNSWAP_EXPORT const Kernels* gnswap_cpu_kernels() { return kernels(); }
GNSWAP_EXPORT const char* gnswap_cpu_compiler() {
#if defined(__clang__)
  return __VERSION__;
#else
  return "GCC " __VERSION__;
#endif
}
GNSWAP_EXPORT int gnswap_cpu_use_isa(const char* name) {
  for (const Kernels* each : runnable()) {
    if (std::strcmp(each->name, name) == 0) {
      kernels() = each;
      return 1;
    }
  }
  return 0;
}
