// emulate/launch.cpp   Runs the blocks of a grid, on one OS thread or several
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>

#include "device.hpp"
#include "memory.hpp"

namespace emulate {

const void* share_buffers();
void adopt_buffers(const void* shared);

namespace {

thread_local std::string last_report;

// Blocks keep the stacks of their threads, so they are lent out again and again.
class BlockPool {
 public:
  std::unique_ptr<Block> take() {
    std::lock_guard lock(mutex_);
    if (free_.empty()) return std::make_unique<Block>();
    auto block = std::move(free_.back());
    free_.pop_back();
    return block;
  }
  void give_back(std::unique_ptr<Block> block) {
    std::lock_guard lock(mutex_);
    free_.push_back(std::move(block));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Block>> free_;
};

BlockPool& pool() {
  static BlockPool blocks;
  return blocks;
}

unsigned num_os_threads(std::size_t num_blocks) {
  const char* asked = std::getenv("OCTET_EMULATOR_THREADS");
  const unsigned limit = asked ? std::max(1, std::atoi(asked)) : 1;
  return unsigned(std::min<std::size_t>(limit, num_blocks));
}

}  // namespace

bool run_grid(const Grid& grid, const Body& body) {
  const std::size_t num_blocks = std::size_t(grid.grid.x) * grid.grid.y * grid.grid.z;
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::string report;
  const void* buffers = share_buffers();
  auto work = [&] {
    adopt_buffers(buffers);
    auto block = pool().take();
    for (std::size_t i = next++; i < num_blocks; i = next++) {
      const Index3 index{unsigned(i % grid.grid.x), unsigned(i / grid.grid.x % grid.grid.y),
                         unsigned(i / (std::size_t(grid.grid.x) * grid.grid.y))};
      std::string wrong = block->run(grid, index, body);
      if (wrong.empty()) continue;
      next = num_blocks;
      std::lock_guard lock(mutex);
      if (report.empty()) report = wrong;
    }
    pool().give_back(std::move(block));
  };
  std::vector<std::thread> helpers;
  for (unsigned i = 1; i < num_os_threads(num_blocks); ++i) helpers.emplace_back(work);
  work();
  for (auto& helper : helpers) helper.join();
  if (!report.empty()) last_report = report;
  return report.empty();
}

}  // namespace emulate

extern "C" {

__attribute__((visibility("default"))) void octet_emulator_register(const void* begin, std::size_t size) {
  emulate::register_buffer(begin, size);
}

__attribute__((visibility("default"))) void octet_emulator_forget() {
  emulate::forget_buffers();
  emulate::last_report.clear();
}

// What went wrong in the latest launch of this OS thread that failed; empty if none did.
__attribute__((visibility("default"))) const char* octet_emulator_report() {
  return emulate::last_report.c_str();
}
}
