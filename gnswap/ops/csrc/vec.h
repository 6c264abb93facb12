// Vectors of floats or doubles, as wide as the instruction set, with loads and stores for every storage type.
//
// GCC's vector extension instead of intrinsics: the same source serves SSE2, AVX2, AVX-512 and NEON, and the order of
// every sum is spelled out, so no fast-math flag is needed. Intrinsics stand only where the compiler finds no good code.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define GNSWAP_INLINE inline __attribute__((always_inline))
// For code that must have the same bits wherever it is called from: inlined copies may fuse a multiply and an add
// in different places.
#define GNSWAP_NOINLINE __attribute__((noinline))
// Complete unrolling of a loop over rows or lanes, so that what it indexes stays in registers at -O2 too.
#define GNSWAP_UNROLL _Pragma("GCC unroll 16")

namespace gnswap {
namespace {

#if defined(GNSWAP_VECTOR_BYTES)
constexpr int kBytes = GNSWAP_VECTOR_BYTES;
#elif defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

struct half { uint16_t bits; };
struct bfloat { uint16_t bits; };

typedef float F32 __attribute__((vector_size(kBytes)));
typedef double F64 __attribute__((vector_size(kBytes)));
typedef float F32Half __attribute__((vector_size(kBytes / 2)));
typedef int32_t I32 __attribute__((vector_size(kBytes)));
typedef uint32_t U32 __attribute__((vector_size(kBytes)));
typedef uint16_t U16 __attribute__((vector_size(kBytes / 2)));

// The type that arithmetic is done in, and its vector.
template <class T> struct Acc { typedef float type; typedef F32 vec; };
template <> struct Acc<double> { typedef double type; typedef F64 vec; };
template <class T> using acc_t = typename Acc<T>::type;
template <class T> using vec_t = typename Acc<T>::vec;
template <class T> constexpr int64_t kLanes = kBytes / static_cast<int64_t>(sizeof(acc_t<T>));

template <class V, class R> GNSWAP_INLINE V splat(R value) { return value - V{}; }

template <class V, class P> GNSWAP_INLINE V load_raw(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

// As many values as fit a vector of doubles.
GNSWAP_INLINE F64 load_double(const float* p) { return __builtin_convertvector(load_raw<F32Half>(p), F64); }
GNSWAP_INLINE F64 load_double(const double* p) { return load_raw<F64>(p); }

// ---- half types: IEEE conversions, round to nearest even ----

inline float to_float(half h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16, magnitude = h.bits & 0x7fffu;
  uint32_t bits = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);
  float value;
  if (magnitude < 0x0400u) {  // subnormal: magnitude * 2^-24
    value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline half to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    result = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: let the float adder round at 2^-24
    float positive;
    std::memcpy(&positive, &magnitude, 4);
    positive += 0.5f;
    std::memcpy(&result, &positive, 4);
    result -= 0x3f000000u;
  } else {
    result = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return half{static_cast<uint16_t>(sign | result)};
}

inline float value(float x) { return x; }
inline double value(double x) { return x; }
inline float value(half x) { return to_float(x); }
inline float value(bfloat x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

GNSWAP_INLINE F32 load(const float* p) { return load_raw<F32>(p); }
GNSWAP_INLINE F64 load(const double* p) { return load_raw<F64>(p); }
GNSWAP_INLINE F32 load(const bfloat* p) {
  return (F32)(__builtin_convertvector(load_raw<U16>(p), U32) << 16);
}
GNSWAP_INLINE void store(float* p, F32 v) { std::memcpy(p, &v, sizeof v); }
GNSWAP_INLINE void store(double* p, F64 v) { std::memcpy(p, &v, sizeof v); }
GNSWAP_INLINE void store(bfloat* p, F32 v) {
  const U32 bits = (U32)v;
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U16 result = __builtin_convertvector((v == v) ? rounded : ((bits >> 16) | 0x40u), U16);
  std::memcpy(p, &result, sizeof result);
}

#if defined(__AVX512F__) && !defined(GNSWAP_VECTOR_BYTES)
GNSWAP_INLINE F32 load(const half* p) { return _mm512_cvtph_ps(load_raw<__m256i>(p)); }
GNSWAP_INLINE void store(half* p, F32 v) {
  const __m256i result = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &result, sizeof result);
}
#elif defined(__F16C__) && !defined(GNSWAP_VECTOR_BYTES)
GNSWAP_INLINE F32 load(const half* p) { return _mm256_cvtph_ps(load_raw<__m128i>(p)); }
GNSWAP_INLINE void store(half* p, F32 v) {
  const __m128i result = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &result, sizeof result);
}
#else
GNSWAP_INLINE F32 load(const half* p) {
  F32 v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_float(p[i]);
  return v;
}
GNSWAP_INLINE void store(half* p, F32 v) {
  for (int i = 0; i < kLanes<float>; ++i) p[i] = to_half(v[i]);
}
#endif

// The first `count` lanes; the others hold `fill`.
template <class T> GNSWAP_NOINLINE vec_t<T> load_part(const T* p, int64_t count, vec_t<T> fill) {
  T buffer[kLanes<T>] = {};
  std::memcpy(buffer, p, static_cast<size_t>(count) * sizeof(T));
  vec_t<T> v = load(buffer);
  for (int64_t i = count; i < kLanes<T>; ++i) v[i] = fill[i];
  return v;
}
template <class T> GNSWAP_NOINLINE void store_part(T* p, vec_t<T> v, int64_t count) {
  T buffer[kLanes<T>];
  store(buffer, v);
  std::memcpy(p, buffer, static_cast<size_t>(count) * sizeof(T));
}
#if defined(__AVX512F__) && !defined(GNSWAP_VECTOR_BYTES)
template <> GNSWAP_INLINE F32 load_part(const float* p, int64_t count, F32 fill) {
  return _mm512_mask_loadu_ps(fill, static_cast<__mmask16>((1u << count) - 1), p);
}
#elif defined(__AVX2__) && !defined(GNSWAP_VECTOR_BYTES)
template <> GNSWAP_INLINE F32 load_part(const float* p, int64_t count, F32 fill) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
  return _mm256_blendv_ps(fill, _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask));
}
#endif

