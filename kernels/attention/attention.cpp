// Attention, forward and backward (mathematics: impl_native.py). q, k, v, y and their gradients fp32 or bf16,
// softmax and sums fp32. Every GEMM is one register-blocked kernel, `multiply`, on packed copies of a few hundred rows
// that stay in the second-level cache: in place the rows lie in few of its sets and would evict one another.
//
// Packed copies are 32-bit words: a word is one fp32 number or, where bf16 inputs meet a CPU with dot products of bf16
// (`PAIRED`), two bf16 numbers that are neighbours along the axis the GEMM sums over. The weights and their gradient
// are then rounded to bf16 for the GEMMs that take them.
//
// Scores are kept in base 2, s = log2(e) · scale · q·k, with the factor folded into the packed q, or, where that is
// bf16, multiplied to the product.
#include <cfloat>
#include <cmath>

#include "vector.h"
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

// MR × NV vectors of the result stay in registers, with NV of b and one of a: 19 of 32, or 16 and 11 of 16. MR divides
// W, see `Backward`.
#if defined(__AVX512F__)
constexpr int W = 16, MR = 8, NV = 2;
#elif defined(__AVX__)
constexpr int W = 8, MR = 4, NV = 3;
#else
constexpr int W = 4, MR = 4, NV = 2;
#endif

typedef float Vec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef float Whole __attribute__((vector_size(4 * W)));
typedef int32_t Int __attribute__((vector_size(4 * W)));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));
typedef uint32_t Word __attribute__((may_alias));
typedef uint16_t Half __attribute__((may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * W), aligned(2), may_alias));

#ifdef __AVX512BF16__
template <typename T>
constexpr bool PAIRED = sizeof(T) == sizeof(bf16);
#else
template <typename T>
constexpr bool PAIRED = false;
#endif

constexpr int64_t QUERIES = 256;  // a forward task: packing keys costs one step in a hundred of what they are used for
constexpr int64_t ROWS = 64;      // a backward tile: ROWS × keys() of weights and of their gradients
constexpr int64_t SKEW = 16;      // between the rows of a tile: else the rows of a column share few cache sets

constexpr int64_t up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
TRITIUM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
TRITIUM_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// The words of n numbers along the axis summed over.
template <bool PAIRS>
constexpr int64_t words(int64_t n) {
  return PAIRS ? (n + 1) / 2 : n;
}

// Keys packed at a time: 64 to 256 KiB for each copy of them.
int64_t forward_keys(int64_t D) { return D <= 64 ? 512 : D <= 128 ? 256 : 128; }
int64_t backward_keys(int64_t D) { return D <= 128 ? 256 : 128; }

struct Rows {  // (B, T, heads, D) with unit stride in D
  int64_t b, t, h;
};

struct Problem {
  int64_t B, Tq, Tk, H, G, D;
  Rows q, k, v;
  const int32_t* seq_start;  // (B, Tq) or null
  int64_t start_b, start_t, window;
  bool causal;
  float scale, softcap;
  uint32_t threshold, seed;  // dropout: a weight whose hash is below the threshold is dropped
  float keep_scale;
  bool paired;  // PAIRED of the dtype

  int64_t width() const { return up(D, W); }
  // scores = q_factor · q·k, then softcap2 · tanh; dk = k_factor · Σ d(scores) q_factor q = scale · Σ d(scores) q
  float q_factor() const { return softcap > 0.0f ? scale / softcap : scale * 1.44269504f; }
  float k_factor() const { return softcap > 0.0f ? softcap : 0.693147181f; }
  float softcap2() const { return softcap * 1.44269504f; }
};

// -------------------------------------------------------------------------------------------------------------- GEMM

TRITIUM_INLINE Vec at(const float* p) { return *(const Vec*)p; }
TRITIUM_INLINE void put(float* p, Vec x) { *(Vec*)p = x; }

// sum + x · row, or with pairs the sum plus both products of x and of each word of row.
template <bool PAIRS>
TRITIUM_INLINE Vec fused(float x, Vec row, Vec sum) {
#ifdef __AVX512BF16__
  if constexpr (PAIRS) return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(x), (__m512bh)row);
#endif
  return sum + x * row;
}

