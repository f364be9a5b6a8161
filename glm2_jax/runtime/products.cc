// Products of activations [M, C] and a weight [R, C], plain or quantized: float32 [M, R].
//
// The form "native" of glm2_jax/products.py, called by XLA through its FFI. A weight is read once
// for up to `kMost` rows of activations: what it is stored as is converted in registers. Products
// of float32 activations are those of float32 multiply-adds; activations in bfloat16 are exact in
// float32, or are multiplied by the processor's product of bfloat16 pairs, which adds up in
// float32.
//
// Compiled on the machine that runs it, for its processor (glm2_jax/runtime/native.py).

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

#if defined(__AVX512F__)
constexpr int W = 16;  // float32 in a vector
constexpr int kMost = 8;
#elif defined(__AVX__)
constexpr int W = 8;
constexpr int kMost = 4;
#else
constexpr int W = 4;
constexpr int kMost = 4;
#endif

using Floats = float __attribute__((vector_size(4 * W)));
using Ints = int32_t __attribute__((vector_size(4 * W)));

template <class T>
T load(const void* from) {  // from any address
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

// How a weight is stored. Each converts `kColumns` columns, stored in `kBytes`, to `kParts`
// vectors; of two columns in a byte the first vector has the even ones. `scale` is that of a group
// of columns.

struct Float32 {
  static constexpr int kParts = 1, kColumns = W, kBytes = 4 * W;
  static constexpr bool kScaledInside = false;
  static void read(const uint8_t* from, float, Floats* to) { to[0] = load<Floats>(from); }
};

struct BFloat16 {
  static constexpr int kParts = 1, kColumns = W, kBytes = 2 * W;
  static constexpr bool kScaledInside = false;
  static void read(const uint8_t* from, float, Floats* to) {
    using Halves = uint16_t __attribute__((vector_size(2 * W)));
    to[0] = (Floats)(__builtin_convertvector(load<Halves>(from), Ints) << 16);
  }
};

struct Int8 {
  static constexpr int kParts = 1, kColumns = W, kBytes = W;
  static constexpr bool kScaledInside = false;
  static void read(const uint8_t* from, float, Floats* to) {
#if defined(__AVX512F__)
    to[0] = (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from)));
#else
    using Bytes = int8_t __attribute__((vector_size(W)));
    to[0] = __builtin_convertvector(__builtin_convertvector(load<Bytes>(from), Ints), Floats);
#endif
  }
};

struct Int4 {
  static constexpr int kParts = 2, kColumns = 2 * W, kBytes = W;
  static constexpr bool kScaledInside = true;
  static void read(const uint8_t* from, float scale, Floats* to) {
#if defined(__AVX512F__)
    // Looked up by the low 4 bits of each lane, in a table that is scaled once for a group.
    __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    table = _mm512_mul_ps(table, _mm512_set1_ps(scale));
    __m512i pairs = _mm512_cvtepu8_epi32(load<__m128i>(from));
    to[0] = (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), table);
    to[1] = (Floats)_mm512_permutexvar_ps(pairs, table);
#else
    using Bytes = int8_t __attribute__((vector_size(W)));
    Ints pairs = __builtin_convertvector(load<Bytes>(from), Ints);
    to[0] = __builtin_convertvector(pairs >> 4, Floats) * scale;
    to[1] = __builtin_convertvector((pairs << 28) >> 28, Floats) * scale;
#endif
  }
};

// A product of vectors: activations in `Number`, `kParts` vectors of `kWide` of them at a step.

template <class Stored>
struct InFloat32 : Stored {
  using Number = float;
  static constexpr int kWide = W;
  using Vector = Floats;
  static Floats fma(Vector x, Vector w, Floats total) { return total + x * w; }
};

#if defined(__AVX512BF16__)
using Pairs = __m512bh;

// Weights that are exact in bfloat16: plain ones, and integers that are scaled afterwards.
template <class Stored>
struct InBFloat16;

struct PairProducts {
  using Number = uint16_t;
  static constexpr int kWide = 32;
  static constexpr bool kScaledInside = false;
  using Vector = Pairs;
  static Floats fma(Vector x, Vector w, Floats total) {
    return (Floats)_mm512_dpbf16_ps((__m512)total, x, w);
  }
};

template <>
struct InBFloat16<BFloat16> : PairProducts {
  static constexpr int kParts = 1, kColumns = 32, kBytes = 64;
  static void read(const uint8_t* from, float, Vector* to) { to[0] = load<Vector>(from); }
};

template <>
struct InBFloat16<Int8> : PairProducts {
  static constexpr int kParts = 1, kColumns = 32, kBytes = 32;
  static void read(const uint8_t* from, float, Vector* to) {
    Floats low, high;
    Int8::read(from, 0, &low);
    Int8::read(from + 16, 0, &high);
    to[0] = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  }
};

