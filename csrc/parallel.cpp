// A pool of threads, because starting one costs as much time as projecting a small model's activations.

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

// What the threads of one call share. Tasks are handed out one at a time, so a thread that starts late or
// is interrupted costs no more than the task it holds.
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
            // The system gives no more threads: those that there are, and the caller, do the work.
        }
    }

    // Keeps the workers off the caller's core. Linux likes to wake a thread on the core of whoever wakes it,
    // busy as that is, and the call would be over before the worker's turn comes.
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

    // No thread enters the job from here on, and those inside have left when this returns.
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

    // Calls come in rows (layer by layer, step by step), and waking a sleeping thread takes longer than a
    // small call: so look out for the next call for up to a millisecond or so before going to sleep.
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
    cpu_set_t allowed_{};  // cores that the workers may use: all of the caller's but the one it was on
#endif
    Job* job_ = nullptr;
    std::size_t seats_ = 0;
    std::size_t taken_ = 0;
    std::size_t inside_ = 0;
};

// Never destroyed: its threads sleep until the process ends.
std::atomic<Pool*> pool{nullptr};

// Only the forking thread lives on in a child. The parent's pool, whose locks may be held by threads that
// are no more, is left where it is.
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
