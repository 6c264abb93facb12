// The way into the kernels for plain eager calls: a Python function whose autograd is C++ in both directions.
//
// Why beside the op: torch's stable ABI knows no autograd, so behind the op it is Python's, and that, with the op's own
// way through Python and the dispatcher, takes longer than the norm of a small feature map. This file uses torch's
// headers as they are in one version, is compiled for that version and that Python, and does nothing that the op cannot:
// where it does not compile, calls go the other way and give the same bits.
#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/utils/object_ptr.h>

#include "problem.h"

namespace {

using at::ScalarType;
using at::Tensor;
using gnswap::Kernels;

// ---- what tensors.h asks for ----

const Kernels* (*kernels)() = nullptr;  // of the other library

Tensor empty(const int64_t* sizes, const int64_t* strides, int64_t dims, ScalarType dtype) {
  const auto n = static_cast<size_t>(dims);
  return Tensor(at::detail::empty_strided_cpu({sizes, n}, {strides, n}, dtype));
}

void copy_into(Tensor& target, const Tensor& source) { target.copy_(source); }

// torch's compiled loop: at::parallel_for is inline, and compiled here without OpenMP it would use one thread.
int64_t thread_count() {
  uint32_t count = 1;
  TORCH_CHECK(torch_get_num_threads(&count) == AOTI_TORCH_SUCCESS);
  return count;
}

void parallel_for(int64_t units, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  struct Loop { void (*body)(void*, int64_t, int64_t); void* context; } loop{body, context};
  const ParallelFunc part = [](int64_t first, int64_t last, void* whole) {
    const Loop* each = static_cast<const Loop*>(whole);
    each->body(each->context, first, last);
  };
  TORCH_CHECK(torch_parallel_for(0, units, grain, part, &loop) == AOTI_TORCH_SUCCESS);
}

}  // namespace

#include "tensors.h"

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// (dy, saved tensors, num_groups, eps, act, has residual, needs) -> the six gradients; for what is not plain
PyObject* python_backward = nullptr;
PyObject* activations = nullptr;  // names, a tuple in the order of Act

Optional optional(const Tensor& t) { return t.defined() ? Optional(t) : std::nullopt; }

// Whether all keys of `set` are among `usual`; the set's own operator- would leave the backends.
bool within(c10::DispatchKeySet set, c10::DispatchKeySet usual) { return !(set.raw_repr() & ~usual.raw_repr()); }

// Whether nothing watches: no dispatch mode, functorch transform, tracer or function mode.
bool unwatched() {
  return within(c10::impl::tls_local_dispatch_key_set().included_, c10::default_included_set) &&
         !at::impl::torch_function_mode_enabled();
}

// A strided CPU tensor and nothing else: no subclass, no wrapper of a transform, no tangent of forward mode.
bool plain(const Tensor& t) {
  static const c10::DispatchKeySet usual({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                          c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutocastCPU});
  return within(t.key_set(), usual) && !t._fw_grad(0).defined();
}

struct GnswapGroupNorm : torch::autograd::Function<GnswapGroupNorm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Optional& weight, const Optional& bias,
                        const Optional& residual, const Optional& scale, const Optional& shift, const Optional& order,
                        int64_t num_groups, double eps, int64_t act) {
    const Affine a{num_groups, weight, bias, act, scale, shift, order};
    const Tensor statistics = empty({2, x.size(0) * num_groups}, statistics_type(x));
    char* mean = static_cast<char*>(statistics.mutable_data_ptr());
    const auto run = x.scalar_type() == ScalarType::Double ? normalise<double> : normalise<float>;
    const Tensor y = run(x, a, eps, residual, mean, mean + statistics.nbytes() / 2);
    const Tensor none;
    const auto given = [&](const Optional& t) -> const Tensor& { return t.has_value() ? *t : none; };
    // without an activation the residual's gradient is dy
    ctx->save_for_backward({x, statistics, given(weight), given(bias), act ? given(residual) : none, given(scale),
                            given(shift), given(order)});
    ctx->set_materialize_grads(false);
    ctx->saved_data["num_groups"] = num_groups;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["act"] = act;
    ctx->saved_data["residual"] = residual.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    variable_list result(10);
    const Tensor& dy = gradients[0];
    if (!dy.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &statistics = saved[1];
    const Optional weight = optional(saved[2]), bias = optional(saved[3]), residual = optional(saved[4]);
    const Optional scale = optional(saved[5]), shift = optional(saved[6]), order = optional(saved[7]);
    const int64_t num_groups = ctx->saved_data["num_groups"].toInt(), act = ctx->saved_data["act"].toInt();
    const bool given[6] = {true, weight.has_value(), bias.has_value(), ctx->saved_data["residual"].toBool(),
                           scale.has_value(), shift.has_value()};
    bool needs[6];
    size_t edge = 0;
    for (int i = 0; i < 6; ++i) needs[i] = given[i] && ctx->needs_input_grad(edge++);
    if (needs[4] || needs[5] || at::GradMode::is_enabled() || !unwatched() || !plain(dy) ||
        dy.scalar_type() != x.scalar_type()) {
      call_python(dy, saved, num_groups, ctx->saved_data["eps"].toDouble(), act, given[3], needs, result);
      return result;
    }
    RECORD_FUNCTION("gnswap_cpu::backward", std::vector<c10::IValue>({dy, x}));
    const Affine a{num_groups, weight, bias, act, scale, shift, order};
    const Tensor dweight = empty({x.size(1)}, statistics_type(x)), dbias = empty({x.size(1)}, statistics_type(x));
    const char* mean = static_cast<const char*>(statistics.const_data_ptr());
    const auto both = [&](auto zero) {
      using R = decltype(zero);
      return differentiate<R>(dy, x, mean, mean + statistics.nbytes() / 2, a, residual,
                              static_cast<R*>(dweight.mutable_data_ptr()), static_cast<R*>(dbias.mutable_data_ptr()));
    };
    const Gradients found = x.scalar_type() == ScalarType::Double ? both(double(0)) : both(float(0));
    result[0] = found.x;
    const auto as = [](const Tensor& t, ScalarType type) { return t.scalar_type() == type ? t : t.to(type); };
    if (needs[1]) result[1] = as(dweight, weight->scalar_type());
    if (needs[2]) result[2] = as(dbias, bias->scalar_type());
    if (needs[3]) result[3] = residual.has_value() ? *found.residual : dy;
    return result;
  }

  static void call_python(const Tensor& dy, const variable_list& saved, int64_t num_groups, double eps, int64_t act,
                          bool residual, const bool* needs, variable_list& result) {
    pybind11::gil_scoped_acquire gil;
    THPObjectPtr tensors(PyTuple_New(static_cast<Py_ssize_t>(saved.size()))), wanted(PyTuple_New(6));
    for (size_t i = 0; i < saved.size(); ++i)
      PyTuple_SET_ITEM(tensors.get(), static_cast<Py_ssize_t>(i), THPVariable_Wrap(saved[i]));
    for (int i = 0; i < 6; ++i) PyTuple_SET_ITEM(wanted.get(), i, PyBool_FromLong(needs[i]));
    THPObjectPtr first(THPVariable_Wrap(dy));
    THPObjectPtr found(PyObject_CallFunction(python_backward, "OOLdLiO", first.get(), tensors.get(),
                                             static_cast<long long>(num_groups), eps, static_cast<long long>(act),
                                             residual ? 1 : 0, wanted.get()));
    if (!found) throw python_error();
    for (int i = 0; i < 6; ++i) {
      PyObject* gradient = PyTuple_GetItem(found.get(), i);
      if (!gradient) throw python_error();
      if (gradient != Py_None) result[static_cast<size_t>(i)] = THPVariable_Unpack(gradient);
    }
  }
};