// v in the first `count` lanes, 0 in the others
template <class T> GNSWAP_INLINE vec_t<T> first_lanes(int64_t count, vec_t<T> v) {
  typedef decltype(v < v) Mask;
  alignas(64) static constexpr int32_t kMask[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  const int64_t skipped = 16 - count * static_cast<int64_t>(sizeof(acc_t<T>) / 4);
  return (vec_t<T>)((Mask)v & load_raw<Mask>(kMask + skipped));
}

// The last, partial vector of rows that all end alike.
template <class T> struct Tail {
  int64_t count;
  explicit Tail(int64_t length) : count(length % kLanes<T>) {}
  GNSWAP_INLINE vec_t<T> load(const T* p) const { return load_part(p, count, vec_t<T>{}); }
  GNSWAP_INLINE vec_t<T> keep(vec_t<T> v) const { return first_lanes<T>(count, v); }
};
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(GNSWAP_VECTOR_BYTES)
template <> struct Tail<float> {
  int64_t count;
  __m256i mask;
  explicit Tail(int64_t length) : count(length % 8) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
  }
  GNSWAP_INLINE F32 load(const float* p) const { return _mm256_maskload_ps(p, mask); }
  GNSWAP_INLINE F32 keep(F32 v) const { return _mm256_and_ps(v, _mm256_castsi256_ps(mask)); }
};
#endif