// c (MR, V vectors) = factor · or += Σ over words k < n of a(r, k) b(k, :). a(r, k) is a[r · lda + k], or
// a[k · lda + r] if COLUMNS; vector v of b's row k starts at b[k · ldb + v · step]. The factor is for pairs alone.
template <bool PAIRS, int V, bool COLUMNS>
void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t step, float* c, int64_t ldc, int64_t n,
              bool add, float factor) {
  Vec sum[MR][V];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = Vec{};
  for (int64_t k = 0; k < n; ++k) {
    Vec row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = at(b + k * ldb + v * step);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const float x = COLUMNS ? a[k * lda + r] : a[r * lda + k];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = fused<PAIRS>(x, row[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* to = c + r * ldc + v * W;
      put(to, add ? at(to) + sum[r][v] : PAIRS ? factor * sum[r][v] : sum[r][v]);
    }
}

// The same for any number of vectors.
template <bool PAIRS, bool COLUMNS>
void product(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t step, float* c, int64_t ldc, int64_t n,
             int64_t vectors, bool add, float factor = 1.0f) {
  int64_t v = 0;
  // NV + 1 are better cut in two pairs than into NV and 1, which alone leaves the multipliers waiting
  for (; v + NV <= vectors && v + NV + 1 != vectors; v += NV)
    multiply<PAIRS, NV, COLUMNS>(a, lda, b + v * step, ldb, step, c + v * W, ldc, n, add, factor);
  for (; v + 2 <= vectors; v += 2)
    multiply<PAIRS, 2, COLUMNS>(a, lda, b + v * step, ldb, step, c + v * W, ldc, n, add, factor);
  for (; v < vectors; ++v)
    multiply<PAIRS, 1, COLUMNS>(a, lda, b + v * step, ldb, step, c + v * W, ldc, n, add, factor);
}

// ----------------------------------------------------------------------------------------------------------- packing

// Three packed forms: rows and panels for products that sum over D, lines for those that sum over the rows.

// to (n → padded rows, words of D → width): factor · from, or `from` itself in pairs; zero where there is nothing.
template <bool PAIRS, typename T>
void pack_rows(const T* from, int64_t stride, int64_t n, int64_t padded, int64_t D, int64_t width, float factor,
               float* to) {
  for (int64_t i = 0; i < padded; ++i) {
    const int64_t filled = i < n ? D : 0;
    const T* source = from + i * stride;
    if constexpr (PAIRS) {
      Half* row = (Half*)to + i * width;
#pragma omp simd
      for (int64_t d = 0; d < filled; ++d) row[d] = source[d].bits;
      for (int64_t d = filled; d < width; ++d) row[d] = 0;
    } else {
      float* row = to + i * width;
#pragma omp simd
      for (int64_t d = 0; d < filled; ++d) row[d] = factor * load(source + d);
      for (int64_t d = filled; d < width; ++d) row[d] = 0.0f;
    }
  }
}

// to (words of n, D → width): `from` itself, or two rows as one line of pairs, the last of an odd n beside zeros.
template <bool PAIRS, typename T>
void pack_lines(const T* from, int64_t stride, int64_t n, int64_t D, int64_t width, float* to) {
  if constexpr (!PAIRS) {
    pack_rows<false>(from, stride, n, n, D, width, 1.0f, to);
  } else {
    for (int64_t i = 0; i < n; i += 2) {
      Word* const line = (Word*)to + i / 2 * width;
      const T *const even = from + i * stride, *const odd = even + stride;
      if (i + 1 < n) {
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) line[d] = (uint32_t)even[d].bits | (uint32_t)odd[d].bits << 16;
      } else {
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) line[d] = even[d].bits;
      }
      for (int64_t d = D; d < width; ++d) line[d] = 0;
    }
  }
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Int{__VA_ARGS__})
#endif

template <int... I>
struct Lanes {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  using type = Lanes<I...>;
};

// Swaps the S × S blocks off the diagonal of each 2S × 2S block: all S from 1 to W / 2 transpose a W × W matrix.
template <int S, int... I>
TRITIUM_INLINE void exchange(Vec& a, Vec& b, Lanes<I...>) {
  const Whole x = a, y = b;
  a = SHUFFLE(x, y, (I & S ? W + I - S : I)...);
  b = SHUFFLE(x, y, (I & S ? W + I : I + S)...);
}

template <int S>
TRITIUM_INLINE void exchange_all(Vec* m) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & S)) exchange<S>(m[i], m[i + S], typename Count<W>::type{});
}

TRITIUM_INLINE void transpose(Vec* m) {
  exchange_all<1>(m);
  exchange_all<2>(m);
  if constexpr (W > 4) exchange_all<4 % W>(m);
  if constexpr (W > 8) exchange_all<8 % W>(m);
}

// W numbers.
TRITIUM_INLINE Vec some(const float* p) { return at(p); }
TRITIUM_INLINE Vec some(const bf16* p) {
  return (Vec)(__builtin_convertvector(*(const Halves*)p, Bits) << 16);  // a loop of `load` goes through memory
}

// W numbers as fp32, of which the first n exist.
template <typename T>
TRITIUM_INLINE Vec some(const T* p, int64_t n) {
  if (n >= W) return some(p);
  float x[W];
  for (int d = 0; d < W; ++d) x[d] = d < n ? load(p + d) : 0.0f;
  return at(x);
}

// W words of pairs, of whose numbers the first n exist.
TRITIUM_INLINE Vec some_pairs(const bf16* p, int64_t n) {
  if (n >= 2 * W) return at((const float*)p);
  float x[W] = {};
  for (int64_t d = 0; d < n; ++d) ((Half*)x)[d] = p[d].bits;
  return at(x);
}

