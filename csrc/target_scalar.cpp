// Scalar: plain C++ for any machine, and the reference of the other targets. Its "vector" is an array of
// eight floats, so that it sums by lanes as they do.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernel.hpp"
#include "projection.hpp"
#include "targets.hpp"

namespace rs {
namespace {

float widen_f16(std::uint16_t half) {
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000U) << 16U;
    const std::uint32_t exponent = static_cast<std::uint32_t>(half) >> 10U & 0x1FU;
    const std::uint32_t mantissa = half & 0x3FFU;
    float value = 0;
    if (exponent == 0) {  // zero or denormal: mantissa · 2^−24, which float32 holds exactly
        value = static_cast<float>(mantissa) * 0x1p-24F;
        return sign != 0 ? -value : value;
    }
    const std::uint32_t widened =
        exponent == 0x1FU ? 0xFFU : exponent + 112;  // bias 127 − 15; Inf and NaN stay
    const std::uint32_t bits = sign | widened << 23U | mantissa << 13U;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

float widen_bf16(std::uint16_t half) {
    const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16U;
    float value = 0;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

struct Scalar {
    static constexpr std::size_t lanes = 8;
    struct Vector {
        float lane[lanes];
    };

    static constexpr std::size_t rows(std::size_t /*c*/) { return 1; }

    template <class Element>
    static Vector each(Element element) {
        Vector result;
        for (std::size_t i = 0; i < lanes; ++i) result.lane[i] = element(i);
        return result;
    }

    static std::uint16_t read_u16(const unsigned char* p, std::size_t i) {
        std::uint16_t value = 0;
        std::memcpy(&value, p + 2 * i, sizeof value);
        return value;
    }

    static Vector zero() { return {}; }
    static Vector load(const float* p) {
        return each([p](std::size_t i) { return p[i]; });
    }
    static Vector add(const Vector& a, const Vector& b) {
        return each([&](std::size_t i) { return a.lane[i] + b.lane[i]; });
    }
    static Vector subtract(const Vector& a, const Vector& b) {
        return each([&](std::size_t i) { return a.lane[i] - b.lane[i]; });
    }
    static Vector multiply_add(const Vector& a, const Vector& b, const Vector& c) {
        return each([&](std::size_t i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
    }
    static float total(const Vector& a) {
        const float* x = a.lane;
        return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
    }
    static void add_totals(const Vector* a, float* out) {
        for (std::size_t i = 0; i < 4; ++i) out[i] += total(a[i]);
    }
    static Vector load_f32(const unsigned char* p) {
        Vector result;
        std::memcpy(result.lane, p, sizeof result.lane);
        return result;
    }
    static Vector load_f16(const unsigned char* p) {
        return each([p](std::size_t i) { return widen_f16(read_u16(p, i)); });
    }
    static Vector load_bf16_even(const unsigned char* p) {
        return each([p](std::size_t i) { return widen_bf16(read_u16(p, 2 * i)); });
    }
    static Vector load_bf16_odd(const unsigned char* p) {
        return each([p](std::size_t i) { return widen_bf16(read_u16(p, 2 * i + 1)); });
    }
    static void prefetch(const unsigned char* /*p*/) {}
};

using Loops = Kernel<Scalar>;

}  // namespace

extern const Target scalar_target = {"scalar", Loops::packed_floats, Loops::pack, Loops::project};

}  // namespace rs
