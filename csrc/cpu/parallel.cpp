#include "fastattn/parallel.h"

#include <cstdlib>
#include <cstring>
#include <iterator>
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

// Freed memory goes back to the system as a rule, and a call that takes it anew pays for every page. So the last few
// large pieces wait here for the next call.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kMostKept = 0;  // the sanitizer watches where each piece ends
#else
constexpr int64_t kMostKept = 16 << 20;
#endif
constexpr int64_t kLeastKept = 128 << 10;
static std::atomic<void*> kept[4];
static std::atomic<unsigned> newest{0};

// A piece starts with its size.
constexpr int64_t kHeader = 64;
static int64_t& size_of(void* piece) { return *static_cast<int64_t*>(piece); }

static bool is_kept(int64_t bytes) { return bytes >= kLeastKept && bytes <= kMostKept; }

static void keep(void* piece) { std::free(kept[newest++ % std::size(kept)].exchange(piece)); }

// A piece of `bytes` or up to twice that, or null.
static void* take(int64_t bytes) {
    for (std::atomic<void*>& place : kept) {
        void* piece = place.exchange(nullptr);
        if (!piece) continue;
        if (size_of(piece) >= bytes && size_of(piece) <= 2 * bytes) return piece;
        std::free(place.exchange(piece));
    }
    return nullptr;
}

Scratch::Scratch(int64_t bytes) {
    const int64_t size = (bytes + 127) / 64 * 64;
    void* piece = is_kept(size) ? take(size) : nullptr;
    if (!piece) {
        piece = std::aligned_alloc(64, static_cast<size_t>(kHeader + size));
        if (!piece) throw std::bad_alloc();
        size_of(piece) = size;
    }
    data_ = static_cast<char*>(piece) + kHeader;
    if (poisoned.load(std::memory_order_relaxed)) std::memset(data_, 0xff, static_cast<size_t>(bytes));
}

Scratch::~Scratch() {
    void* piece = static_cast<char*>(data_) - kHeader;
    is_kept(size_of(piece)) ? keep(piece) : std::free(piece);
}

static std::atomic<bool> child{false};

#if defined(__unix__) || defined(__APPLE__)
// At load, not at the first call: torch may have started libgomp's team before, and the first call may be the child's.
[[maybe_unused]] static const int registered = pthread_atfork(nullptr, nullptr, [] { child.store(true); });
#endif

bool forked_child() { return child.load(std::memory_order_relaxed); }

}  // namespace fastattn
