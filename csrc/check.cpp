// The kernel's self-test without Python: for cross-compiled builds under an emulator, and for sanitizers.
// Compares every target that this CPU has with a float64 reference, over shapes, types, strides and
// alignments, and two callers at once. Prints one line a target; exit status 1 if one is wrong.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>

#include "projection.hpp"

namespace {

using rs::Type;

struct Shape {
    std::size_t samples, layers, rank, width;
};

float widen(Type type, std::uint16_t bits) {
    if (type == Type::bf16) {
        const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16U;
        float value = 0;
        std::memcpy(&value, &wide, sizeof value);
        return value;
    }
    const int exponent = (bits >> 10) & 0x1F;
    const int mantissa = bits & 0x3FF;
    const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                          : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
    return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

// A finite random number of the type, written to `to`; its value. Denormal float16 included.
float random_element(Type type, std::mt19937& random, unsigned char* to) {
    if (type == Type::f32) {
        const float value = std::normal_distribution<float>()(random);
        std::memcpy(to, &value, sizeof value);
        return value;
    }
    std::uint16_t bits = 0;
    if (type == Type::f16) {
        bits = static_cast<std::uint16_t>(random() & 0xBFFFU);  // |x| < 2
    } else {
        const float value = std::normal_distribution<float>()(random);
        std::uint32_t wide = 0;
        std::memcpy(&wide, &value, sizeof wide);
        bits = static_cast<std::uint16_t>(wide >> 16U);
    }
    std::memcpy(to, &bits, sizeof bits);
    return widen(type, bits);
}

// Largest error as a part of Σ|h − o||v|.
double worst_error(const rs::Target& target, Type type, const Shape& shape, bool with_offset,
                   std::size_t shift, std::mt19937& random) {
    const std::size_t size = rs::size_of(type);
    const std::size_t row =
        shape.width * size + 6;  // rows apart by a number that is no multiple of their element
    std::vector<unsigned char> bytes(shift + shape.samples * shape.layers * row);
    std::vector<float> values(shape.samples * shape.layers * shape.width);
    for (std::size_t i = 0; i < shape.samples * shape.layers; ++i)
        for (std::size_t d = 0; d < shape.width; ++d)
            values[i * shape.width + d] =
                random_element(type, random, bytes.data() + shift + i * row + d * size);
    std::vector<float> directions(shape.layers * shape.rank * shape.width);
    std::vector<float> offset(shape.layers * shape.width);
    std::normal_distribution<float> normal;
    for (float& v : directions) v = normal(random);
    for (float& o : offset) o = normal(random);

    const rs::Problem problem = {type,
                                 bytes.data() + shift,
                                 static_cast<std::ptrdiff_t>(shape.layers * row),
                                 static_cast<std::ptrdiff_t>(row),
                                 directions.data(),
                                 with_offset ? offset.data() : nullptr,
                                 shape.samples,
                                 shape.layers,
                                 shape.width,
                                 shape.rank};
    std::vector<float> out(shape.samples * shape.layers * shape.rank, NAN);
    std::vector<float> again(out);
    std::thread other([&] { rs::project(target, problem, 3, again.data()); });
    rs::project(target, problem, 2, out.data());
    other.join();

    double worst = 0;
    for (std::size_t i = 0; i < out.size(); ++i) {
        const std::size_t n = i / (shape.layers * shape.rank);
        const std::size_t l = i / shape.rank % shape.layers;
        const float* const h = values.data() + (n * shape.layers + l) * shape.width;
        const float* const v = directions.data() + (l * shape.rank + i % shape.rank) * shape.width;
        double sum = 0;
        double scale = 0;
        for (std::size_t d = 0; d < shape.width; ++d) {
            const double o = with_offset ? static_cast<double>(offset[l * shape.width + d]) : 0.0;
            const double term = (static_cast<double>(h[d]) - o) * static_cast<double>(v[d]);
            sum += term;
            scale += std::fabs(term);
        }
        if (out[i] != again[i]) return INFINITY;
        const double error = std::fabs(static_cast<double>(out[i]) - sum);
        if (!(error <= 1e30)) return INFINITY;
        if (scale > 0) worst = std::fmax(worst, error / scale);
    }
    return worst;
}

}  // namespace

int main() {
    constexpr double tolerance = 1e-6;
    const std::vector<Shape> shapes = {{1, 1, 1, 1},     {5, 3, 2, 3},      {13, 2, 7, 33},  {3, 1, 3, 896},
                                       {9, 2, 13, 95},   {30, 2, 64, 64},   {17, 2, 5, 129}, {4, 1, 19, 2100},
                                       {203, 3, 8, 896}, {100, 2, 17, 300}, {3, 1, 8, 4095}, {2, 1, 1, 16384},
                                       {0, 2, 3, 8},     {3, 2, 0, 8}};
    std::mt19937 random(7);
    bool passed = true;
    for (const rs::Target* target : rs::available_targets()) {
        double worst = 0;
        for (const Shape& shape : shapes)
            for (const Type type : {Type::f32, Type::f16, Type::bf16})
                for (const bool with_offset : {false, true})
                    for (const std::size_t shift : {0U, 1U})
                        worst =
                            std::fmax(worst, worst_error(*target, type, shape, with_offset, shift, random));
        const bool good = worst <= tolerance;
        passed = passed && good;
        std::printf("%-8s largest error %.1e of the sum of magnitudes: %s\n", target->name, worst,
                    good ? "passed" : "FAILED");
    }
    return passed ? 0 : 1;
}
