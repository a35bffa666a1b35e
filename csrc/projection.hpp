// The interface of the kernel, which all files in this folder share.
//
//   out[n, l, k] = Σ_d (h[n, l, d] − o[l, d]) · v[l, k, d]
//
// h is read once, in its own type (float32, float16 or bfloat16) and in place: any address, any stride in n
// and l, d contiguous. Sums are float32, by lanes, runs and chunks (see kernel.hpp). For any data without
// overflow or underflow, the error is at most (44 + D/512) · 2⁻²⁴ · Σ|h − o||v|: 3.1e−6 of the sum at
// D = 4,096. On random rows and on rows of equal numbers it stays below 1e−6 of the sum up to D = 16,384.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace rs {

enum class Type : std::uint8_t { f32, f16, bf16 };

inline std::size_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }

// One call. `activations` points to h[0, 0, 0]; its strides are in bytes and may be negative or zero.
// `directions` [L, K, D] and `offset` [L, D], which may be null, are C-contiguous float32.
struct Problem {
    Type type;
    const unsigned char* activations;
    std::ptrdiff_t sample_stride;
    std::ptrdiff_t layer_stride;
    const float* directions;
    const float* offset;
    std::size_t samples;
    std::size_t layers;
    std::size_t width;
    std::size_t rank;  // K, the directions of a layer
};

// The part of one layer that a thread works on at a time: `count` rows, `stride` bytes apart.
// Row i's K results go to out[i · out_stride … + K).
struct Rows {
    Type type;
    const unsigned char* first;
    std::ptrdiff_t stride;
    std::size_t count;
    std::size_t width;
    std::size_t rank;
    const float* packed;  // what Target::pack wrote for this layer
    bool has_offset;
    float* out;
    std::size_t out_stride;
};

// A SIMD target: three functions compiled for one instruction set. The caller owns all memory, so the
// functions cannot fail. `packed` has packed_floats() floats and is aligned to `alignment` bytes.
struct Target {
    const char* name;
    std::size_t (*packed_floats)(std::size_t width, std::size_t rank);
    void (*pack)(Type type, std::size_t width, std::size_t rank, const float* directions, const float* offset,
                 float* packed);
    void (*project)(const Rows& rows);
};

inline constexpr std::size_t alignment = 64;

// dispatch.cpp: the targets of this build that this CPU can run, slowest first; and the target in use, which
// is the last one or the one that RS_GGUF_KERNEL names. Throws std::invalid_argument if RS_GGUF_KERNEL names
// a target that is not available.
std::vector<const Target*> available_targets();
const Target& chosen_target();

// projection.cpp: out is [N, L, K], C-contiguous. `threads` ≥ 1 is an upper limit: small problems use fewer.
void project(const Target& target, const Problem& problem, std::size_t threads, float* out);

// statistics.cpp: the statistics of directions, from one pass over the activations. A thread stores the
// projections of one layer, N × K, never those of all layers. Each output is [L, K], C-contiguous. NaN marks
// an undefined figure; a column with a non-finite projection is NaN throughout.
struct Statistics {
    double* pearson;       // weighted correlation of p with c
    double* disagreement;  // weighted RMSE of p − c where sign(p) ≠ sign(c); 0 without such a sample
    double* auroc;         // area under the ROC curve of p, c > neutral against c < −neutral, unweighted
    double* upper;         // quantile q of p over c > 0
    double* lower;         // quantile 1 − q of p over c < 0
};
void statistics(const Target& target, const Problem& problem, const double* confidence, const double* weights,
                double neutral, double q, std::size_t threads, const Statistics& out);

}  // namespace rs
