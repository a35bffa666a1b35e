// The kernel's self-test without Python, for cross-compiled builds under an emulator and for sanitizers.
// It compares every target of this CPU with a float64 reference: shapes, types, strides, alignments, random
// rows, rows of equal numbers, and two callers at once. Then it compares the statistics with their formulas.
// It prints one line per target. The exit status is 1 if a target is wrong.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

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
    const std::uint32_t half = bits;
    const int exponent = static_cast<int>(half >> 10U & 0x1FU);
    const int mantissa = static_cast<int>(half & 0x3FFU);
    const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                          : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
    return (half & 0x8000U) != 0 ? -magnitude : magnitude;
}

// Writes a finite random number of the type to `to` and returns its value. It may be a denormal float16.
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

// Random rows, or rows of one number each. Rounding errors cancel in the first and add up in the second.
enum class Data : std::uint8_t { random, level };

// Returns the largest error as a fraction of Σ|h − o||v|.
double worst_error(const rs::Target& target, Type type, const Shape& shape, Data data, bool with_offset,
                   std::size_t shift, std::mt19937& random) {
    const std::size_t size = rs::size_of(type);
    const std::size_t row = shape.width * size + 6;  // the stride of float32 rows is not a multiple of 4
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
    for (std::size_t d = 1; d < shape.width && data == Data::level; ++d) {
        for (std::size_t i = 0; i < shape.samples * shape.layers; ++i) {
            unsigned char* const first = bytes.data() + shift + i * row;
            std::memcpy(first + d * size, first, size);
            values[i * shape.width + d] = values[i * shape.width];
        }
        for (std::size_t i = 0; i < shape.layers * shape.rank; ++i)
            directions[i * shape.width + d] = directions[i * shape.width];
        for (std::size_t l = 0; l < shape.layers; ++l) offset[l * shape.width + d] = offset[l * shape.width];
    }

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
    rs::project(target, problem, 1, out.data());

    double worst = 0;
    for (std::size_t i = 0; i < shape.samples * shape.layers; ++i) {
        const std::size_t l = i % shape.layers;
        const float* const h = values.data() + i * shape.width;
        for (std::size_t k = 0; k < shape.rank; ++k) {
            const float* const v = directions.data() + (l * shape.rank + k) * shape.width;
            double sum = 0;
            double scale = 0;
            for (std::size_t d = 0; d < shape.width; ++d) {
                const double o = with_offset ? static_cast<double>(offset[l * shape.width + d]) : 0.0;
                const double term = (static_cast<double>(h[d]) - o) * static_cast<double>(v[d]);
                sum += term;
                scale += std::fabs(term);
            }
            const double error = std::fabs(static_cast<double>(out[i * shape.rank + k]) - sum);
            if (!(error <= 1e30)) return INFINITY;
            if (scale > 0) worst = std::fmax(worst, error / scale);
        }
    }
    return worst;
}

// Returns a problem in float32, C-contiguous and without an offset.
rs::Problem dense(const std::vector<float>& values, const std::vector<float>& directions, std::size_t samples,
                  std::size_t layers, std::size_t rank, std::size_t width) {
    return {Type::f32,
            reinterpret_cast<const unsigned char*>(values.data()),
            static_cast<std::ptrdiff_t>(layers * width * sizeof(float)),
            static_cast<std::ptrdiff_t>(width * sizeof(float)),
            directions.data(),
            nullptr,
            samples,
            layers,
            width,
            rank};
}

// Returns the quantile q of at least one value, with linear interpolation.
double quantile(std::vector<double> values, double q) {
    std::sort(values.begin(), values.end());
    const double position = q * static_cast<double>(values.size() - 1);
    const auto below = static_cast<std::size_t>(position);
    const double high = values[std::min(below + 1, values.size() - 1)];
    return values[below] + (position - static_cast<double>(below)) * (high - values[below]);
}

