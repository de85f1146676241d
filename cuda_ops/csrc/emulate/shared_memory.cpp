// emulate/shared_memory.cpp   see shared_memory.hpp
#include "shared_memory.hpp"

#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define EMULATE_ALLOW(begin, size) __asan_unpoison_memory_region(begin, size)
#define EMULATE_FORBID(begin, size) __asan_poison_memory_region(begin, size)
#else
#define EMULATE_ALLOW(begin, size)
#define EMULATE_FORBID(begin, size)
#endif

namespace emulate {
namespace {

constexpr std::size_t kAlignment = 128;
constexpr char kPoison = char(0xff);  // NaN in every float type

std::size_t aligned(std::size_t size) {
  return (size + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

SharedMemory::SharedMemory() : bytes_(static_cast<char*>(std::aligned_alloc(kAlignment, kMaxBytes))) {
  if (bytes_ == nullptr) throw std::bad_alloc();
}

SharedMemory::~SharedMemory() {
  EMULATE_ALLOW(bytes_, kMaxBytes);
  std::free(bytes_);
}

void SharedMemory::reset(std::size_t dynamic_bytes) {
  size_ = 0;
  cells_.clear();
  fixed_.clear();
  grow(dynamic_bytes);
}

// Statics are carved from the room behind the dynamic part; nothing moves.
void* SharedMemory::fixed(const void* tag, std::size_t size) {
  for (const Fixed& known : fixed_) {
    if (known.tag == tag) return bytes_ + known.offset;
  }
  const std::size_t begin = aligned(size_);
  grow(begin + size);
  fixed_.push_back({tag, begin});
  return bytes_ + begin;
}

void SharedMemory::grow(std::size_t size) {
  if (size > kMaxBytes) throw std::bad_alloc();
  EMULATE_ALLOW(bytes_, size);
  EMULATE_FORBID(bytes_ + size, kMaxBytes - size);
  std::memset(bytes_ + size_, kPoison, size - size_);
  size_ = size;
  cells_.resize((size + 1) / 2);
}

bool SharedMemory::fits(const void* address, std::size_t size) const {
  return contains(address) && offset(address) + size <= size_;
}

bool SharedMemory::unordered(const When& earlier, const When& now) {
  if (earlier.thread == kNobody || earlier.thread == now.thread) return false;
  if (earlier.block_epoch != now.block_epoch) return false;
  if (earlier.thread == kSeveralWarps) return true;
  const bool same_warp = (earlier.thread & kSeveralLanes)
                             ? (earlier.thread & ~kSeveralLanes) == now.thread / 32
                             : earlier.thread / 32 == now.thread / 32;
  return !same_warp || earlier.warp_epoch == now.warp_epoch;
}

void SharedMemory::add_reader(Cell& cell, const When& now) {
  const bool is_first = cell.reader.thread == kNobody || cell.reader.block_epoch != now.block_epoch;
  if (is_first || cell.reader.thread == now.thread) {
    cell.reader = now;
    return;
  }
  if (cell.reader.thread == kSeveralWarps) return;
  const std::uint32_t warp =
      cell.reader.thread & kSeveralLanes ? cell.reader.thread & ~kSeveralLanes : cell.reader.thread / 32;
  cell.reader.thread = warp == now.thread / 32 ? (kSeveralLanes | warp) : kSeveralWarps;
  cell.reader.warp_epoch = now.warp_epoch;
}

const char* SharedMemory::read(const void* address, std::size_t size, const When& now) {
  if (!fits(address, size)) return "reads past the end of shared memory";
  Cell* cell = first_cell(address);
  for (std::size_t i = num_cells(offset(address), size); i > 0; --i, ++cell) {
    if (cell->state == State::unwritten) return "reads shared memory that nobody has written";
    if (cell->state == State::in_flight)
      return "reads shared memory before the cp.async into it was waited for";
    if (unordered(cell->writer, now))
      return "reads shared memory that another thread wrote with no barrier between";
    add_reader(*cell, now);
  }
  return nullptr;
}

const char* SharedMemory::write(const void* address, std::size_t size, const When& now) {
  if (!fits(address, size)) return "writes past the end of shared memory";
  Cell* cell = first_cell(address);
  for (std::size_t i = num_cells(offset(address), size); i > 0; --i, ++cell) {
    if (cell->state == State::in_flight) return "writes shared memory while a cp.async into it is in flight";
    if (unordered(cell->writer, now))
      return "writes shared memory that another thread wrote with no barrier between";
    if (unordered(cell->reader, now))
      return "writes shared memory that another thread read with no barrier between";
    cell->writer = now;
    cell->state = State::written;
  }
  return nullptr;
}

const char* SharedMemory::start_copy(const void* address, std::size_t size, const When& now) {
  if (const char* wrong = write(address, size, now)) return wrong;
  Cell* cell = first_cell(address);
  for (std::size_t i = num_cells(offset(address), size); i > 0; --i, ++cell) cell->state = State::in_flight;
  return nullptr;
}

const char* SharedMemory::finish_copy(const void* address, std::size_t size, const When& now) {
  Cell* cell = first_cell(address);
  for (std::size_t i = num_cells(offset(address), size); i > 0; --i, ++cell) {
    cell->state = State::written;
    cell->writer = now;
  }
  return nullptr;
}

const char* SharedMemory::atomic(const void* address, std::size_t size, const When&) {
  if (!fits(address, size)) return "changes a value past the end of shared memory";
  Cell* cell = first_cell(address);
  for (std::size_t i = num_cells(offset(address), size); i > 0; --i, ++cell) {
    if (cell->state != State::written) return "changes shared memory that nobody has written";
  }
  return nullptr;
}

}  // namespace emulate
