// What one thread needs to work on a layer: the layer's directions as the target wants them, and scratch.

#pragma once

#include <cstddef>
#include <new>

#include "projection.hpp"

namespace rs {

class Workspace {
public:
    Workspace(const Target& target, const Problem& problem)
        : target_(&target),
          scratch_at_(round_up(target.packed_floats(problem.width, problem.rank))),
          floats_(static_cast<float*>(::operator new((scratch_at_ + target.scratch_floats()) * sizeof(float),
                                                     std::align_val_t(alignment)))) {}
    ~Workspace() { ::operator delete(floats_, std::align_val_t(alignment)); }
    Workspace(Workspace&& other) noexcept
        : target_(other.target_), scratch_at_(other.scratch_at_), floats_(other.floats_), layer_(other.layer_) {
        other.floats_ = nullptr;
    }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    Workspace& operator=(Workspace&&) = delete;

    // Projects rows [first, first + count) of a layer: row i's K results go to out[i · out_stride … + K).
    // The directions are packed when the layer changes.
    void project(const Problem& problem, std::size_t layer, std::size_t first, std::size_t count, float* out,
                 std::size_t out_stride) {
        const float* const offset = problem.offset == nullptr ? nullptr : problem.offset + layer * problem.width;
        if (layer != layer_) {
            target_->pack(problem.type, problem.width, problem.rank,
                          problem.directions + layer * problem.rank * problem.width, offset, floats_);
            layer_ = layer;
        }
        const unsigned char* const start = problem.activations +
                                           static_cast<std::ptrdiff_t>(layer) * problem.layer_stride +
                                           static_cast<std::ptrdiff_t>(first) * problem.sample_stride;
        const Rows rows = {problem.type,   start,        problem.sample_stride, count, problem.width,
                           problem.rank, floats_, offset != nullptr,     out,   out_stride};
        target_->project(rows, floats_ + scratch_at_);
    }

private:
    static std::size_t round_up(std::size_t floats) {
        constexpr std::size_t unit = alignment / sizeof(float);
        return (floats + unit - 1) / unit * unit;
    }

    const Target* target_;
    std::size_t scratch_at_;
    float* floats_;
    std::size_t layer_ = static_cast<std::size_t>(-1);
};

}  // namespace rs
