// Threads and scratch memory. Work is claimed from one counter, so a team smaller than asked for still does all of it.
#pragma once
#include <atomic>
#include <cstdint>

namespace fastattn {

bool forked_child();  // true in a process forked after start: libgomp's team does not survive a fork

// Returns once `value` is `target`, which another thread of the team is about to store; sees all it wrote before.
void wait_until(const std::atomic<int64_t>& value, int64_t target);

// Aligned memory for a scope, with anything in it: large pieces are kept for the next.
class Scratch {
   public:
    explicit Scratch(int64_t bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    template <class T>
    __attribute__((always_inline)) T* as() const {
        return static_cast<T*>(data_);
    }

   private:
    void* data_;
};

void poison_scratch(bool on);  // for tests: new scratch memory holds NaN

// Runs body() on up to `threads` threads at once; each call claims its own work. body must not throw.
template <class Body>
void run_team(int threads, Body&& body) {
    if (threads <= 1 || forked_child()) {
        body();
        return;
    }
#pragma omp parallel num_threads(threads)
    body();
}

// body(task) for task = 0 .. count-1, claimed in order.
template <class Body>
void parallel_for(int threads, int64_t count, Body&& body) {
    if (count < threads) threads = static_cast<int>(count);
    std::atomic<int64_t> next{0};
    run_team(threads, [&] {
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(task);
    });
}

}  // namespace fastattn