// n rows of D as panels [n / W][words of D][W]: the words of W rows side by side; rows that do not exist are zero.
template <bool PAIRS, typename T>
void pack_panels(const T* from, int64_t stride, int64_t n, int64_t D, float* to) {
  const int64_t depth = words<PAIRS>(D);
  for (int64_t j = 0; j < n; j += W, to += depth * W)
    for (int64_t d = 0; d < depth; d += W) {
      Vec m[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) {
        const T* row = from + (j + r) * stride;
        if constexpr (PAIRS)
          m[r] = j + r < n ? some_pairs(row + 2 * d, D - 2 * d) : Vec{};
        else
          m[r] = j + r < n ? some(row + d, D - d) : Vec{};
      }
      transpose(m);
      if (depth - d >= W) {
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) put(to + (d + r) * W, m[r]);
      } else {
        for (int r = 0; r < depth - d; ++r) put(to + (d + r) * W, m[r]);
      }
    }
}

// The numbers of two vectors rounded to one of pairs: neighbours, those of `first` before those of `second`, or each of
// `first` with that of `second` beside it.
#ifdef __AVX512BF16__
TRITIUM_INLINE Vec neighbours(Whole first, Whole second) {
  return (Vec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
template <int... I>
TRITIUM_INLINE Vec interleaved(Whole first, Whole second, Lanes<I...>) {
  const Int order{(I | (I + W) << 16)...};
  return (Vec)_mm512_permutexvar_epi16((__m512i)order, (__m512i)neighbours(first, second));
}
#else  // never called
TRITIUM_INLINE Vec neighbours(Whole first, Whole) { return first; }
template <int... I>
TRITIUM_INLINE Vec interleaved(Whole first, Whole, Lanes<I...>) {
  return first;
}
#endif

// MR rows of numbers to rows of pairs, in place: [begin, end), multiples of W, becomes words [begin / 2, end / 2).
TRITIUM_INLINE void pair_keys(float* rows, int64_t ld, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; j += 2 * W)
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      float* const row = rows + r * ld;
      put(row + j / 2, neighbours(at(row + j), j + W < end ? (Whole)at(row + j + W) : Whole{}));
    }
}

// MR rows of numbers to MR / 2 lines of pairs of queries.
TRITIUM_INLINE void pair_queries(const float* rows, int64_t ld, int64_t begin, int64_t end, float* to) {
  for (int64_t j = begin; j < end; j += W)
#pragma GCC unroll 16
    for (int r = 0; r < MR; r += 2)
      put(to + r / 2 * ld + j,
          interleaved(at(rows + r * ld + j), at(rows + (r + 1) * ld + j), typename Count<W>::type{}));
}

// ----------------------------------------------------------------------------------------------------------- masking

struct Span {  // keys begin ≤ j < end
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// The keys a query sees: always an interval.
TRITIUM_INLINE Span visible(const Problem& p, int64_t b, int64_t i) {
  const int64_t position = i + p.Tk - p.Tq;
  int64_t begin = p.window > 0 ? most(position - p.window + 1, 0) : 0;
  const int64_t end = p.causal ? least(position + 1, p.Tk) : p.Tk;
  if (p.seq_start) begin = most(begin, p.seq_start[b * p.start_b + i * p.start_t]);
  return begin < end ? Span{begin, end} : Span{0, 0};
}

TRITIUM_INLINE Span hull(Span a, Span b) {
  if (a.empty() || b.empty()) return a.empty() ? b : a;
  return {least(a.begin, b.begin), most(a.end, b.end)};
}

// Inside a chunk of keys that starts at c and has n keys.
TRITIUM_INLINE Span within(Span s, int64_t c, int64_t n) {
  const Span cut{most(s.begin - c, 0), least(s.end - c, n)};
  return cut.empty() ? Span{0, 0} : cut;
}

// A NaN in x is passed over: it stays in the weights.
TRITIUM_INLINE Whole larger(Whole x, Whole y) { return x > y ? x : y; }

template <int N, int... I>
TRITIUM_INLINE Whole rotate(Whole x, Lanes<I...>) {
  return SHUFFLE(x, x, ((I + N) % W)...);
}

template <int N = W / 2>
TRITIUM_INLINE float largest(Whole x) {
  if constexpr (N == 0) {
    return x[0];
  } else {
    return largest<N / 2>(larger(x, rotate<N>(x, typename Count<W>::type{})));
  }
}

template <int N = W / 2>
TRITIUM_INLINE float sum_of(Whole x) {
  if constexpr (N == 0) {
    return x[0];
  } else {
    return sum_of<N / 2>(x + rotate<N>(x, typename Count<W>::type{}));
  }
}

TRITIUM_INLINE void fill(float* row, int64_t begin, int64_t end, float value) {
  for (int64_t j = begin; j < end; ++j) row[j] = value;
}

// Puts `value` over what the queries of a group do not see in [begin, end), a multiple of W long. The middle, which all
// of them see, is not looked at.
TRITIUM_INLINE void hide(float* rows, int64_t ld, int64_t begin, int64_t end, const Span* seen, float value) {
  int64_t from = begin, to = end;
  for (int r = 0; r < MR; ++r) {
    from = most(from, seen[r].begin);
    to = least(to, seen[r].end);
  }
  Int lanes;
  for (int i = 0; i < W; ++i) lanes[i] = i;
  for (int64_t j = begin; j < end; j += W) {
    if (j >= from && j + W <= to) {
      j = to / W * W - W;
      continue;
    }
    for (int r = 0; r < MR; ++r) {
      const Int key = lanes + (int32_t)j;
      float* const here = rows + r * ld + j;
      const Whole kept = key < (int32_t)seen[r].end ? (Whole)at(here) : Whole{} + value;
      put(here, key >= (int32_t)seen[r].begin ? kept : Whole{} + value);
    }
  }
}

// reference.py's keep_mask: a hash of the weight's index in (B, H, Tq, Tk).
TRITIUM_INLINE float kept(uint32_t index, uint32_t seed, uint32_t threshold, float keep_scale) {
  uint32_t x = index ^ seed;
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 16)) * 0x846CA68Bu;
  x = x ^ (x >> 15);
  return x >= threshold ? keep_scale : 0.0f;
}

