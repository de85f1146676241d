// common/scratch.h   Working memory that a thread keeps between calls.
//
// Each named use has its own slot, so two uses in one call never share memory. Slots only grow.

#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace octet {

enum class Slot {
  activations,  // x in the form of the dot products
  row_pointers,
  panel,  // dequantised or turned weight rows
  panel_scales,
  wide_panel,  // int4 panels as bytes
  outputs,     // a tile of products before rounding
  keys,
  values,
  scores,
  accumulators,
  partials,
  experts,
  hidden,
  sampling,
  weights,
  draws,
  stretches,
  history,
  count,
};

class ScratchBuffer {
 public:
  void* at_least(size_t bytes) {
    if (bytes > size_) {
      const size_t rounded = (bytes + 4095) / 4096 * 4096;
      void* grown = std::aligned_alloc(64, rounded);
      if (!grown) throw std::bad_alloc();
      data_.reset(grown);
      size_ = rounded;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t size_ = 0;
};

// `count` uninitialised elements, 64-byte aligned, valid until this thread asks for the slot again.
template <class T>
T* scratch(Slot slot, size_t count) {
  thread_local ScratchBuffer buffers[size_t(Slot::count)];
  return static_cast<T*>(buffers[size_t(slot)].at_least(count * sizeof(T)));
}

}  // namespace octet