// Returns whether the statistics agree with their formulas, applied to the projections.
bool statistics_agree(const rs::Target& target, std::mt19937& random) {
    constexpr std::size_t samples = 61;
    constexpr std::size_t layers = 3;
    constexpr std::size_t rank = 2;
    constexpr std::size_t width = 37;
    constexpr double neutral = 0.15;
    constexpr double q = 0.9;
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<double> uniform(-1, 1);
    std::vector<float> activations(samples * layers * width);
    std::vector<float> directions(layers * rank * width);
    std::vector<double> c(samples);
    std::vector<double> w(samples);
    for (float& h : activations) h = normal(random);
    for (float& v : directions) v = normal(random);
    for (double& value : c) value = uniform(random);
    for (double& value : w) value = 1 + uniform(random);
    const rs::Problem problem = dense(activations, directions, samples, layers, rank, width);
    constexpr std::size_t count = layers * rank;
    std::vector<float> p(samples * count);
    rs::project(target, problem, 1, p.data());
    constexpr std::size_t figures = 5;
    std::vector<double> found(figures * count, NAN);
    const auto at = [&](std::size_t figure) { return found.data() + figure * count; };
    rs::statistics(target, problem, c.data(), w.data(), neutral, q, 2, {at(0), at(1), at(2), at(3), at(4)});

    const auto near = [](double a, double b) { return std::fabs(a - b) <= 1e-9 * (1 + std::fabs(b)); };
    for (std::size_t i = 0; i < count; ++i) {
        double weight = 0;
        double sum_p = 0;
        double sum_c = 0;
        double wrong = 0;
        double squares = 0;
        std::vector<double> positive;
        std::vector<double> negative;
        double pairs = 0;
        double won = 0;
        for (std::size_t n = 0; n < samples; ++n) {
            const double value = p[n * count + i];
            weight += w[n];
            sum_p += w[n] * value;
            sum_c += w[n] * c[n];
            if ((value > 0) != (c[n] > 0)) {
                wrong += w[n];
                squares += w[n] * (value - c[n]) * (value - c[n]);
            }
            for (std::size_t m = 0; m < samples && c[n] > neutral; ++m) {
                if (c[m] >= -neutral) continue;
                const double other = p[m * count + i];
                pairs += 1;
                won += (value > other ? 0.5 : 0) + (value >= other ? 0.5 : 0);
            }
            (c[n] > 0 ? positive : negative).push_back(value);
        }
        double pp = 0;
        double pc = 0;
        double cc = 0;
        for (std::size_t n = 0; n < samples; ++n) {
            const double dp = p[n * count + i] - sum_p / weight;
            const double dc = c[n] - sum_c / weight;
            pp += w[n] * dp * dp;
            pc += w[n] * dp * dc;
            cc += w[n] * dc * dc;
        }
        const double expected[figures] = {pc / std::sqrt(pp * cc), std::sqrt(squares / wrong), won / pairs,
                                          quantile(positive, q), quantile(negative, 1 - q)};
        for (std::size_t figure = 0; figure < figures; ++figure)
            if (!near(at(figure)[i], expected[figure])) return false;
    }
    return true;
}

// Returns whether two callers at once, each with work for several threads, get exactly one thread's results.
bool threads_agree(const rs::Target& target, std::mt19937& random) {
    constexpr std::size_t samples = 203;
    constexpr std::size_t layers = 3;
    constexpr std::size_t rank = 380;
    constexpr std::size_t width = 896;
    std::normal_distribution<float> normal;
    std::vector<float> values(samples * layers * width);
    std::vector<float> directions(layers * rank * width);
    for (float& value : values) value = normal(random);
    for (float& value : directions) value = normal(random);
    const rs::Problem problem = dense(values, directions, samples, layers, rank, width);
    std::vector<float> alone(samples * layers * rank, NAN);
    std::vector<float> two(alone);
    std::vector<float> three(alone);
    rs::project(target, problem, 1, alone.data());
    std::thread other([&] { rs::project(target, problem, 3, three.data()); });
    rs::project(target, problem, 2, two.data());
    other.join();
    return alone == two && alone == three;
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
                for (const Data data : {Data::random, Data::level})
                    for (const bool with_offset : {false, true})
                        for (const std::size_t shift : {0U, 1U})
                            worst = std::fmax(
                                worst, worst_error(*target, type, shape, data, with_offset, shift, random));
        const bool good =
            worst <= tolerance && statistics_agree(*target, random) && threads_agree(*target, random);
        passed = passed && good;
        std::printf("%-8s largest error %.1e of the sum of magnitudes: %s\n", target->name, worst,
                    good ? "passed" : "FAILED");
    }
    return passed ? 0 : 1;
}