TRITIUM_INLINE uint32_t first_index(const Problem& p, int64_t b, int64_t h, int64_t i, int64_t key) {
  return (uint32_t)(((b * p.H + h) * p.Tq + i) * p.Tk + key);
}

// ----------------------------------------------------------------------------------------------------------- forward

struct Carver {  // one thread's scratch, cut into arrays that start at cache lines; without memory it only counts
  float* memory;
  int64_t used;
  float* take(int64_t n) {
    float* const here = memory ? memory + used : nullptr;
    used += up(n, 16);
    return here;
  }
};

struct Forward {
  float *q, *y, *panels, *v, *scores, *maximum, *total;
  int64_t lds;

  Forward(const Problem& p, Carver& c) {
    const int64_t width = p.width(), keys = up(least(forward_keys(p.D), most(p.Tk, 1)), W);
    const int64_t queries = least(QUERIES, up(p.Tq, MR)), pair = p.paired ? 2 : 1;
    lds = keys + SKEW;
    q = c.take(queries * width / pair);
    y = c.take(queries * width);
    panels = c.take(keys * width / pair);
    v = c.take(keys * width / pair);
    scores = c.take(MR * lds);
    maximum = c.take(queries);
    total = c.take(queries * W);
  }
};

// The scores of a group of MR queries to weights 2^(score - maximum), in place: [begin, end) is what was computed, a
// multiple of W long, `seen` what each query sees of it. The maxima and the sums, in W parts, of all chunks so far are
// kept up to date; rescale: what the sums of former chunks must be multiplied by. All rows at once, since their ends
// are the same and a row is only a few vectors long.
template <bool CAP>
void soften(float* s, int64_t lds, int64_t begin, int64_t end, const Span* seen, float softcap2, float* maximum,
            float* total, float* rescale) {
  if (CAP)
    for (int r = 0; r < MR; ++r) {
#pragma omp simd
      for (int64_t j = begin; j < end; ++j) s[r * lds + j] = softcap2 * vector_tanh(s[r * lds + j]);
    }
  hide(s, lds, begin, end, seen, -INFINITY);
  Whole most_of[MR], sum[MR];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) most_of[r] = Whole{} + maximum[r];
  for (int64_t j = begin; j < end; j += W)
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) most_of[r] = larger(at(s + r * lds + j), most_of[r]);
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
    const float peak = largest(most_of[r]);
    rescale[r] = maximum[r] - peak;
    maximum[r] = peak;
    most_of[r] = Whole{} + peak;
    sum[r] = Whole{};
  }
  for (int64_t j = begin; j < end; j += W)
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const Whole x = exp2_of<Whole, Bits>(at(s + r * lds + j) - most_of[r]);
      put(s + r * lds + j, x);
      sum[r] += x;
    }
#pragma omp simd
  for (int r = 0; r < MR; ++r) rescale[r] = vector_exp2(rescale[r]);
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) put(total + r * W, at(total + r * W) * rescale[r] + sum[r]);
}

