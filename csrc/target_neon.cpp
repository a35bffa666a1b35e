// NEON on AArch64: 4 lanes, 32 registers. FCVTL widens float16 and a shift widens bfloat16; both are in the
// base instruction set. BFDOT and FMLAL are not used: they need the directions in 16 bits too
// (docs/kernel.md).

#include <arm_neon.h>

#include <cstddef>
#ifdef _MSC_VER
#include <intrin.h>
#endif

#include "kernel.hpp"
#include "projection.hpp"
#include "targets.hpp"

namespace rs {
namespace {

struct Neon {
    using Vector = float32x4_t;
    static constexpr std::size_t lanes = 4;

    static constexpr std::size_t rows(std::size_t /*c*/) { return 4; }

    static uint32x4_t load_bits(const unsigned char* p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }

    static Vector zero() { return vdupq_n_f32(0); }
    static Vector load(const float* p) { return vld1q_f32(p); }
    static Vector add(Vector a, Vector b) { return vaddq_f32(a, b); }
    static Vector subtract(Vector a, Vector b) { return vsubq_f32(a, b); }
    static Vector multiply_add(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
    static float total(Vector a) { return vaddvq_f32(a); }
    // out[i] += total(a[i]) for four vectors at once, by a tree of pairwise sums.
    static void add_totals(const Vector* a, float* out) {
        const Vector sums = vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3]));
        vst1q_f32(out, vaddq_f32(vld1q_f32(out), sums));
    }
    static Vector load_f32(const unsigned char* p) { return vreinterpretq_f32_u32(load_bits(p)); }
    static Vector load_f16(const unsigned char* p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
    static Vector load_bf16_even(const unsigned char* p) {
        return vreinterpretq_f32_u32(vshlq_n_u32(load_bits(p), 16));
    }
    static Vector load_bf16_odd(const unsigned char* p) {
        return vreinterpretq_f32_u32(vandq_u32(load_bits(p), vdupq_n_u32(0xFFFF0000U)));
    }
    static void prefetch(const unsigned char* p) {
#ifdef _MSC_VER
        __prefetch(p);
#else
        __builtin_prefetch(p, 0, 2);  // a read, into the second-level cache
#endif
    }
};

using Loops = Kernel<Neon>;

}  // namespace

extern const Target neon_target = {"neon", Loops::packed_floats, Loops::pack, Loops::project};

}  // namespace rs
