// AVX2 + FMA + F16C: 8 lanes, 16 registers. Compiled with these flags; dispatch.cpp uses it only if the CPU
// has these features.

#include <immintrin.h>

#include <cstddef>

#include "kernel.hpp"
#include "projection.hpp"
#include "targets.hpp"

namespace rs {
namespace {

struct Avx2 {
    using Vector = __m256;
    static constexpr std::size_t lanes = 8;

    // 4 × 3 sums + 3 directions + 1 row, or 3 × 4 and 2 × 6 sums: at most 16 registers.
    static constexpr std::size_t rows(std::size_t c) {
        if (c <= 3) return 4;
        return c == 4 ? 3 : 2;
    }

    static __m256i load_bits(const unsigned char* p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }

    static Vector zero() { return _mm256_setzero_ps(); }
    static Vector load(const float* p) { return _mm256_loadu_ps(p); }
    static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
    static Vector subtract(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
    // GCC would load a factor again for every multiplication, and let a sum wander to a factor's register.
    static Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__GNUC__) && defined(__AVX2__)
        __asm__("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
        return c;
#else
        return _mm256_fmadd_ps(a, b, c);
#endif
    }
    static float total(Vector a) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    // out[i] += total(a[i]) for four vectors at once, by a tree of pairwise sums.
    static void add_totals(const Vector* a, float* out) {
        const __m256 low = _mm256_hadd_ps(a[0], a[1]);
        const __m256 high = _mm256_hadd_ps(a[2], a[3]);
        const __m256 both = _mm256_hadd_ps(low, high);
        const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
        _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
    }
    static Vector load_f32(const unsigned char* p) { return _mm256_castsi256_ps(load_bits(p)); }
    static Vector load_f16(const unsigned char* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static Vector load_bf16_even(const unsigned char* p) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(load_bits(p), 16));
    }
    static Vector load_bf16_odd(const unsigned char* p) {
        return _mm256_castsi256_ps(
            _mm256_and_si256(load_bits(p), _mm256_set1_epi32(static_cast<int>(0xFFFF0000U))));
    }
    static void prefetch(const unsigned char* p) {
        _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
    }
};

using Loops = Kernel<Avx2>;

}  // namespace

extern const Target avx2_target = {"avx2", Loops::packed_floats, Loops::pack, Loops::project};

}  // namespace rs
