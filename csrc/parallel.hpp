// Runs tasks 0 … count − 1 on threads that stay alive between calls.

#pragma once

#include <cstddef>

namespace rs {

// Calls run(state, worker, task) once for every task, from at most `workers` threads: the caller is worker 0.
// `worker` < `workers` numbers the thread within this call. Returns when all tasks are done. `run` must not
// throw. Two callers at once are fine (the second finds the threads taken and works alone), and so is a
// forked child (it starts threads of its own).
using Task = void (*)(const void* state, std::size_t worker, std::size_t task);
void parallel(std::size_t count, std::size_t workers, Task run, const void* state) noexcept;

template <class Body>
void parallel_for(std::size_t count, std::size_t workers, const Body& body) noexcept {
    parallel(
        count, workers,
        [](const void* state, std::size_t worker, std::size_t task) {
            (*static_cast<const Body*>(state))(worker, task);
        },
        &body);
}

}  // namespace rs
