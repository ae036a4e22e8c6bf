#include "pool.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>

#include "kernels.hpp"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(LIMBECK_X86)
#include <immintrin.h>
#endif

namespace limbeck {
namespace {

constexpr auto kSpinTime = std::chrono::microseconds(200);  // before a thread without work parks
constexpr int kSpinsBeforeYield = 4096;                     // at a barrier: another thread may need this processor

void pause() {
#if defined(LIMBECK_X86)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// What a thread is ended with where another one has failed.
struct OtherFailed {};

// The caller's own processors, which it has again when a run has ended.
class Borrowed {
 public:
    explicit Borrowed(bool wanted) : wanted_(wanted) {
#if defined(__linux__)
        if (wanted_) wanted_ = sched_getaffinity(0, sizeof before_, &before_) == 0;
#endif
    }
    ~Borrowed() {
#if defined(__linux__)
        if (wanted_) sched_setaffinity(0, sizeof before_, &before_);
#endif
    }

 private:
    bool wanted_;
#if defined(__linux__)
    cpu_set_t before_;
#endif
};

std::vector<int> allowed_processors() {
    std::vector<int> found;
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        for (int number = 0; number < CPU_SETSIZE; ++number) {
            if (CPU_ISSET(number, &set)) found.push_back(number);
        }
    }
#endif
    if (found.empty()) {
        for (unsigned number = 0; number < std::max(1u, std::thread::hardware_concurrency()); ++number) {
            found.push_back(int(number));
        }
    }
    return found;
}

// "0-3,8,10-11" as the kernel writes lists of processors.
std::vector<int> parse_list(const std::string& text) {
    std::vector<int> found;
    std::istringstream parts(text);
    for (std::string part; std::getline(parts, part, ',');) {
        int first = 0, last = 0;
        const int fields = std::sscanf(part.c_str(), "%d-%d", &first, &last);
        if (fields < 1) continue;
        for (int number = first; number <= (fields == 2 ? last : first); ++number) found.push_back(number);
    }
    return found;
}

}  // namespace

std::vector<std::vector<int>> processors_by_node() {
    const std::vector<int> allowed = allowed_processors();
    std::vector<std::vector<int>> nodes;
    for (int node = 0;; ++node) {
        std::ifstream file("/sys/devices/system/node/node" + std::to_string(node) + "/cpulist");
        std::string line;
        if (!file || !std::getline(file, line)) break;
        std::vector<int> here;
        for (int number : parse_list(line)) {
            if (std::find(allowed.begin(), allowed.end(), number) != allowed.end()) here.push_back(number);
        }
        if (!here.empty()) nodes.push_back(here);
    }
    if (nodes.empty()) nodes.push_back(allowed);
    return nodes;
}

Pool::Pool(int threads, Placement placement) {
    const std::vector<int> allowed = allowed_processors();
    threads_ = threads > 0 ? threads : int(allowed.size());
    if (placement.numa_aware) {  // neighbours in the order of work share a node, and with it the memory they touch
        const auto nodes = processors_by_node();
        for (int index = 0; index < threads_; ++index) {
            processors_.push_back(nodes[size_t(index) * nodes.size() / size_t(threads_)]);
        }
    } else if (placement.pin) {
        for (int index = 0; index < threads_; ++index) processors_.push_back({allowed[size_t(index) % allowed.size()]});
    }
    kernels();  // a level that this processor lacks shows here, and not on one thread of many
    try {
        for (int index = 1; index < threads_; ++index) others_.emplace_back([this, index] { loop(index); });
    } catch (const std::system_error& error) {
        stop();
        throw std::invalid_argument("of " + std::to_string(threads_) + " threads only " +
                                    std::to_string(others_.size() + 1) + " can be started (" + error.what() + ").");
    }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& other : others_) other.join();
}

void Pool::place(int index) const {
#if defined(__linux__)
    if (processors_.empty()) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int number : processors_[size_t(index)]) CPU_SET(number, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set,
                           &set);  // a place is a wish: failing it, the thread runs anywhere
#else
    (void)index;
#endif
}

void Pool::call(int index) {
    Worker worker(*this, index, threads_);
    try {
        (*work_)(worker);
    } catch (const OtherFailed&) {
    } catch (...) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
        failed_ = true;
    }
}

void Pool::loop(int index) {
    place(index);
    uint64_t seen = 0;
    for (;;) {
        const auto began = std::chrono::steady_clock::now();
        for (int spins = 1; generation_.load(std::memory_order_acquire) == seen && !stop_; ++spins) {
            pause();
            if (spins % 256 != 0 || std::chrono::steady_clock::now() - began < kSpinTime) continue;
            std::unique_lock<std::mutex> lock(mutex_);
            ++parked_;
            wake_.wait(lock, [&] { return generation_.load() != seen || stop_; });
            --parked_;
        }
        if (stop_) return;
        ++seen;
        call(index);
        finished_.fetch_add(1, std::memory_order_release);
    }
}

void Pool::run(const std::function<void(Worker&)>& work) {
    std::lock_guard<std::mutex> only(one_run_);
    const Borrowed borrowed(!processors_.empty());
    place(0);
    work_ = &work;
    finished_.store(0, std::memory_order_relaxed);
    generation_.fetch_add(1);
    if (parked_.load() > 0) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
        }  // a thread about to wait has looked at the generation before or after
        wake_.notify_all();
    }
    call(0);
    for (int spins = 1; finished_.load(std::memory_order_acquire) != threads_ - 1; ++spins) {
        pause();
        if (spins % kSpinsBeforeYield == 0) std::this_thread::yield();
    }
    arrived_ = 0;
    failed_ = false;
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Worker::barrier() {
    if (count_ == 1) return;
    const uint64_t phase = pool_.phase_.load(std::memory_order_acquire);
    if (pool_.failed_) throw OtherFailed();
    if (pool_.arrived_.fetch_add(1, std::memory_order_acq_rel) == count_ - 1) {
        pool_.arrived_.store(0, std::memory_order_relaxed);
        pool_.phase_.store(phase + 1, std::memory_order_release);
        return;
    }
    for (int spins = 1; pool_.phase_.load(std::memory_order_acquire) == phase; ++spins) {
        pause();
        if (pool_.failed_) throw OtherFailed();
        if (spins % kSpinsBeforeYield == 0) std::this_thread::yield();
    }
}

}  // namespace limbeck
