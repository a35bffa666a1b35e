// The memory of one thread for a layer: the layer's directions, packed for the target.

#pragma once

#include <cstddef>
#include <memory>
#include <new>

#include "projection.hpp"

namespace rs {

class Workspace {
public:
    Workspace(const Target& target, const Problem& problem)
        : target_(&target),
          packed_(static_cast<float*>(
              ::operator new(target.packed_floats(problem.width, problem.rank) * sizeof(float),
                             std::align_val_t(alignment)))) {}

    // Projects rows [first, first + count) of a layer: row i's K results go to out[i · out_stride … + K).
    // The directions are packed when the layer changes.
    // NOLINTNEXTLINE(readability-non-const-parameter): Rows keeps it, for writing
    void project(const Problem& problem, std::size_t layer, std::size_t first, std::size_t count, float* out,
                 std::size_t out_stride) {
        const float* const offset =
            problem.offset == nullptr ? nullptr : problem.offset + layer * problem.width;
        if (layer != layer_) {
            target_->pack(problem.type, problem.width, problem.rank,
                          problem.directions + layer * problem.rank * problem.width, offset, packed_.get());
            layer_ = layer;
        }
        const unsigned char* const start = problem.activations +
                                           static_cast<std::ptrdiff_t>(layer) * problem.layer_stride +
                                           static_cast<std::ptrdiff_t>(first) * problem.sample_stride;
        const Rows rows = {problem.type, start,         problem.sample_stride, count, problem.width,
                           problem.rank, packed_.get(), offset != nullptr,     out,   out_stride};
        target_->project(rows);
    }

private:
    struct Free {
        void operator()(float* floats) const { ::operator delete(floats, std::align_val_t(alignment)); }
    };

    const Target* target_;
    std::unique_ptr<float, Free> packed_;
    std::size_t layer_ = static_cast<std::size_t>(-1);
};

}  // namespace rs