template <typename T, bool CAP, bool PAIRS = PAIRED<T>>
void forward_task(const Problem& p, const Forward& f, int64_t b, int64_t h, int64_t first, int64_t n, const T* q,
                  const T* k, const T* v, T* y, float* lse) {
  const int64_t width = p.width(), vectors = width / W, groups = up(n, MR) / MR, most_keys = forward_keys(p.D);
  const int64_t g = h / (p.H / p.G), row = words<PAIRS>(width), depth = words<PAIRS>(p.D);
  Span seen[QUERIES], by_group[QUERIES / MR], all{0, 0};
  bool started[QUERIES / MR];
  for (int64_t m = 0; m < groups; ++m) {
    by_group[m] = Span{0, 0};
    started[m] = false;
    for (int64_t i = m * MR; i < (m + 1) * MR; ++i) {
      seen[i] = i < n ? visible(p, b, first + i) : Span{0, 0};
      by_group[m] = hull(by_group[m], seen[i]);
    }
    all = hull(all, by_group[m]);
  }
  pack_rows<PAIRS>(q + b * p.q.b + first * p.q.t + h * p.q.h, p.q.t, n, groups * MR, p.D, width, p.q_factor(), f.q);
  fill(f.maximum, 0, groups * MR, -FLT_MAX);
  fill(f.total, 0, groups * MR * W, 0.0f);
  for (int64_t c = all.begin / W * W; c < all.end; c += most_keys) {
    const int64_t keys = least(most_keys, all.end - c);
    pack_panels<PAIRS>(k + b * p.k.b + c * p.k.t + g * p.k.h, p.k.t, keys, p.D, f.panels);
    pack_lines<PAIRS>(v + b * p.v.b + c * p.v.t + g * p.v.h, p.v.t, keys, p.D, width, f.v);
    for (int64_t m = 0; m < groups; ++m) {
      const Span span = within(by_group[m], c, keys);
      if (span.empty()) continue;
      const int64_t begin = span.begin / W * W, end = up(span.end, W);
      product<PAIRS, false>(f.q + m * MR * row, row, f.panels + begin * depth, W, depth * W, f.scores + begin, f.lds,
                            depth, (end - begin) / W, false, p.q_factor());
      Span mine[MR];
      float rescale[MR];
      for (int r = 0; r < MR; ++r) mine[r] = within(seen[m * MR + r], c, keys);
      soften<CAP>(f.scores, f.lds, begin, end, mine, p.softcap2(), f.maximum + m * MR, f.total + m * MR * W, rescale);
      for (int r = 0; started[m] && r < MR; ++r) {
        float* sums = f.y + (m * MR + r) * width;
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) sums[d] *= rescale[r];
      }
      for (int64_t r = 0; p.threshold && r < MR; ++r) {
        const uint32_t index = first_index(p, b, h, first + m * MR + r, c);
        float* s = f.scores + r * f.lds;
#pragma omp simd
        for (int64_t j = begin; j < end; ++j) s[j] *= kept(index + (uint32_t)j, p.seed, p.threshold, p.keep_scale);
      }
      if (PAIRS) pair_keys(f.scores, f.lds, begin, end);
      product<PAIRS, false>(f.scores + words<PAIRS>(begin), f.lds, f.v + words<PAIRS>(begin) * width, width, W,
                            f.y + m * MR * width, width, words<PAIRS>(span.end - begin), vectors, started[m]);
      started[m] = true;
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    const float* sums = f.y + i * width;
    T* out = y + ((b * p.Tq + first + i) * p.H + h) * p.D;
    float* const log = lse + (b * p.H + h) * p.Tq + first + i;
    if (seen[i].empty()) {
      *log = 0.0f;
      for (int64_t d = 0; d < p.D; ++d) store(out + d, 0.0f);
      continue;
    }
    const float total = sum_of(at(f.total + i * W)), share = 1.0f / total;
    *log = f.maximum[i] + std::log2(total);
#pragma omp simd
    for (int64_t d = 0; d < p.D; ++d) store(out + d, sums[d] * share);
  }
}

TRITIUM_INLINE int thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

template <typename T, bool CAP>
void forward(const Problem& p, const T* q, const T* k, const T* v, T* y, float* lse, float* scratch, int64_t size,
             int threads) {
  const int64_t heads = p.B * p.H, blocks = (p.Tq + QUERIES - 1) / QUERIES;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (heads * p.Tq * p.Tk * p.D > 65536)
  for (int64_t task = 0; task < heads * blocks; ++task) {
    Carver carver{scratch + thread() * size, 0};
    const Forward f(p, carver);
    // the last queries, which see most, first: what is left at the end is small
    const int64_t bh = task % heads, first = (blocks - 1 - task / heads) * QUERIES;
    forward_task<T, CAP>(p, f, bh / p.H, bh % p.H, first, least(QUERIES, p.Tq - first), q, k, v, y, lse);
  }
}

// ---------------------------------------------------------------------------------------------------------- backward

// One tile is ROWS queries of one head by keys() keys. MR divides W so that a block of MR keys which some query of a
// group sees lies wholly in what the group computed, a multiple of W keys.
struct Backward {
  float *q, *dy, *q_lines, *dy_lines, *delta, *lse, *panels_k, *panels_v, *k, *dk, *dv, *dq;
  float *weights, *dweights;  // the tile: rows, or lines of pairs of queries
  float *scores, *products;   // of one group, where the tile holds pairs
  int64_t lds;

  Backward(const Problem& p, Carver& c) {
    const int64_t width = p.width(), keys = up(least(backward_keys(p.D), most(p.Tk, 1)), W), pair = p.paired ? 2 : 1;
    lds = keys + SKEW;
    q = c.take(ROWS * width / pair);
    dy = c.take(ROWS * width / pair);
    q_lines = p.paired ? c.take(ROWS * width / pair) : q;
    dy_lines = p.paired ? c.take(ROWS * width / pair) : dy;
    delta = c.take(ROWS);
    lse = c.take(ROWS);
    panels_k = c.take(keys * width / pair);
    panels_v = c.take(keys * width / pair);
    k = c.take(keys * width / pair);
    scores = p.paired ? c.take(MR * lds) : nullptr;
    products = p.paired ? c.take(MR * lds) : nullptr;
    weights = c.take(ROWS * lds / pair);
    dweights = c.take(ROWS * lds / pair);
    dk = c.take(keys * width);
    dv = c.take(keys * width);
    dq = c.take(p.H / most(p.G, 1) * up(p.Tq, ROWS) * width);
  }
};

