// Fibers on one host thread; a switch is six registers and a stack pointer (x86-64, System V).
#include "machine.h"

#include <sys/mman.h>

#include <map>
#include <stdexcept>

extern "C" void emulator_switch(void** save, void* to);
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, .-emulator_switch
)");

namespace emulator {
namespace {

constexpr size_t kStack = 256 << 10, kPage = 4096;
constexpr int kMaxThreads = 1024;
constexpr size_t kMostShared = 227 << 10;  // of compute capability 9.0

struct Meeting {
    const char* what = nullptr;
    int arrived = 0;
    std::vector<void*> slot;
};

struct Thread {
    void* stack_pointer = nullptr;
    bool done = false;
    const char* waits_at = nullptr;
    Group group{0, 0};
    std::function<bool()> condition;
};

struct Block {
    int64_t index = 0;
    int done = 0;
    std::vector<Thread> threads;
    std::vector<Meeting> warps;
    std::map<std::pair<int, int>, Meeting> others;
    std::vector<char> shared;
    char* shared_start = nullptr;
    size_t shared_size = 0;
    std::vector<std::function<void()>> landing;
    States states;
    uint64_t ready[kMaxThreads / 64] = {};
};

Block* the_block = nullptr;
int the_thread = 0;
int64_t the_grid = 0;
bool highest_first = false;
int64_t bank_conflicts = 0;
int processor_shared_memory = 228 << 10;
void* main_stack_pointer = nullptr;
std::string error;
const std::function<void()>* the_body = nullptr;

void set_ready(int thread) { the_block->ready[thread / 64] |= uint64_t{1} << thread % 64; }

int take_ready() {
    const int words = (block_threads() + 63) / 64;
    for (int n = 0; n < words; ++n) {
        const int w = highest_first ? words - 1 - n : n;
        uint64_t& word = the_block->ready[w];
        if (!word) continue;
        const int bit = highest_first ? 63 - __builtin_clzll(word) : __builtin_ctzll(word);
        word &= ~(uint64_t{1} << bit);
        return w * 64 + bit;
    }
    return -1;
}

Meeting& meeting(Group group) {
    return group.count == 32 ? the_block->warps[group.first / 32] : the_block->others[{group.first, group.count}];
}

std::string deadlock() {
    std::string text = "no thread can go on:";
    for (int t = 0; t < block_threads();) {
        const Thread& first = the_block->threads[t];
        const auto same = [&](const Thread& x) {
            return x.done ? first.done
                          : !first.done && x.waits_at == first.waits_at && x.group.first == first.group.first &&
                                x.group.count == first.group.count;
        };
        int last = t;
        while (last + 1 < block_threads() && same(the_block->threads[last + 1])) ++last;
        text += " threads " + std::to_string(t) + "-" + std::to_string(last);
        text += first.done ? " have ended;" : std::string(" wait at ") + first.waits_at;
        if (!first.done && first.group.count)
            text += " for threads " + std::to_string(first.group.first) + "-" +
                    std::to_string(first.group.first + first.group.count - 1) + ";";
        else if (!first.done)
            text += ";";
        t = last + 1;
    }
    return text;
}

bool poll() {
    bool any = false;
    for (int t = 0; t < block_threads(); ++t) {
        Thread& thread = the_block->threads[t];
        if (!thread.condition || !thread.condition()) continue;
        thread.condition = nullptr;
        set_ready(t);
        any = true;
    }
    return any;
}

// Leaves the running thread, whose state is saved at `save`, for whoever can run, or for the host.
void go_on(void** save) {
    int next = take_ready();
    while (next < 0 && the_block->done < block_threads()) {
        if (!poll()) {
            if (the_block->landing.empty()) fail(deadlock());
            const auto land = the_block->landing.front();
            the_block->landing.erase(the_block->landing.begin());
            land();
        }
        next = take_ready();
    }
    if (next == the_thread && save == &the_block->threads[next].stack_pointer) return;
    if (next >= 0) the_thread = next;
    emulator_switch(save, next >= 0 ? the_block->threads[next].stack_pointer : main_stack_pointer);
}

void wait_here() { go_on(&the_block->threads[the_thread].stack_pointer); }

void fiber() {
    std::string thrown;
    try {
        (*the_body)();
    } catch (const std::exception& e) {
        thrown = e.what();
    }
    if (!thrown.empty()) fail(thrown);
    Thread& thread = the_block->threads[the_thread];
    thread.done = true;
    ++the_block->done;
    go_on(&thread.stack_pointer);
}

char* stack_of(int thread) {
    static char* all = nullptr;
    if (!all) {
        void* p = mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) throw std::runtime_error("no memory for the emulator's stacks");
        all = static_cast<char*>(p);
        for (int t = 0; t < kMaxThreads; ++t) mprotect(all + t * kStack, kPage, PROT_NONE);
    }
    return all + thread * kStack;
}

void run_block(int64_t index, int threads, size_t bytes) {
    Block block;
    block.index = index;
    block.threads.resize(threads);
    block.warps.resize((threads + 31) / 32);
    block.shared.assign(bytes + 2048, char(0xFF));
    const auto start = reinterpret_cast<uintptr_t>(block.shared.data());
    block.shared_start = reinterpret_cast<char*>((start + 1023) / 1024 * 1024);
    block.shared_size = bytes;
    the_block = &block;
    for (int t = 0; t < threads; ++t) {
        // As emulator_switch leaves a stack: six registers and where to go on; a function starts 8 bytes off a 16.
        // Tops at different places of their pages: else all stacks share a few lines of the cache.
        void** top = reinterpret_cast<void**>(stack_of(t) + kStack - t % 32 * 512) - 1;
        top[-1] = reinterpret_cast<void*>(&fiber);
        block.threads[t].stack_pointer = top - 7;
        set_ready(t);
    }
    the_thread = take_ready();
    emulator_switch(&main_stack_pointer, block.threads[the_thread].stack_pointer);
    the_block = nullptr;
}

}  // namespace