template <>
struct InBFloat16<Int4> : PairProducts {
  static constexpr int kParts = 2, kColumns = 64, kBytes = 32;
  static void read(const uint8_t* from, float, Vector* to) {
    // 0 ... 7, -8 ... -1 in bfloat16, twice: 5 bits of a lane look up.
    const __m256i once = _mm256_setr_epi16(
        0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, (short)0xC100, (short)0xC0E0,
        (short)0xC0C0, (short)0xC0A0, (short)0xC080, (short)0xC040, (short)0xC000, (short)0xBF80);
    const __m512i table = _mm512_broadcast_i64x4(once);
    __m512i pairs = _mm512_cvtepu8_epi16(load<__m256i>(from));
    to[0] = (Vector)_mm512_permutexvar_epi16(_mm512_srli_epi16(pairs, 4), table);
    to[1] = (Vector)_mm512_permutexvar_epi16(pairs, table);
  }
};
#endif

// Activations in the order in which a kind multiplies them, rows of `stride` numbers; beyond the
// columns zeros.
template <class Kind>
class Activations {
 public:
  using Number = typename Kind::Number;

  template <class From>
  Activations(const From* x, int64_t rows, int64_t columns)
      : stride((columns + Kind::kColumns - 1) / Kind::kColumns * Kind::kColumns + kSpread),
        copy_(rows * stride) {
    for (int64_t m = 0; m < rows; ++m) {
      Number* to = copy_.data() + m * stride;
      const From* from = x + m * columns;
      if (Kind::kParts == 1) {
        for (int64_t c = 0; c < columns; ++c) to[c] = convert(from[c]);
        continue;
      }
      for (int64_t c = 0; c < columns; ++c) {
        int64_t within = c % Kind::kColumns;
        to[c - within + within % 2 * Kind::kWide + within / 2] = convert(from[c]);
      }
    }
  }

  const int64_t stride;

  const Number* row(int64_t m) const { return copy_.data() + m * stride; }

 private:
  // Rows whose distance is a power of 2 would share a few lines of the cache.
  static constexpr int64_t kSpread = 64 / sizeof(Number);

  static Number convert(Number x) { return x; }
  template <class From>
  static Number convert(From x) {  // bfloat16
    const uint32_t bits = uint32_t(x) << 16;
    return load<float>(&bits);
  }

  std::vector<Number> copy_;
};

struct Weight {
  const uint8_t* values;
  const float* scale;
  int64_t rows, columns, bytes, groups;  // bytes of a row
};

float sum(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float lanes[W];
  std::memcpy(lanes, &x, sizeof(x));
#pragma GCC unroll 4
  for (int half = W / 2; half > 0; half /= 2)
#pragma GCC unroll 4
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

// M rows of activations times R rows of a weight from `r` on.
template <class Kind, int M, int R>
void multiply(const typename Kind::Number* x, int64_t stride, const Weight& w, int64_t r,
              float* out) {
  using Vector = typename Kind::Vector;
  constexpr int U = M * R == 1 ? 4 : 1;  // sums that do not wait for each other
  Floats totals[M][R] = {}, sums[M][R * U] = {};  // of all groups, of one
  const uint8_t* rows = w.values + r * w.bytes;
  float scale[R] = {};
  const auto step = [&](const uint8_t* from, int64_t bytes, int u) __attribute__((always_inline)) {
    Vector numbers[R][Kind::kParts];
    for (int i = 0; i < R; ++i) Kind::read(from + i * bytes, scale[i], numbers[i]);
    for (int part = 0; part < Kind::kParts; ++part, x += Kind::kWide)
      for (int m = 0; m < M; ++m) {
        const Vector several = load<Vector>(x + m * stride);
        for (int i = 0; i < R; ++i)
          sums[m][i + u] = Kind::fma(several, numbers[i][part], sums[m][i + u]);
      }
  };
  const int64_t group = w.bytes / w.groups;
  for (int64_t g = 0; g < w.groups; ++g) {
    for (int i = 0; i < R; ++i) scale[i] = w.scale ? w.scale[(r + i) * w.groups + g] : 1;
    const uint8_t* from = rows + g * group;
    const uint8_t* const end = from + group / Kind::kBytes * Kind::kBytes;
    for (; from + U * Kind::kBytes <= end; from += U * Kind::kBytes)
      for (int u = 0; u < U; ++u) step(from + u * Kind::kBytes, w.bytes, u);
    for (; from < end; from += Kind::kBytes) step(from, w.bytes, 0);
    if (const int64_t rest = group % Kind::kBytes) {  // of the only group
      uint8_t padded[R][Kind::kBytes] = {};
      for (int i = 0; i < R; ++i) std::memcpy(padded[i], rows + (i + 1) * w.bytes - rest, rest);
      step(padded[0], Kind::kBytes, 0);
    }
    if (Kind::kScaledInside && g + 1 < w.groups) continue;
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < R; ++i) {
        for (int u = 1; u < U; ++u) sums[m][i] += sums[m][i + u];
        totals[m][i] += Kind::kScaledInside ? sums[m][i] : sums[m][i] * scale[i];
        for (int u = 0; u < U; ++u) sums[m][i + u] = Floats{};
      }
  }
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < R; ++i) out[m * w.rows + r + i] = sum(totals[m][i]);
}

