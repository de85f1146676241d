// cpu/shared_memory_group.cc   Collectives between ranks that share a machine, and often its cores.
//
//   all_reduce  x = sum over ranks, added in rank order in fp32 and rounded once: the same bits everywhere
//
//   bytes   small messages: each rank writes its part and reads all; one meeting
//           large ones: each rank sums its share of every chunk; two meetings per chunk
//   map     a slot per rank, twice: the next call writes the other half while slow ranks still read this one
//   needs   the same calls with the same sizes in the same order on every rank (checked)
//   waits   a futex: eight ranks on two cores must sleep, not spin
//
// A meeting is over when the last rank arrives; every rank says how many it has entered, so the ones that are
// missing at the deadline can be named.

#include "../include/shared_memory_group.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstring>
#include <thread>

#include "../common/vec_math.h"

namespace octet::cpu {
namespace {

constexpr int kMaxRanks = 64;
constexpr int64_t kSlotBytes = 256 * 1024;  // of one rank in one half; larger messages go in chunks
constexpr int64_t kSmallBytes = 16 * 1024;  // up to here every rank sums everything

enum class Call : uint32_t { open, all_reduce, all_gather, broadcast, barrier };

const char* name_of(Call call) {
  static const char* const names[] = {"open", "all_reduce", "all_gather", "broadcast", "barrier"};
  return names[uint32_t(call) % 5];
}

struct Announcement {
  Call call;
  int64_t bytes;
};

struct alignas(64) RankLine {
  std::atomic<uint64_t> meetings;  // entered so far
  Announcement said[2];            // what this rank called, per half
};

// The start of the mapping; a fresh file's zeros are its initial state.
struct Header {
  alignas(64) std::atomic<uint32_t> arrived;     // ranks inside the current meeting
  alignas(64) std::atomic<uint32_t> generation;  // meetings completed; the futex word
  alignas(64) std::atomic<uint32_t> aborted_by;  // rank + 1
  RankLine ranks[kMaxRanks];
};

int64_t mapping_bytes(int world_size) {
  return int64_t(sizeof(Header)) + 2 * (world_size + 1) * kSlotBytes;
}

void wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void sleep_while(std::atomic<uint32_t>& word, uint32_t value, std::chrono::nanoseconds at_most) {
  timespec time{};
  time.tv_sec = at_most.count() / 1000000000;
  time.tv_nsec = at_most.count() % 1000000000;
  syscall(SYS_futex, &word, FUTEX_WAIT, value, &time, nullptr, 0);
}

std::string system_words(const std::string& doing, const std::string& path) {
  return "cannot " + doing + " " + path + ": " + std::strerror(errno);
}

// A mapped file, unmapped at the end.
class Mapping {
 public:
  Mapping(const std::string& path, int64_t bytes) : bytes_(bytes) {
    const int file = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0) throw GroupError(system_words("open", path));
    struct stat status{};
    if (fstat(file, &status) == 0 && status.st_size != 0 && status.st_size != bytes) {
      ::close(file);
      throw GroupError(path + " was made for another number of ranks: give each group a fresh path");
    }
    const bool is_sized = ftruncate(file, bytes) == 0;
    void* at =
        is_sized ? mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0) : MAP_FAILED;
    const std::string words = at == MAP_FAILED ? system_words("map", path) : "";
    ::close(file);
    if (at == MAP_FAILED) throw GroupError(words);
    data_ = static_cast<char*>(at);
  }
  Mapping(const Mapping&) = delete;
  ~Mapping() { munmap(data_, size_t(bytes_)); }

  char* data() const { return data_; }

 private:
  const int64_t bytes_;
  char* data_;
};

class Group final : public SharedMemoryGroup {
 public:
  Group(const std::string& path, int rank, int world_size, double timeout)
      : mapping_(path, mapping_bytes(world_size)),
        header_(reinterpret_cast<Header*>(mapping_.data())),
        rank_(rank),
        world_(world_size),
        timeout_(int64_t(timeout * 1e9)),
        spins_(world_size <= int(std::thread::hardware_concurrency()) ? 2000 : 20) {
    meet(Call::open, world_size);
    if (rank == 0) ::unlink(path.c_str());  // all have mapped it: nothing stays behind, whatever happens
  }

  int64_t world_size() const override { return world_; }

  void barrier() override { meet(Call::barrier, 0); }

  void all_reduce(DType type, void* x, int64_t size) override {
    const int64_t width = type == DType::bfloat16 ? 2 : 4, bytes = size * width;
    for (int64_t done = 0; done < bytes; done += kSlotBytes) {
      const int64_t part = std::min(kSlotBytes, bytes - done);
      char* at = static_cast<char*>(x) + done;
      std::memcpy(slot(rank_), at, size_t(part));
      if (bytes <= kSmallBytes) {
        const int half = meet(Call::all_reduce, bytes);
        with_type(type, [&](auto t) { sum_ranks<decltype(t)>(half, 0, part / width, at); });
      } else {
        reduce_shared(type, part / width, bytes, at);
      }
    }
  }

  void all_gather(const void* x, int64_t bytes, void* out) override {
    for (int64_t done = 0; done < bytes; done += kSlotBytes) {
      const int64_t part = std::min(kSlotBytes, bytes - done);
      std::memcpy(slot(rank_), static_cast<const char*>(x) + done, size_t(part));
      const int half = meet(Call::all_gather, bytes);
      for (int r = 0; r < world_; ++r) {
        std::memcpy(static_cast<char*>(out) + r * bytes + done, slot(r, half), size_t(part));
      }
    }
  }