int thread_index() { return the_thread; }
int block_threads() { return static_cast<int>(the_block->threads.size()); }
int64_t block_index() { return the_block->index; }
int64_t grid_blocks() { return the_grid; }
States& block_states() { return the_block->states; }

size_t new_state() {
    static size_t count = 0;
    return count++;
}

void fail(const std::string& what) {
    error = "block " + std::to_string(the_block->index) + ", thread " + std::to_string(the_thread) + ": " + what;
    void* lost;
    emulator_switch(&lost, main_stack_pointer);
    __builtin_unreachable();
}

char* shared_bytes(uint32_t address, size_t bytes, size_t alignment, const char* what) {
    const size_t at = size_t{address} - kSharedBase;
    if (address < kSharedBase || at + bytes > the_block->shared_size)
        fail(std::string(what) + ": " + std::to_string(bytes) + " bytes at shared address " + std::to_string(address) +
             " of " + std::to_string(the_block->shared_size) + " bytes from " + std::to_string(kSharedBase));
    if (address % alignment)
        fail(std::string(what) + ": shared address " + std::to_string(address) + " is not a multiple of " +
             std::to_string(alignment));
    return the_block->shared_start + at;
}

void count_bank_conflict() { ++bank_conflicts; }
int shared_memory_of_processor() { return processor_shared_memory; }

bool arrive(const char* what, Group group, void* slot) {
    if (group.first + group.count > block_threads()) fail(std::string(what) + ": the block has too few threads");
    Meeting& here = meeting(group);
    if (here.slot.empty()) here.slot.resize(group.count);
    if (here.arrived == 0) here.what = what;
    if (std::strcmp(here.what, what) != 0)
        fail(std::string("at ") + what + " while others of its group are at " + here.what);
    here.slot[the_thread - group.first] = slot;
    if (++here.arrived == group.count) return true;
    Thread& thread = the_block->threads[the_thread];
    thread.waits_at = what;
    thread.group = group;
    wait_here();
    return false;
}

void** slots(Group group) { return meeting(group).slot.data(); }

void release(Group group) {
    meeting(group).arrived = 0;
    for (int t = group.first; t < group.first + group.count; ++t)
        if (t != the_thread) set_ready(t);
}

void wait_until(const char* what, std::function<bool()> condition) {
    if (condition()) return;
    Thread& thread = the_block->threads[the_thread];
    thread.waits_at = what;
    thread.group = {0, 0};
    thread.condition = std::move(condition);
    wait_here();
}

void land_later(std::function<void()> action) { the_block->landing.push_back(std::move(action)); }

void run(const char* kernel, int64_t blocks, int threads, size_t bytes, const std::function<void()>& body) {
    if (threads < 1 || threads > kMaxThreads || threads % 32)
        throw std::runtime_error(std::string(kernel) + ": " + std::to_string(threads) + " threads a block");
    if (bytes > kMostShared)
        throw std::runtime_error(std::string(kernel) + ": " + std::to_string(bytes) + " bytes of shared memory");
    error.clear();
    the_grid = blocks;
    the_body = &body;
    for (int64_t index = 0; index < blocks && error.empty(); ++index) run_block(index, threads, bytes);
    if (!error.empty()) throw std::runtime_error(std::string(kernel) + ", " + error);
}

}  // namespace emulator

EMULATOR_EXPORT void emulator_set_order(int highest) { emulator::highest_first = highest != 0; }
EMULATOR_EXPORT int64_t emulator_bank_conflicts() { return emulator::bank_conflicts; }
EMULATOR_EXPORT void emulator_set_shared_memory(int bytes) { emulator::processor_shared_memory = bytes; }
