// A pool of threads, because starting a thread takes as long as projecting a small model's activations.

#include "parallel.hpp"

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__) && !defined(__ANDROID__)
#include <sched.h>
#define RS_AFFINITY
#endif

namespace rs {
namespace {

// The state that the threads of one call share. Tasks are handed out one at a time, so a thread that starts
// late or is interrupted delays only its own task.
struct Job {
    std::size_t count;
    Task run;
    const void* state;
    std::atomic<std::size_t> next{0};

    void work(std::size_t worker) {
        for (std::size_t task = next++; task < count; task = next++) run(state, worker, task);
    }
};

class Pool {
public:
    void run(Job& job, std::size_t workers) {
        const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (turn.owns_lock() && workers > 1) {
            grow(workers - 1);
            leave_this_core();
            open(job, workers - 1);
            job.work(0);
            close();
        } else {
            job.work(0);
        }
    }

private:
    void grow(std::size_t threads) {
        try {
            handles_.reserve(threads);
            while (handles_.size() < threads) {
                std::thread thread([this] { serve(); });
                handles_.push_back(thread.native_handle());
                thread.detach();
#ifdef RS_AFFINITY
                CPU_ZERO(&allowed_);
#endif
            }
        } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch)
            // The system gives no more threads. The existing threads and the caller do the work.
        }
    }

    // Keeps the workers off the caller's core. Linux often wakes a thread on the core of the waking thread.
    // That core is busy, so the call would end before the worker starts.
    void leave_this_core() {
#ifdef RS_AFFINITY
        const int here = sched_getcpu();
        cpu_set_t cores;
        if (here < 0 || sched_getaffinity(0, sizeof cores, &cores) != 0) return;
        CPU_CLR(here, &cores);
        if (CPU_COUNT(&cores) == 0 || CPU_EQUAL(&cores, &allowed_)) return;
        for (const auto handle : handles_) pthread_setaffinity_np(handle, sizeof cores, &cores);
        allowed_ = cores;
#endif
    }

    void open(Job& job, std::size_t seats) {
        {
            const std::scoped_lock lock(mutex_);
            job_ = &job;
            seats_ = seats;
            taken_ = 0;
        }
        ++calls_;
        wake_.notify_all();
    }

    // No thread enters the job after this call, and all threads in the job have left when it returns.
    void close() {
        std::unique_lock<std::mutex> lock(mutex_);
        job_ = nullptr;
        idle_.wait(lock, [this] { return inside_ == 0; });
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            if (job_ != nullptr && taken_ < seats_) {
                Job& job = *job_;
                const std::size_t worker = ++taken_;
                ++inside_;
                lock.unlock();
                job.work(worker);
                const std::size_t seen = calls_;
                lock.lock();
                if (--inside_ == 0) idle_.notify_one();
                lock.unlock();
                linger(seen);
                lock.lock();
                continue;
            }
            wake_.wait(lock);
        }
    }

    // Calls often follow each other (layer by layer, step by step), and waking a sleeping thread takes longer
    // than a small call. So a thread waits actively for about a millisecond before it sleeps.
    void linger(std::size_t seen) const {
        for (int i = 0; i < 2000 && calls_ == seen; ++i) std::this_thread::yield();
    }

    std::mutex turn_;  // held by the caller whose job it is
    std::mutex mutex_;
    std::condition_variable wake_;
    std::condition_variable idle_;
    std::atomic<std::size_t> calls_{0};
    std::vector<std::thread::native_handle_type> handles_;
#ifdef RS_AFFINITY
    cpu_set_t allowed_{};  // the workers' cores: the caller's, except the one it runs on
#endif
    Job* job_ = nullptr;
    std::size_t seats_ = 0;
    std::size_t taken_ = 0;
    std::size_t inside_ = 0;
};

// Never destroyed: its threads sleep until the process ends.
std::atomic<Pool*> pool{nullptr};

// After a fork only the forking thread exists in the child. The child leaves the parent's pool alone, because
// threads that no longer exist may hold its locks.
void replace_pool() { pool = new Pool; }

Pool& current_pool() {
    static const bool ready = [] {
        replace_pool();
#if defined(__unix__) || defined(__APPLE__)
        pthread_atfork(nullptr, nullptr, replace_pool);
#endif
        return true;
    }();
    static_cast<void>(ready);
    return *pool;
}

}  // namespace

void parallel(std::size_t count, std::size_t workers, Task run, const void* state) noexcept {
    Job job{count, run, state};
    if (workers > 1)
        current_pool().run(job, workers);
    else
        job.work(0);
}

}  // namespace rs
