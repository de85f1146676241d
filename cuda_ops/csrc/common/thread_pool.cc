// common/thread_pool.cc   Threads that sleep on a condition variable between calls.
//
// A waiting thread looks a while before it sleeps: consecutive ops of a layer come tens of microseconds
// apart, and a wake-up costs as much again (a decode step of some fifty ops lost a tenth to them). After the
// first microseconds it offers its core at every look, so that ranks and other processes that share the cores
// get on; a thread that is late takes fewer tasks.

#include "thread_pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace octet {
namespace {

constexpr int kSpins = 200;                           // some microseconds
constexpr std::chrono::microseconds kPatience{1000};  // a server's next step comes sooner

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Whether is_done() came true before the thread had better sleep.
template <class Done>
bool wait_awake(Done is_done) {
  for (int i = 0; i < kSpins; ++i) {
    if (is_done()) return true;
    relax();
  }
  const auto end = std::chrono::steady_clock::now() + kPatience;
  while (std::chrono::steady_clock::now() < end) {
    if (is_done()) return true;
    std::this_thread::yield();
  }
  return is_done();
}

class Pool {
 public:
  ~Pool() { stop(); }

  int size() const { return size_.load(std::memory_order_relaxed); }

  void resize(int num_threads) {
    std::lock_guard<std::mutex> one_caller(caller_);
    if (num_threads == size()) return;
    stop();
    size_ = num_threads;
    for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this] { work(); });
  }

  // A task that calls this again, or a second caller (another Python thread), works inline.
  void run(int64_t num_tasks, HandOut how, RunBody body, void* context) {
    std::unique_lock<std::mutex> one_caller(caller_, std::defer_lock);
    if (is_inside_ || !one_caller.try_lock()) return body(context, 0, num_tasks);
    open_round(num_tasks, how, body, context);
    is_inside_ = true;
    take_tasks();
    is_inside_ = false;
    close_round();
  }

 private:
  void open_round(int64_t num_tasks, HandOut how, RunBody body, void* context) {
    how_ = how;
    body_ = body;
    context_ = context;
    num_tasks_ = num_tasks;
    next_task_ = 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      is_open_ = true;
      round_.fetch_add(1, std::memory_order_release);
      if (num_asleep_ == 0) return;
    }
    start_.notify_all();
  }

  // A thread that has not joined by now stays out: with the counter used up there is nothing left for it.
  void close_round() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      is_open_ = false;
    }
    const auto is_done = [this] { return num_inside_.load(std::memory_order_acquire) == 0; };
    if (wait_awake(is_done)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, is_done);
  }

  void take_tasks() {
    int64_t first = next_task_.load(std::memory_order_relaxed);
    while (first < num_tasks_) {
      const int64_t share = how_ == HandOut::singly ? 1 : 3 * (num_tasks_ - first) / (4 * size());
      const int64_t end = first + (share > 1 ? share : 1);
      if (!next_task_.compare_exchange_weak(first, end, std::memory_order_relaxed)) continue;
      body_(context_, first, end);
      first = next_task_.load(std::memory_order_relaxed);
    }
  }

  void work() {
    is_inside_ = true;
    uint64_t seen = 0;
    while (wait_for_round(seen)) {
      take_tasks();
      std::lock_guard<std::mutex> lock(mutex_);
      if (num_inside_.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
    }
  }

  // True when this thread has joined a round it has not seen; false when the pool stops.
  bool wait_for_round(uint64_t& seen) {
    for (;;) {
      const auto is_new = [&] { return stops_ || round_.load(std::memory_order_acquire) != seen; };
      const bool is_awake = wait_awake(is_new);
      std::unique_lock<std::mutex> lock(mutex_);
      if (!is_awake) {
        ++num_asleep_;
        start_.wait(lock, is_new);
        --num_asleep_;
      }
      if (stops_) return false;
      seen = round_.load(std::memory_order_relaxed);
      if (!is_open_) continue;
      num_inside_.fetch_add(1, std::memory_order_relaxed);
      return true;
    }
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stops_ = true;
    }
    start_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
    stops_ = false;
    size_ = 1;
  }

  static thread_local bool is_inside_;  // this thread is running a task

  std::atomic<int> size_{1};
  std::vector<std::thread> threads_;
  std::mutex caller_;  // held by the one caller whose tasks run

  std::mutex mutex_;  // guards changes of the fields below
  std::condition_variable start_, done_;
  bool is_open_ = false;
  std::atomic<bool> stops_{false};
  int num_asleep_ = 0;
  std::atomic<int> num_inside_{0};
  std::atomic<uint64_t> round_{0};

  HandOut how_ = HandOut::singly;
  RunBody body_ = nullptr;
  void* context_ = nullptr;
  int64_t num_tasks_ = 0;
  std::atomic<int64_t> next_task_{0};
};

thread_local bool Pool::is_inside_ = false;

Pool& pool() {
  static Pool* const instance = new Pool;  // never destroyed: its threads may outlive static destructors
  return *instance;
}

}  // namespace

void set_num_threads(int num_threads) {
  pool().resize(num_threads < 1 ? 1 : num_threads);
}
int num_threads() {
  return pool().size();
}
void hand_out(int64_t num_tasks, HandOut how, RunBody body, void* context) {
  pool().run(num_tasks, how, body, context);
}

}  // namespace octet