// ---- for Python ----

// The tensor of an argument that may be None; false for anything but a plain tensor.
bool read(PyObject* object, Optional& t) {
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  t = THPVariable_Unpack(object);
  return plain(*t);
}

// The Act of a name or None; -1, which `check` refuses, for anything else.
int64_t act_code(PyObject* name) {
  if (name == Py_None) return gnswap::kNone;
  const Py_ssize_t names = PyTuple_GET_SIZE(activations);
  for (Py_ssize_t i = 0; i < names; ++i)
    if (PyTuple_GET_ITEM(activations, i) == name) return i + 1;
  for (Py_ssize_t i = 0; PyUnicode_Check(name) && i < names; ++i)  // equal, but another object
    if (PyUnicode_Compare(PyTuple_GET_ITEM(activations, i), name) == 0) return i + 1;
  return -1;
}

// group_norm(x, num_groups, weight, bias, eps, act, residual, scale, shift, order) -> y, or None where the call has to
// go through the op: it is watched, or an argument is not what the kernels take
PyObject* group_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Optional x, weight, bias, residual, scale, shift, order;
  if (count != 10 || !unwatched() || args[0] == Py_None || !read(args[0], x) || !read(args[2], weight) ||
      !read(args[3], bias) || !read(args[6], residual) || !read(args[7], scale) || !read(args[8], shift) ||
      !read(args[9], order) || !PyLong_CheckExact(args[1]) || !PyFloat_CheckExact(args[4]))
    Py_RETURN_NONE;
  const int64_t num_groups = PyLong_AsLongLong(args[1]);
  const double eps = PyFloat_AS_DOUBLE(args[4]);
  if (num_groups == -1 && PyErr_Occurred()) throw python_error();
  const int64_t act = act_code(args[5]);
  const Affine a{num_groups, weight, bias, act, scale, shift, order};
  try {
    check(*x, a, eps, residual);
    Order permutation(order);
  } catch (const std::runtime_error&) {
    Py_RETURN_NONE;
  }
  Tensor y;
  {
    pybind11::gil_scoped_release no_gil;
    RECORD_FUNCTION("gnswap_cpu::forward", std::vector<c10::IValue>({*x}));
    const auto wants = [](const Optional& t) { return t.has_value() && t->requires_grad(); };
    if (at::GradMode::is_enabled() &&
        (wants(x) || wants(weight) || wants(bias) || wants(residual) || wants(scale) || wants(shift))) {
      y = GnswapGroupNorm::apply(*x, weight, bias, residual, scale, shift, order, num_groups, eps, act);
    } else {
      std::vector<double> statistics(static_cast<size_t>(2 * x->size(0) * num_groups));
      double* rstd = statistics.data() + statistics.size() / 2;
      const auto run = x->scalar_type() == ScalarType::Double ? normalise<double> : normalise<float>;
      y = run(*x, a, eps, residual, statistics.data(), rstd);
    }
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

// connect(address of gnswap_cpu_kernels, names of the activations, python_backward)
PyObject* connect(PyObject*, PyObject* args) {
  Py_ssize_t address = 0;
  if (!PyArg_ParseTuple(args, "nO!O", &address, &PyTuple_Type, &activations, &python_backward)) return nullptr;
  kernels = reinterpret_cast<const Kernels* (*)()>(address);
  Py_INCREF(activations);
  Py_INCREF(python_backward);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"group_norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(group_norm)), METH_FASTCALL, nullptr},
    {"connect", connect, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "gnswap_eager", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_gnswap_eager() { return PyModule_Create(&module); }