// Calls work(0) ... work(count - 1) on XLA's threads, this one among them.
template <class Work>
void in_parallel(ffi::ThreadPool& pool, int64_t count, const Work& work) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  // A thread that comes late finds nothing to do: nothing waits for it, so that threads which are
  // all busy with products like this one cannot wait for each other.
  auto shared = std::make_shared<Shared>();
  const auto take = [shared, count, &work] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < count; shared->done.fetch_add(1)) work(i);
  };
  const int64_t helpers = std::min(count, pool.num_threads()) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(take));
  take();
  while (shared->done.load() < count) std::this_thread::yield();
}

template <int N>
using Number = std::integral_constant<int, N>;

constexpr int64_t kBlock = 1 << 17;  // bytes of a weight that stay in a core's cache

template <class Kind, class From>
void product(ffi::ThreadPool& pool, const From* from, int64_t M, const Weight& w, float* out) {
  const Activations<Kind> x(from, M, w.columns);
  const int64_t size = std::max<int64_t>(kBlock / w.bytes / 2 * 2, 2);
  in_parallel(pool, (w.rows + size - 1) / size, [&](int64_t block) {
    const int64_t first = block * size, end = std::min(first + size, w.rows);
    int64_t m = 0;
    const auto take = [&](auto count, auto together) {
      constexpr int N = decltype(count)::value, R = decltype(together)::value;
      for (; m + N <= M; m += N) {
        int64_t r = first;
        for (; r + R <= end; r += R)
          multiply<Kind, N, R>(x.row(m), x.stride, w, r, out + m * w.rows);
        for (; R > 1 && r < end; ++r)
          multiply<Kind, N, 1>(x.row(m), x.stride, w, r, out + m * w.rows);
      }
    };
    // A weight that comes from memory is read in order, which is faster than two rows in turns.
    if (M >= 2 * kMost) take(Number<kMost>(), Number<2>());
    if (kMost > 4) take(Number<kMost>(), Number<1>());
    take(Number<4>(), Number<1>());
    take(Number<2>(), Number<1>());
    take(Number<1>(), Number<1>());
  });
}

template <class Stored>
void multiply_by(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const Weight& w, float* out) {
  const int64_t M = x.dimensions()[0];
  if (x.element_type() == ffi::F32)
    return product<InFloat32<Stored>>(pool, static_cast<const float*>(x.untyped_data()), M, w, out);
  const auto* halves = static_cast<const uint16_t*>(x.untyped_data());
#if defined(__AVX512BF16__)
  if constexpr (!std::is_same_v<Stored, Float32>) {
    const bool fits = w.groups == 1 || w.bytes / w.groups % InBFloat16<Stored>::kBytes == 0;
    if (fits && (M > 1 || std::is_same_v<Stored, BFloat16>))
      return product<InBFloat16<Stored>>(pool, halves, M, w, out);
  }
#endif
  product<InFloat32<Stored>>(pool, halves, M, w, out);
}

ffi::Error compute(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer values,
                   ffi::Buffer<ffi::F32> scale, int64_t bits, ffi::ResultBuffer<ffi::F32> out) {
  const auto sizes = values.dimensions();
  const int64_t R = sizes[0], groups = R ? scale.element_count() / R : 0;
  const int64_t bytes = R ? int64_t(values.size_bytes()) / R : 0;
  const Weight w{static_cast<const uint8_t*>(values.untyped_data()),
                 groups ? scale.typed_data() : nullptr,
                 R, int64_t(x.dimensions()[1]), bytes, std::max<int64_t>(groups, 1)};
  float* result = out->typed_data();
  if (bits == 4) multiply_by<Int4>(pool, x, w, result);
  else if (bits == 8) multiply_by<Int8>(pool, x, w, result);
  else if (values.element_type() == ffi::BF16) multiply_by<BFloat16>(pool, x, w, result);
  else multiply_by<Float32>(pool, x, w, result);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(glm2_products, compute,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("bits")
                                  .Ret<ffi::Buffer<ffi::F32>>());
