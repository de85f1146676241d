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

using RunBody = void (*)(void* context, int64_t begin, int64_t end);
void hand_out(int64_t num_tasks, HandOut how, RunBody body, void* context);

// Calls body(begin, end) for runs that hold every task in [0, num_tasks) once, returns when all are done. A
// thread takes its share of three quarters of what is left at once, in the end single tasks. (Of seven
// eighths a decode step is 1 % faster alone and 5 % slower beside a process on one of two cores; Zen 4,
// 2026-11-30.)
template <class Body>
void parallel_in_runs(int64_t num_tasks, Body&& body, HandOut how = HandOut::in_runs) {
  if (num_tasks <= 0) return;
  if (num_tasks == 1 || num_threads() == 1) return body(0, num_tasks);
  using Plain = std::remove_reference_t<Body>;
  hand_out(
      num_tasks, how,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<Plain*>(context))(begin, end); },
      (void*)&body);
}

// Calls body(task) once for every task in [0, num_tasks), returns when all are done.
template <class Body>
void parallel_for(int64_t num_tasks, Body&& body) {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(task);
  };
  parallel_in_runs(num_tasks, run, HandOut::singly);
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