template <typename T>
struct Tensors {
  const T *q, *k, *v, *y, *dy;
  Rows dy_rows;
  const float* lse;
  T *dq, *dk, *dv;
};

// A group's scores s and products dp = dy · v to what dv and dk, dq are made of: weights and d(scores), in place.
// index: of the first row's key 0 in the whole tensor of weights.
template <bool CAP>
void differentiate(const Problem& p, float* s, float* dp, int64_t ld, int64_t begin, int64_t end, const Span* seen,
                   const float* lse, const float* delta, uint32_t index) {
  if (CAP)
    for (int r = 0; r < MR; ++r) {
#pragma omp simd
      for (int64_t j = begin; j < end; ++j) s[r * ld + j] = vector_tanh(s[r * ld + j]);
    }
  hide(s, ld, begin, end, seen, -INFINITY);
  if (CAP || p.threshold) {
    const float softcap2 = p.softcap2();
    for (int r = 0; r < MR; ++r) {
      float *const score = s + r * ld, *const product = dp + r * ld;
      const uint32_t row = index + (uint32_t)(r * p.Tk);
#pragma omp simd
      for (int64_t j = begin; j < end; ++j) {
        const float keep = p.threshold ? kept(row + (uint32_t)j, p.seed, p.threshold, p.keep_scale) : 1.0f;
        const float w = vector_exp2((CAP ? softcap2 * score[j] : score[j]) - lse[r]);
        const float slope = CAP ? 1.0f - score[j] * score[j] : 1.0f;
        product[j] = w * (keep * product[j] - delta[r]) * slope;
        score[j] = keep * w;
      }
    }
  } else {
    for (int64_t j = begin; j < end; j += W)
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const Whole w = exp2_of<Whole, Bits>(at(s + r * ld + j) - lse[r]);
        put(s + r * ld + j, w);
        put(dp + r * ld + j, w * (at(dp + r * ld + j) - delta[r]));
      }
  }
  hide(dp, ld, begin, end, seen, 0.0f);  // not by the weight of 0: what is hidden may hold a NaN
}

