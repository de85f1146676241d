// emulate/profile.cpp   see profile.hpp
#include "profile.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <set>
#include <tuple>

namespace emulate {
namespace {

std::atomic<bool> is_profiling{false};
std::mutex published_mutex;
std::string published;

// One instruction's accesses in one turn of the warp.
using Request = std::vector<std::pair<int, const Access*>>;  // (lane, access)

Cost cost_of_shared(const Request& request) {
  const std::uint32_t size = request.front().second->size;
  const int lanes_at_once = size <= 4 ? 32 : size == 8 ? 16 : 8;
  Cost total;
  total.requests = 1;
  for (int first = 0; first < 32; first += lanes_at_once) {
    std::set<std::uintptr_t> words;
    for (const auto& [lane, access] : request) {
      if (lane < first || lane >= first + lanes_at_once) continue;
      for (std::uintptr_t byte = access->address; byte < access->address + access->size; ++byte)
        words.insert(byte / 4);
    }
    if (words.empty()) continue;
    int in_bank[32] = {};
    for (std::uintptr_t word : words) ++in_bank[word % 32];
    total.cost += std::uint64_t(*std::max_element(in_bank, in_bank + 32));
    total.least += (words.size() + 31) / 32;
  }
  return total;
}

Cost cost_of_global(const Request& request) {
  std::set<std::uintptr_t> sectors, words;
  for (const auto& [lane, access] : request) {
    for (std::uintptr_t byte = access->address; byte < access->address + access->size; ++byte) {
      sectors.insert(byte / 32);
      words.insert(byte / 2);
    }
  }
  return {1, sectors.size(), (words.size() * 2 + 31) / 32};
}

}  // namespace

bool Profile::is_on() {
  return is_profiling;
}

void Profile::turn(bool on) {
  std::lock_guard lock(published_mutex);
  is_profiling = on;
  if (on) published.clear();
}

void Profile::add_warp(std::vector<Access>* const lanes[32]) {
  using Turn = std::tuple<const void*, bool, int>;  // instruction, shared, how often the lane has met it
  std::map<Turn, Request> requests;
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes[lane] == nullptr) continue;
    std::map<std::pair<const void*, bool>, int> times;
    for (const Access& access : *lanes[lane]) {
      const int turn = times[{access.instruction, access.is_shared}]++;
      requests[{access.instruction, access.is_shared, turn}].push_back({lane, &access});
    }
  }
  for (const auto& [turn, request] : requests) {
    const bool is_shared = std::get<1>(turn);
    const Cost cost = is_shared ? cost_of_shared(request) : cost_of_global(request);
    Cost& total = costs_[{std::get<0>(turn), is_shared}];
    total.requests += cost.requests;
    total.cost += cost.cost;
    total.least += cost.least;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes[lane]) lanes[lane]->clear();
  }
}

void Profile::publish(const std::string& kernel) {
  std::lock_guard lock(published_mutex);
  for (const auto& [key, cost] : costs_) {
    Dl_info info = {};
    dladdr(key.instruction, &info);
    const auto offset = static_cast<const char*>(key.instruction) - static_cast<const char*>(info.dli_fbase);
    published += kernel + " " + std::to_string(offset) + (key.is_shared ? " shared " : " global ") +
                 std::to_string(cost.requests) + " " + std::to_string(cost.cost) + " " +
                 std::to_string(cost.least) + "\n";
  }
  costs_.clear();
}

}  // namespace emulate

extern "C" {

__attribute__((visibility("default"))) void octet_emulator_profile(bool on) {
  emulate::Profile::turn(on);
}

// Lines "kernel offset-in-library shared|global requests cost least", one per block and instruction.
__attribute__((visibility("default"))) const char* octet_emulator_costs() {
  std::lock_guard lock(emulate::published_mutex);
  return emulate::published.c_str();
}
}
