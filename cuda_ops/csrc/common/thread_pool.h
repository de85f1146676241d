// common/thread_pool.h   Run numbered tasks on a fixed set of threads.
//
// Tasks are handed out one by one from a counter, so a thread whose core is busy takes fewer of them and
// nobody waits for it in a spin. Which thread runs a task never changes what the task computes.

#pragma once

#include <cstdint>
#include <type_traits>

namespace octet {

// Threads that share the work, the caller included. At least 1; 1 runs everything inline.
void set_num_threads(int num_threads);
int num_threads();

using TaskBody = void (*)(void* context, int64_t task);
void run_tasks(int64_t num_tasks, TaskBody body, void* context);

// Calls body(task) once for every task in [0, num_tasks), returns when all are done.
template <class Body>
void parallel_for(int64_t num_tasks, Body&& body) {
  if (num_tasks <= 1 || num_threads() == 1) {
    for (int64_t task = 0; task < num_tasks; ++task) body(task);
    return;
  }
  using Plain = std::remove_reference_t<Body>;
  run_tasks(
      num_tasks, [](void* context, int64_t task) { (*static_cast<Plain*>(context))(task); }, (void*)&body);
}

// Calls body(begin, end) over slices of [0, size), each of at least `grain` elements where size allows.
template <class Body>
void parallel_slices(int64_t size, int64_t grain, Body&& body) {
  const int64_t slice = size / (4 * num_threads()) + 1 > grain ? size / (4 * num_threads()) + 1 : grain;
  parallel_for((size + slice - 1) / slice, [&](int64_t task) {
    const int64_t begin = task * slice;
    body(begin, begin + slice < size ? begin + slice : size);
  });
}

}  // namespace octet
