// gpu_boundary/device.h   What every exported function here needs beside its arguments: stream and workspace

#pragma once

#include <string>

#include "../common/checks.h"
#include "../gpu/launchers.h"
#include "../gpu/runtime.h"

namespace octet {

// The stream that this thread's calls go to (cuda_ops.set_stream); the default stream until one is set.
gpu::Stream current_stream();

// Ops of common/row_arguments.h and weight_arguments.h with their GPU body, on this thread's stream.
template <auto launch>
struct OnStream {
  template <class... Arguments>
  static Status run(const Arguments&... arguments) {
    return launch(current_stream(), arguments...);
  }
};

// The caller's scratch memory for this thread's stream (cuda_ops.set_workspace), at least `bytes` of it;
// raises what to do where it is smaller. Its content lasts for one call.
void* workspace(const Checks& check, int64_t bytes);

// A weight in tiles (gpu/packed_weight.h) as cuda_ops.TiledWeight passes it: kind as its index, tiles
// [stack.., row tiles, column tiles, bytes] uint8, scales [stack.., row tiles, groups, 16] bf16 or none.
struct TiledArguments {
  int64_t kind;
  TensorView tiles;
  Optional<TensorView> scales;
  int64_t group, out_features, in_features;
  bool is_gated;
};
gpu::PackedWeight check_tiled(const Checks& check, const std::string& name, const TiledArguments& weight,
                              Dim* stack);

}  // namespace octet
