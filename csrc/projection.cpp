// Divides a projection into tasks. A task is a run of rows of one layer.

#include "projection.hpp"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "parallel.hpp"
#include "workspace.hpp"

namespace rs {

void project(const Target& target, const Problem& problem, std::size_t threads, float* out) {
    if (problem.samples == 0 || problem.layers == 0 || problem.rank == 0) return;

    // The work of a core in about 0.1 ms, in bytes read from a cache or in pairs of multiplications. For
    // less, a second thread does not pay: waking it takes half of this time.
    constexpr std::size_t worthwhile = 1U << 21U;
    const std::size_t elements = problem.samples * problem.layers * problem.width;
    const std::size_t work = elements * size_of(problem.type) + elements * problem.rank / 2;
    const std::size_t workers = std::clamp<std::size_t>(work / worthwhile, 1, threads);

    // At least about four tasks per thread, so that all threads end at about the same time. A task has at
    // least 48 rows, because each thread packs the directions of each layer that it works on. 48 is a
    // multiple of the rows of every target's tile.
    constexpr std::size_t unit = 48;
    const std::size_t parts = workers == 1 ? 1 : (4 * workers + problem.layers - 1) / problem.layers;
    const std::size_t rows = std::max<std::size_t>(1, (problem.samples / parts + unit - 1) / unit) * unit;
    const std::size_t parts_of_layer = (problem.samples + rows - 1) / rows;

    std::vector<Workspace> workspaces;
    workspaces.reserve(workers);
    for (std::size_t i = 0; i < workers; ++i) workspaces.emplace_back(target, problem);

    const auto task = [&](std::size_t worker, std::size_t index) {
        const std::size_t layer = index / parts_of_layer;
        const std::size_t first = index % parts_of_layer * rows;
        workspaces[worker].project(problem, layer, first, std::min(rows, problem.samples - first),
                                   out + (first * problem.layers + layer) * problem.rank,
                                   problem.layers * problem.rank);
    };
    parallel_for(problem.layers * parts_of_layer, workers, task);
}

}  // namespace rs
