// What the torch side hands to the kernels: plain pointers and sizes, so that the kernels need no torch header
// and can be compiled once for each instruction set.
#pragma once
#include <cstdint>

namespace gnswap {

enum class Dtype : int { f32, f16, bf16, f64 };

// In the order of gnswap.ops.ACTIVATIONS, after "none".
enum Act : int { kNone, kRelu, kRelu6, kSilu, kGelu, kHardswish, kLeakyRelu };

// Calls body(context, first, last) on parts of [0, units), at least `grain` units a part; returns when all are done.
using ParallelFor = void (*)(int64_t units, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);

// Axes: N samples, C channels, G groups of D = C / G channels, S positions.
// Every tensor is dense, [N, C, S] or, with channels_last, [N, S, C], all of one dtype. The four vectors are [C] in the
// accumulation type (double for f64, else float), filled with ones and zeros where the caller gave none.
struct Problem {
  int64_t N, C, S, G;
  bool channels_last;
  Dtype dtype;
  Act act;
  double eps;  // forward only

  const void* x;
  const void* residual;
  void* y;           // forward: result
  const void* dy;    // backward: gradient of y
  void* dx;          // backward: result
  void* dresidual;   // backward: result, null where there is no residual
  void* mean;        // [N, G], written by forward, read by backward
  void* rstd;        // [N, G], the same

  const void *weight, *bias, *scale, *shift;
  bool standardised;     // scale or shift was given
  const int64_t* order;  // null: natural
  double *dweight, *dbias;  // [C], backward: results

  int64_t threads;
  ParallelFor parallel_for;
};

// One per instruction set; kernels.cpp defines each in its own translation unit.
struct Kernels {
  const char* name;
  void (*forward)(const Problem&);
  void (*backward)(const Problem&);
};

const Kernels* kernels_generic();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();

}  // namespace gnswap
