// A pool of threads that runs one function on all of them, with barriers inside.
//
// A token takes a fraction of a millisecond to a few, in some hundred steps: threads that slept between steps would
// wake too late. So they spin; only between two runs they park, after a while without work.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace limbeck {

class Pool;

// One thread's view of a run.
class Worker {
 public:
    Worker(Pool& pool, int index, int count) : pool_(pool), index_(index), count_(count) {}

    int index() const { return index_; }
    int count() const { return count_; }

    // Waits for all threads of the run; throws where one of them has failed.
    void barrier();

    // This thread's part [first, last) of n items, in one piece.
    std::pair<size_t, size_t> part(size_t n) const {
        return {n * size_t(index_) / size_t(count_), n * size_t(index_ + 1) / size_t(count_)};
    }

 private:
    Pool& pool_;
    int index_, count_;
};

struct Placement {
    bool pin = false;         // each thread stays on one processor
    bool numa_aware = false;  // threads are spread over the memory nodes, and stay there
};

class Pool {
 public:
    // threads: 0 is one for each processor that this process may use.
    explicit Pool(int threads = 0, Placement placement = {});
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return threads_; }

    // Calls work once on every thread; the first exception of any of them is thrown here, and ends the others at
    // their next barrier.
    void run(const std::function<void(Worker&)>& work);

 private:
    friend class Worker;
    void loop(int index);
    void call(int index);
    void place(int index) const;
    void stop();

    int threads_;
    std::vector<std::vector<int>> processors_;  // of each thread; empty where threads are not pinned
    std::vector<std::thread> others_;
    std::mutex one_run_;
    const std::function<void(Worker&)>* work_ = nullptr;
    alignas(64) std::atomic<uint64_t> generation_{0};
    alignas(64) std::atomic<int> finished_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint64_t> phase_{0};
    std::atomic<int> parked_{0};
    std::atomic<bool> stop_{false}, failed_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::exception_ptr error_;
};

// The processors of each memory node that this process may use; one list of all where the system does not say.
std::vector<std::vector<int>> processors_by_node();

}  // namespace limbeck
