#include "fastattn/parallel.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fastattn {

void wait_until(const std::atomic<int64_t>& value, int64_t target) {
    for (int spins = 0; value.load(std::memory_order_acquire) != target; ++spins) {
        // Where threads outnumber cores, the one awaited may not be running.
        if (spins >= 1000) {
            std::this_thread::yield();
            continue;
        }
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
}

static std::atomic<bool> poisoned{false};

void poison_scratch(bool on) { poisoned.store(on); }

Scratch::Scratch(int64_t bytes) : data_(std::aligned_alloc(64, static_cast<size_t>((bytes + 127) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
    if (poisoned.load(std::memory_order_relaxed)) std::memset(data_, 0xff, static_cast<size_t>(bytes));
}

Scratch::~Scratch() { std::free(data_); }

static std::atomic<bool> child{false};

#if defined(__unix__) || defined(__APPLE__)
// At load, not at the first call: torch may have started libgomp's team before, and the first call may be the child's.
[[maybe_unused]] static const int registered = pthread_atfork(nullptr, nullptr, [] { child.store(true); });
#endif

bool forked_child() { return child.load(std::memory_order_relaxed); }

}  // namespace fastattn