// The tiles of one key/value head g: all its query heads, queries [first, last) and keys [from, to). `first` and `from`
// are starts of tiles. What is summed over tiles is summed in the same order whatever the ranges are.
template <typename T, bool CAP, bool PAIRS = PAIRED<T>>
void backward_task(const Problem& p, const Backward& f, const Tensors<T>& t, int64_t b, int64_t g, int64_t first,
                   int64_t last, int64_t from, int64_t to, bool for_queries, bool for_keys) {
  const int64_t width = p.width(), vectors = width / W, repeat = p.H / p.G, most_keys = backward_keys(p.D);
  const int64_t padded = up(last - first, ROWS), row = words<PAIRS>(width), depth = words<PAIRS>(p.D);
  if (for_queries) fill(f.dq, 0, repeat * padded * width, 0.0f);
  for (int64_t c = from; c < to; c += most_keys) {
    const int64_t keys = least(most_keys, to - c), blocks = up(keys, MR) / MR;
    const T* k = t.k + b * p.k.b + c * p.k.t + g * p.k.h;
    bool packed = false;
    if (for_keys) {
      fill(f.dk, 0, blocks * MR * width, 0.0f);
      fill(f.dv, 0, blocks * MR * width, 0.0f);
    }
    for (int64_t head = 0; head < repeat; ++head)
      for (int64_t start = first; start < last; start += ROWS) {
        const int64_t n = least(ROWS, last - start), groups = up(n, MR) / MR, h = g * repeat + head;
        Span seen[ROWS], by_group[ROWS / MR], all{0, 0};
        for (int64_t m = 0; m < groups; ++m) {
          by_group[m] = Span{0, 0};
          for (int64_t i = m * MR; i < (m + 1) * MR; ++i) {
            seen[i] = i < n ? within(visible(p, b, start + i), c, keys) : Span{0, 0};
            by_group[m] = hull(by_group[m], seen[i]);
          }
          all = hull(all, by_group[m]);
        }
        if (all.empty()) continue;
        if (!packed) {
          pack_panels<PAIRS>(k, p.k.t, keys, p.D, f.panels_k);
          pack_panels<PAIRS>(t.v + b * p.v.b + c * p.v.t + g * p.v.h, p.v.t, keys, p.D, f.panels_v);
          if (for_queries) pack_lines<PAIRS>(k, p.k.t, keys, p.D, width, f.k);
          packed = true;
        }
        const T* q = t.q + b * p.q.b + start * p.q.t + h * p.q.h;
        const T* dy = t.dy + b * t.dy_rows.b + start * t.dy_rows.t + h * t.dy_rows.h;
        pack_rows<PAIRS>(q, p.q.t, n, groups * MR, p.D, width, p.q_factor(), f.q);
        pack_rows<PAIRS>(dy, t.dy_rows.t, n, groups * MR, p.D, width, 1.0f, f.dy);
        if (PAIRS && for_keys) {
          pack_lines<PAIRS>(q, p.q.t, n, p.D, width, f.q_lines);
          pack_lines<PAIRS>(dy, t.dy_rows.t, n, p.D, width, f.dy_lines);
        }
        fill(f.delta, 0, groups * MR, 0.0f);
        fill(f.lse, 0, groups * MR, 0.0f);
        for (int64_t i = 0; i < n; ++i) {
          const T* y = t.y + ((b * p.Tq + start + i) * p.H + h) * p.D;
          f.lse[i] = t.lse[(b * p.H + h) * p.Tq + start + i];
          Whole sum{};
          for (int64_t d = 0; d < p.D; d += W) sum += some(dy + i * t.dy_rows.t + d, p.D - d) * some(y + d, p.D - d);
          f.delta[i] = sum_of(sum);
        }
        for (int64_t m = 0; m < groups; ++m) {
          const Span span = by_group[m];
          const int64_t begin = span.begin / W * W, end = up(span.end, W), lines = words<PAIRS>(MR);
          float* const weights = f.weights + m * lines * f.lds;
          float* const dweights = f.dweights + m * lines * f.lds;
          float* const s = PAIRS ? f.scores : weights;
          float* const ds = PAIRS ? f.products : dweights;
          if (p.seq_start) {  // documents may start anywhere: a group between two others need not see what they see
            for (int64_t r = 0; r < lines; ++r) {
              fill(weights + r * f.lds, 0, up(keys, W), 0.0f);
              fill(dweights + r * f.lds, 0, up(keys, W), 0.0f);
            }
          }
          if (span.empty()) continue;
          product<PAIRS, false>(f.q + m * MR * row, row, f.panels_k + begin * depth, W, depth * W, s + begin, f.lds,
                                depth, (end - begin) / W, false, p.q_factor());
          product<PAIRS, false>(f.dy + m * MR * row, row, f.panels_v + begin * depth, W, depth * W, ds + begin, f.lds,
                                depth, (end - begin) / W, false);
          differentiate<CAP>(p, s, ds, f.lds, begin, end, seen + m * MR, f.lse + m * MR, f.delta + m * MR,
                             first_index(p, b, h, start + m * MR, c));
          if (PAIRS && for_keys) {
            pair_queries(s, f.lds, begin, end, weights);
            pair_queries(ds, f.lds, begin, end, dweights);
          }
          if (PAIRS && for_queries) pair_keys(ds, f.lds, begin, end);
          if (for_queries)
            product<PAIRS, false>(ds + words<PAIRS>(begin), f.lds, f.k + words<PAIRS>(begin) * width, width, W,
                                  f.dq + (head * padded + start - first + m * MR) * width, width,
                                  words<PAIRS>(span.end - begin), vectors, true);
        }
        if (!for_keys) continue;
        for (int64_t block = all.begin / MR; block * MR < all.end; ++block) {
          const int64_t j = block * MR;
          int64_t low = 0, high = groups;
          const auto blind = [&](int64_t m) { return by_group[m].end <= j || by_group[m].begin >= j + MR; };
          while (low < high && blind(low)) ++low;
          while (low < high && blind(high - 1)) --high;
          if (low == high) continue;
          const int64_t i = words<PAIRS>(low * MR), rows = words<PAIRS>(least(high * MR, n)) - i;
          product<PAIRS, true>(f.weights + i * f.lds + j, f.lds, f.dy_lines + i * width, width, W, f.dv + j * width,
                               width, rows, vectors, true);
          product<PAIRS, true>(f.dweights + i * f.lds + j, f.lds, f.q_lines + i * width, width, W, f.dk + j * width,
                               width, rows, vectors, true);
        }
      }
    if (!for_keys) continue;
    const float factor = PAIRS ? p.scale : p.k_factor();
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t out = ((b * p.Tk + c + j) * p.G + g) * p.D;
#pragma omp simd
      for (int64_t d = 0; d < p.D; ++d) {
        store(t.dk + out + d, factor * f.dk[j * width + d]);
        store(t.dv + out + d, f.dv[j * width + d]);
      }
    }
  }
  if (!for_queries) return;
  for (int64_t head = 0; head < repeat; ++head)
    for (int64_t i = first; i < last; ++i) {
      const float* sums = f.dq + (head * padded + i - first) * width;
      T* out = t.dq + ((b * p.Tq + i) * p.H + g * repeat + head) * p.D;
#pragma omp simd
      for (int64_t d = 0; d < p.D; ++d) store(out + d, p.scale * sums[d]);
    }
}