  void broadcast(void* x, int64_t bytes, int64_t root) override {
    for (int64_t done = 0; done < bytes; done += kSlotBytes) {
      const int64_t part = std::min(kSlotBytes, bytes - done);
      char* at = static_cast<char*>(x) + done;
      if (rank_ == root) std::memcpy(slot(rank_), at, size_t(part));
      const int half = meet(Call::broadcast, bytes);
      if (rank_ != root) std::memcpy(at, slot(int(root), half), size_t(part));
    }
  }

  void abort() override {
    uint32_t none = 0;
    header_->aborted_by.compare_exchange_strong(none, uint32_t(rank_ + 1));
    wake_all(header_->generation);
  }

 private:
  // Slot `world_` of each half holds the sums of a large message.
  char* slot(int rank, int half) const {
    return mapping_.data() + sizeof(Header) + (half * (world_ + 1) + rank) * kSlotBytes;
  }
  char* slot(int rank) const { return slot(rank, half_); }

  // out = ranks' slots [begin, end) added in rank order
  template <class T>
  void sum_ranks(int half, int64_t begin, int64_t end, void* out) const {
    by_sixteen(end - begin, [&](int64_t i, int64_t n) {
      F32x16 total = load_upto((const T*)slot(0, half) + begin + i, n);
      for (int r = 1; r < world_; ++r) total = total + load_upto((const T*)slot(r, half) + begin + i, n);
      store_upto((T*)out + begin + i, total, n);
    });
  }

  // Each rank sums its share of the chunk into the common slot; then all copy the whole.
  void reduce_shared(DType type, int64_t size, int64_t bytes, void* out) {
    const int half = meet(Call::all_reduce, bytes);
    const int64_t share = ceil_div(ceil_div(size, world_), 64) * 64;
    const int64_t begin = std::min(size, rank_ * share), end = std::min(size, begin + share);
    char* sums = slot(world_, half);
    with_type(type, [&](auto t) {
      sum_ranks<decltype(t)>(half, begin, end, sums);
      meet(Call::all_reduce, bytes);
      std::memcpy(out, sums, size_t(size) * sizeof(t));
    });
  }

  // Returns, with everyone's slot of the returned half readable, when all ranks have come.
  int meet(Call call, int64_t bytes) {
    const int half = half_;
    half_ ^= 1;
    RankLine& mine = header_->ranks[rank_];
    mine.said[half] = {call, bytes};
    mine.meetings.store(++meetings_, std::memory_order_release);
    const uint32_t generation = header_->generation.load(std::memory_order_acquire);
    if (header_->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == uint32_t(world_)) {
      header_->arrived.store(0, std::memory_order_relaxed);
      header_->generation.store(generation + 1, std::memory_order_release);
      wake_all(header_->generation);
    } else {
      wait_past(generation, call);
    }
    compare_calls(half, call, bytes);
    return half;
  }

  void wait_past(uint32_t generation, Call call) {
    const auto is_over = [&] { return header_->generation.load(std::memory_order_acquire) != generation; };
    for (int i = 0; i < spins_; ++i) {
      if (is_over()) return;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    const auto deadline = std::chrono::steady_clock::now() + timeout_;
    while (!is_over()) {
      if (const uint32_t who = header_->aborted_by.load()) {
        throw GroupError("rank " + std::to_string(who - 1) + " gave up while rank " + std::to_string(rank_) +
                         " waited in " + name_of(call));
      }
      const auto left = deadline - std::chrono::steady_clock::now();
      if (left <= left.zero()) fail_for_missing(call);
      sleep_while(header_->generation, generation, left);
    }
  }

  [[noreturn]] void fail_for_missing(Call call) {
    std::string missing;
    for (int r = 0; r < world_; ++r) {
      if (header_->ranks[r].meetings.load(std::memory_order_acquire) >= meetings_) continue;
      missing += (missing.empty() ? "" : ", ") + std::to_string(r);
    }
    abort();
    char seconds[32];
    std::snprintf(seconds, sizeof(seconds), "%g", double(timeout_.count()) / 1e9);
    throw GroupError("rank " + missing + " did not join " + name_of(call) + " within " + seconds + " s");
  }

  void compare_calls(int half, Call call, int64_t bytes) const {
    for (int r = 0; r < world_; ++r) {
      const Announcement& said = header_->ranks[r].said[half];
      if (said.call == call && said.bytes == bytes) continue;
      throw GroupError("rank " + std::to_string(r) + " called " + name_of(said.call) + " of " +
                       std::to_string(said.bytes) + " bytes while rank " + std::to_string(rank_) +
                       " called " + name_of(call) + " of " + std::to_string(bytes) + " bytes");
    }
  }

  const Mapping mapping_;
  Header* const header_;
  const int rank_, world_;
  const std::chrono::nanoseconds timeout_;
  const int spins_;  // looks at the generation before sleeping; more where every rank has its own core
  int half_ = 0;
  uint64_t meetings_ = 0;
};

}  // namespace

std::unique_ptr<SharedMemoryGroup> open_group(const std::string& path, int rank, int world_size,
                                              double timeout) {
  if (world_size < 1 || world_size > kMaxRanks) {
    throw GroupError("world_size must be 1 to " + std::to_string(kMaxRanks));
  }
  if (rank < 0 || rank >= world_size) throw GroupError("rank must lie in [0, world_size)");
  return std::make_unique<Group>(path, rank, world_size, timeout);
}

}  // namespace octet::cpu
