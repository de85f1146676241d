// emulate/launch.cuh   How a launcher starts a kernel, on the emulator; twin of gpu/launch.cuh
#pragma once

#include <cuda_runtime.h>

namespace octet::gpu {

struct Launch {
  const char* kernel;  // name for reports
  dim3 grid, block;
  std::size_t shared_bytes;
  void* stream;
};

template <class... Params, class... Args>
const char* launch(const Launch& how, void (*kernel)(Params...), Args... args) {
  const emulate::Grid grid{how.kernel,
                           {how.grid.x, how.grid.y, how.grid.z},
                           {how.block.x, how.block.y, how.block.z},
                           how.shared_bytes};
  if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0)
    return "a kernel was launched with an empty grid";
  if (how.block.x * how.block.y * how.block.z > 1024)
    return "a kernel was launched with over 1024 threads a block";
  const auto body = [=] { kernel(args...); };
  using Call = decltype(body);
  const bool ok =
      emulate::run_grid(grid, {[](const void* call) { (*static_cast<Call*>(call))(); }, &body, sizeof(body)});
  return ok ? nullptr : "a kernel failed in the emulator";
}

// Enough blocks that persistent kernels share work, few enough that each takes several turns.
inline int num_multiprocessors() {
  return 3;
}

inline const char* fill_bytes(void* to, int value, std::size_t size, void*) {
  std::memset(to, value, size);
  return nullptr;
}

}  // namespace octet::gpu

// __shared__ T name[size] with a place that the emulator knows.
#define OCTET_SHARED(T, name, size)                         \
  T* const name = static_cast<T*>(::emulate::static_shared( \
      [] {                                                  \
        static const char tag = 0;                          \
        return &tag;                                        \
      }(),                                                  \
      sizeof(T) * (size)))

namespace octet::gpu {
inline unsigned char* dynamic_shared() {
  return static_cast<unsigned char*>(::emulate::dynamic_shared());
}
}  // namespace octet::gpu
