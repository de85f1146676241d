// common/thread_pool.h   Run numbered tasks on a fixed set of threads.
//
// Tasks are handed out from a counter, so a thread whose core is busy takes fewer of them and nobody waits
// for it in a spin. Which thread runs a task never changes what the task computes.
//
//   parallel_for       one by one, for tasks that may differ in size
//   parallel_in_runs   for equal tasks whose memory is side by side: a run of them is one stream to the
//                      prefetchers, which start anew at every jump (two cores of an EPYC, Zen 4, 2026-11-23:
//                      int4 panels at 36 GB/s in tasks of 90 KB one by one, at 47 GB/s in long runs)

#pragma once

#include <cstdint>
#include <type_traits>

namespace octet {

// Threads that share the work, the caller included. At least 1; 1 runs everything inline.
void set_num_threads(int num_threads);
int num_threads();

enum class HandOut { singly, in_runs };

using TaskBody = void (*)(void* context, int64_t task);
void run_tasks(int64_t num_tasks, HandOut how, TaskBody body, void* context);

template <class Body>
void hand_out(int64_t num_tasks, HandOut how, Body&& body) {
  if (num_tasks <= 1 || num_threads() == 1) {
    for (int64_t task = 0; task < num_tasks; ++task) body(task);
    return;
  }
  using Plain = std::remove_reference_t<Body>;
  run_tasks(
      num_tasks, how, [](void* context, int64_t task) { (*static_cast<Plain*>(context))(task); },
      (void*)&body);
}

// Calls body(task) once for every task in [0, num_tasks), returns when all are done.
template <class Body>
void parallel_for(int64_t num_tasks, Body&& body) {
  hand_out(num_tasks, HandOut::singly, body);
}

// The same; a thread takes its share of half of what is left at once, in the end single tasks.
template <class Body>
void parallel_in_runs(int64_t num_tasks, Body&& body) {
  hand_out(num_tasks, HandOut::in_runs, body);
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
