// gpu_boundary/device.cc   Where tensors must live, the stream, the workspace, and weights in tiles.
//
// Exported: set_stream, set_workspace, takes_host_tensors.

#include "device.h"

namespace octet {
namespace {

thread_local gpu::Stream stream = nullptr;
thread_local void* workspace_begin = nullptr;
thread_local int64_t workspace_bytes = 0;

void set_stream(int64_t handle, int64_t device) {
  Checks check("set_stream");
  check.done(gpu::use_device(device));
  stream = reinterpret_cast<gpu::Stream>(handle);
}

void set_workspace(Optional<TensorView> memory) {
  Checks check("set_workspace");
  Dim bytes("bytes");
  workspace_begin = nullptr;
  workspace_bytes = 0;
  if (!memory.has_value()) return;
  check(*memory, "memory", {&bytes}, kUInt8);
  workspace_begin = data_of(*memory);
  workspace_bytes = bytes;
  check.require(reinterpret_cast<uintptr_t>(workspace_begin) % 256 == 0,
                "memory must be aligned to 256 bytes");
}

bool takes_host_tensors() {
  return gpu::takes_host_tensors();
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_stream, set_stream);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_workspace, set_workspace);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(takes_host_tensors, takes_host_tensors);

}  // namespace

Checks::Checks(const char* op) : op_(op) {
  gpu::open_call();
}

void Checks::done(Status status) const {
  if (!status) return;
  const std::string more = gpu::failure();
  fail(std::string(status) + (more.empty() ? "" : ": " + more));
}

void Checks::require_place(const TensorView& tensor, const char* name) const {
  const bool is_on_host = tensor.device().device_type == kDLCPU;
  if (is_on_host != gpu::takes_host_tensors() || (!is_on_host && tensor.device().device_type != kDLCUDA)) {
    fail(std::string(name) + " is not on the GPU that the first tensor is on: upload it first");
  }
  const DLDataType type = tensor.dtype();
  gpu::lend(data_of(tensor), tensor.numel() * type.lanes * type.bits / 8);
}

gpu::Stream current_stream() {
  return stream;
}

void* workspace(const Checks& check, int64_t bytes) {
  check.require(bytes <= workspace_bytes, "it needs a workspace of " + std::to_string(bytes) +
                                              " bytes, and set_workspace gave " +
                                              std::to_string(workspace_bytes));
  gpu::lend(workspace_begin, bytes);
  return workspace_begin;
}

gpu::PackedWeight check_tiled(const Checks& check, const std::string& name, const TiledArguments& weight,
                              Dim* stack) {
  gpu::PackedWeight packed{};
  packed.kind = WeightKind(weight.kind);
  packed.group = int32_t(weight.group);
  packed.is_gated = weight.is_gated;
  packed.out_features = int32_t(weight.out_features);
  packed.in_features = int32_t(weight.in_features);
  const std::string tiles = name + ".tiles", scales = name + ".scales";
  Dim rows("N/16", packed.row_tiles()), columns("K/64", packed.column_tiles());
  Dim bytes("tile bytes", packed.pieces_per_tile() * 512), sixteen(16);
  if (stack) {
    check(weight.tiles, tiles.c_str(), {stack, &rows, &columns, &bytes}, kUInt8);
  } else {
    check(weight.tiles, tiles.c_str(), {&rows, &columns, &bytes}, kUInt8);
  }
  packed.tiles = data_of(weight.tiles);
  const int64_t scale_bytes = packed.scale_bytes();
  check.require(weight.scales.has_value() == (scale_bytes > 0),
                scales + (scale_bytes > 0 ? " are missing" : " belong to int8 and int4 weights only"));
  if (scale_bytes == 0) return packed;
  Dim groups("groups", scale_bytes / 32 / packed.row_tiles());
  if (stack) {
    check(*weight.scales, scales.c_str(), {stack, &rows, &groups, &sixteen}, kBFloat16);
  } else {
    check(*weight.scales, scales.c_str(), {&rows, &groups, &sixteen}, kBFloat16);
  }
  packed.scales = data_of(*weight.scales);
  return packed;
}

}  // namespace octet