template <typename T, bool CAP>
void backward(const Problem& p, const Tensors<T>& t, float* scratch, int64_t size, int threads) {
  const int64_t heads = p.B * p.G, most_keys = backward_keys(p.D);
  const int64_t key_blocks = (p.Tk + most_keys - 1) / most_keys, query_blocks = (p.Tq + QUERIES - 1) / QUERIES;
  // Five GEMMs a head, or seven in two passes that can be cut into blocks of keys and of queries: where there are fewer
  // heads than threads. Both add in one order, so that the number of threads changes no bit.
  const bool whole = 5 * ((heads + threads - 1) / threads) * threads <= 7 * heads || key_blocks * query_blocks == 1;
  const int64_t by_keys = whole ? 1 : key_blocks, by_queries = whole ? 0 : query_blocks;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (heads * p.Tq * p.Tk * p.D > 65536)
  for (int64_t task = 0; task < heads * (by_keys + by_queries); ++task) {
    Carver carver{scratch + thread() * size, 0};
    const Backward f(p, carver);
    const int64_t block = task / heads, b = task % heads / p.G, g = task % heads % p.G;
    if (whole) {
      backward_task<T, CAP>(p, f, t, b, g, 0, p.Tq, 0, p.Tk, true, true);
    } else if (block < by_keys) {
      const int64_t from = block * most_keys;
      backward_task<T, CAP>(p, f, t, b, g, 0, p.Tq, from, least(from + most_keys, p.Tk), false, true);
    } else {
      const int64_t first = (by_keys + by_queries - 1 - block) * QUERIES;
      backward_task<T, CAP>(p, f, t, b, g, first, least(first + QUERIES, p.Tq), 0, p.Tk, true, false);
    }
  }
}

Problem problem(int dtype, const int64_t* n, const int32_t* seq_start, int causal, float scale, float softcap,
                float keep_scale) {
  return {n[0], n[1], n[2], n[3], n[4], n[5], {n[6], n[7], n[8]}, {n[9], n[10], n[11]}, {n[12], n[13], n[14]},
          seq_start, n[15], n[16], n[17], causal != 0, scale, softcap, (uint32_t)n[18], (uint32_t)n[19], keep_scale,
          dtype == TRITIUM_BF16 && PAIRED<bf16>};
}

}  // namespace

// numbers, of all three: B, Tq, Tk, H, G, D; strides of batch, time and head of q, k and v; strides of seq_start;
// window; the dropout threshold (0: none) and seed, each the low 32 bits.

// Elements of scratch that each thread needs.
TRITIUM_EXPORT(int64_t, attention_scratch)(int dtype, const int64_t* numbers, int backward) {
  const Problem p = problem(dtype, numbers, nullptr, 0, 1.0f, 0.0f, 1.0f);
  Carver carver{nullptr, 0};
  if (backward) {
    Backward(p, carver);
  } else {
    Forward(p, carver);
  }
  return carver.used;
}

// y (B, Tq, H, D) contiguous, in q's dtype; lse (B, H, Tq) in base 2. scratch: threads × size.
TRITIUM_EXPORT(void, attention_forward)(int dtype, const void* q, const void* k, const void* v,
                                        const int32_t* seq_start, const int64_t* numbers, int causal, float scale,
                                        float softcap, float keep_scale, void* y, float* lse, float* scratch,
                                        int64_t size, int threads) {
  const Problem p = problem(dtype, numbers, seq_start, causal, scale, softcap, keep_scale);
#define RUN(T, CAP) \
  forward<T, CAP>(p, (const T*)q, (const T*)k, (const T*)v, (T*)y, lse, scratch, size, threads)
  if (dtype == TRITIUM_F32) {
    softcap > 0.0f ? RUN(float, true) : RUN(float, false);
  } else {
    softcap > 0.0f ? RUN(bf16, true) : RUN(bf16, false);
  }
#undef RUN
}

// dy: strides of batch, time and head given; y, dq, dk, dv contiguous.
TRITIUM_EXPORT(void, attention_backward)(int dtype, const void* q, const void* k, const void* v,
                                         const int32_t* seq_start, const int64_t* numbers, int causal, float scale,
                                         float softcap, float keep_scale, const void* y, const float* lse,
                                         const void* dy, int64_t dy_b, int64_t dy_t, int64_t dy_h, void* dq, void* dk,
                                         void* dv, float* scratch, int64_t size, int threads) {
  const Problem p = problem(dtype, numbers, seq_start, causal, scale, softcap, keep_scale);
#define RUN(T, CAP)                                                                                                   \
  backward<T, CAP>(p,                                                                                                 \
                   {(const T*)q, (const T*)k, (const T*)v, (const T*)y, (const T*)dy, {dy_b, dy_t, dy_h}, lse, (T*)dq, \
                    (T*)dk, (T*)dv},                                                                                  \
                   scratch, size, threads)
  if (dtype == TRITIUM_F32) {
    softcap > 0.0f ? RUN(float, true) : RUN(float, false);
  } else {
    softcap > 0.0f ? RUN(bf16, true) : RUN(bf16, false);
  }
#undef RUN
}
