// AVX-512 F: 16 lanes, 32 registers. bfloat16 is widened. VDPBF16PS is not used: it needs the directions in
// bfloat16 too, which would cost three decimal digits (figures in docs/kernel.md).

#include <immintrin.h>

#include <cstddef>

#include "kernel.hpp"
#include "projection.hpp"
#include "targets.hpp"

namespace rs {
namespace {

struct Avx512 {
    using Vector = __m512;
    static constexpr std::size_t lanes = 16;

    // 4 × 6 sums + 4 rows + 1 direction: 29 of the 32 registers.
    static constexpr std::size_t rows(std::size_t /*c*/) { return 4; }

    static __m512i load_bits(const unsigned char* p) { return _mm512_loadu_si512(p); }

    static Vector zero() { return _mm512_setzero_ps(); }
    static Vector load(const float* p) { return _mm512_loadu_ps(p); }
    static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
    static Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
    // GCC would load a factor again for every multiplication, and let a sum wander to a factor's register.
    static Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__GNUC__) && defined(__AVX512F__)
        __asm__("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
        return c;
#else
        return _mm512_fmadd_ps(a, b, c);
#endif
    }
    static __m256 fold(Vector a) {
        const __m512d wide = _mm512_castps_pd(a);
        return _mm256_add_ps(_mm512_castps512_ps256(a), _mm256_castpd_ps(_mm512_extractf64x4_pd(wide, 1)));
    }
    static float total(Vector a) {
        const __m256 eight = fold(a);
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    // out[i] += total(a[i]) for four vectors at once, by a tree of pairwise sums.
    static void add_totals(const Vector* a, float* out) {
        const __m256 low = _mm256_hadd_ps(fold(a[0]), fold(a[1]));
        const __m256 high = _mm256_hadd_ps(fold(a[2]), fold(a[3]));
        const __m256 both = _mm256_hadd_ps(low, high);
        const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
        _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
    }
    static Vector load_f32(const unsigned char* p) { return _mm512_castsi512_ps(load_bits(p)); }
    static Vector load_f16(const unsigned char* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static Vector load_bf16_even(const unsigned char* p) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(load_bits(p), 16));
    }
    static Vector load_bf16_odd(const unsigned char* p) {
        return _mm512_castsi512_ps(
            _mm512_and_si512(load_bits(p), _mm512_set1_epi32(static_cast<int>(0xFFFF0000U))));
    }
    static void prefetch(const unsigned char* p) {
        _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
    }
};

using Loops = Kernel<Avx512>;

}  // namespace

extern const Target avx512_target = {"avx512", Loops::packed_floats, Loops::pack, Loops::project};

}  // namespace rs
