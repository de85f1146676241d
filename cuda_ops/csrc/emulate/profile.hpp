// emulate/profile.hpp   What a warp's accesses cost: bank conflicts and memory sectors, counted
//
// The lanes of a warp run one after the other, so each lane's accesses are noted until the warp meets, then
// those of one instruction (the n-th time it ran) are put together as the hardware would see them:
//   shared   wavefronts: lanes go 32, 16 or 8 at a time for 4-, 8- or 16-byte accesses; lanes that want
//            different words of one of the 32 banks take turns
//   global   sectors of 32 bytes that are touched
// Beside each stands the least that the same bytes could cost. Off unless asked for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace emulate {

struct Access {
  const void* instruction;
  std::uintptr_t address;  // shared memory: offset
  std::uint32_t size;
  bool is_shared;
};

struct Cost {
  std::uint64_t requests = 0, cost = 0, least = 0;
};

// Costs by instruction, of one kernel.
class Profile {
 public:
  static bool is_on();
  static void turn(bool on);

  // The accesses of up to 32 lanes since the warp last met.
  void add_warp(std::vector<Access>* const lanes[32]);

  // Adds the costs to those of the whole process and forgets them.
  void publish(const std::string& kernel);

 private:
  struct Key {
    const void* instruction;
    bool is_shared;
    bool operator<(const Key& other) const {
      return instruction != other.instruction ? instruction < other.instruction : is_shared < other.is_shared;
    }
  };
  std::map<Key, Cost> costs_;
};

}  // namespace emulate