// Sum of the lanes, halves first: the same tree at every width.
#if defined(__AVX2__) && !defined(GNSWAP_VECTOR_BYTES)
GNSWAP_INLINE float sum(__m256 v) {
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
#if defined(__AVX512F__)
GNSWAP_INLINE __m256 eight_lanes(__m512 v) {
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
  return _mm256_add_ps(_mm512_castps512_ps256(v), high);
}
GNSWAP_INLINE float sum(__m512 v) { return sum(eight_lanes(v)); }
#endif
#else
GNSWAP_INLINE float sum(F32 v) {
  GNSWAP_UNROLL for (int64_t half = kLanes<float> / 2; half; half /= 2)
    GNSWAP_UNROLL for (int64_t i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}
#endif
GNSWAP_INLINE double sum(F64 v) {
  GNSWAP_UNROLL for (int64_t half = kLanes<double> / 2; half; half /= 2)
    GNSWAP_UNROLL for (int64_t i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

// The sums of eight vectors at once: transposing them halfway takes a third of the instructions.
template <class V, class R> GNSWAP_INLINE void sums_of_eight(const V (&v)[8], R* result) {
  for (int i = 0; i < 8; ++i) result[i] = sum(v[i]);
}
#if defined(__AVX2__) && !defined(GNSWAP_VECTOR_BYTES)
GNSWAP_INLINE __m256 eight_lanes(__m256 v) { return v; }
template <> GNSWAP_INLINE void sums_of_eight(const F32 (&v)[8], float* result) {
  const auto four = [&](const F32* at) {
    const __m256 a = _mm256_hadd_ps(eight_lanes(at[0]), eight_lanes(at[1]));
    return _mm256_hadd_ps(a, _mm256_hadd_ps(eight_lanes(at[2]), eight_lanes(at[3])));
  };
  const __m256 low = four(v), high = four(v + 4);
  const __m256 total = _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
  _mm256_storeu_ps(result, total);
}
#endif

// ---- functions of a vector ----

template <class V> GNSWAP_INLINE V select(decltype(V{} < V{}) mask, V yes, V no) { return mask ? yes : no; }

// exp by Cephes' expf: reduction by log 2 in two parts and a polynomial, error below 1.5 ulp, 0 below -87.3.
// NaN stays NaN because the scale 2^n is multiplied, not added to the exponent.
GNSWAP_INLINE F32 exp(F32 x) {
  x = select(x > 88.3f, splat<F32>(88.3f), x);
  const auto vanishes = x < -87.3f;
  const F32 magic = splat<F32>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F32 shifted = x * 1.44269504088896341f + magic;
  const F32 n = shifted - magic;
  const F32 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F32 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const I32 exponent = ((I32)shifted << 23) + (127 << 23);  // the low bits of `shifted` are n
  return select(vanishes, splat<F32>(0.0f), p * (F32)exponent);
}

// erf by the rational approximation that Eigen uses, error below 4 ulp; beyond |x| = 4 it is 1 in every bit, which
// gelu needs: there 1 + erf is multiplied by a large number.
GNSWAP_INLINE F32 erf(F32 x) {
  const auto above = x >= 4.0f, below = x <= -4.0f;
  const F32 t = x * x;
  F32 p = t * -2.72614225801306e-10f + 2.77068142495902e-08f;
  p = p * t + -2.10102402082508e-06f;
  p = p * t + -5.69250639462346e-05f;
  p = p * t + -7.34990630326855e-04f;
  p = p * t + -2.95459980854025e-03f;
  p = p * t + -1.60960333262415e-02f;
  F32 q = t * -1.45660718464996e-05f + -2.13374055278905e-04f;
  q = q * t + -1.68282697438203e-03f;
  q = q * t + -7.37332916720468e-03f;
  q = q * t + -1.42647390514189e-02f;
  return select(above, splat<F32>(1.0f), select(below, splat<F32>(-1.0f), x * p / q));
}

// Doubles are for gradient checks, not for speed.
inline F64 exp(F64 x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}
inline F64 erf(F64 x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_erf(x[i]);
  return x;
}

}  // namespace
}  // namespace gnswap
