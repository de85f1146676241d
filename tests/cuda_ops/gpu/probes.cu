// tests/cuda_ops/gpu/probes.cu   Small kernels, right and wrong on purpose, that show what the emulator sees
#include <launch.cuh>
#include <ptx.cuh>

namespace octet::gpu {
namespace {

// out[i] = sum over the block of in, through shared memory; `leave_out_barrier` breaks it.
__global__ void block_sum_kernel(const float* in, float* out, bool leave_out_barrier) {
  OCTET_SHARED(float, values, 64);
  values[threadIdx.x] = in[threadIdx.x];
  if (!leave_out_barrier) __syncthreads();
  float sum = 0;
  for (int i = 0; i < int(blockDim.x); ++i) sum += values[i];
  out[threadIdx.x] = sum;
}

__global__ void read_unwritten_kernel(float* out) {
  OCTET_SHARED(float, values, 64);
  if (threadIdx.x != 5) values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void divergent_barrier_kernel(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

__global__ void early_leaver_kernel(float* out) {
  if (threadIdx.x == 7) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void divergent_warp_kernel(float* out) {
  float value = float(threadIdx.x);
  if (threadIdx.x % 32 < 16) {
    value = __shfl_xor_sync(0xffffffffu, value, 1);
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = value;
}

__global__ void missing_warp_barrier_kernel(float* out, bool leave_out_barrier) {
  OCTET_SHARED(float, values, 64);
  values[threadIdx.x] = float(threadIdx.x);
  if (!leave_out_barrier) __syncwarp();
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

__global__ void copy_kernel(const uint4* in, uint4* out, bool leave_out_wait) {
  auto* values = reinterpret_cast<uint4*>(dynamic_shared());
  ptx::copy_async_16(&values[threadIdx.x], &in[threadIdx.x], threadIdx.x != 3);
  ptx::copy_async_commit();
  if (!leave_out_wait) ptx::copy_async_wait<0>();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void past_the_end_kernel(const float* in, float* out, int shift) {
  out[threadIdx.x] = in[threadIdx.x + shift];
}

// d[16,8] = a[16,16] b[8,16]^T, row-major bf16, fragments through ldmatrix
__global__ void product_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d) {
  auto* shared = reinterpret_cast<__nv_bfloat16*>(dynamic_shared());
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) shared[i] = a[i];
  for (int i = lane; i < 128; i += 32) shared[256 + i] = b[i];
  __syncthreads();
  uint32_t fragment_a[4], fragment_b[4];
  ptx::ldmatrix_x4(fragment_a, shared + (lane % 16) * 16 + lane / 16 * 8);
  ptx::ldmatrix_x4(fragment_b, shared + 256 + (lane % 8) * 16 + lane / 8 % 2 * 8);
  float sums[4] = {0, 0, 0, 0};
  ptx::mma(sums, fragment_a, {fragment_b[0], fragment_b[1]});
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

// out = in^T for an 8x8 matrix, four at once
__global__ void transpose_kernel(const __nv_bfloat16* in, __nv_bfloat16* out) {
  auto* shared = reinterpret_cast<__nv_bfloat16*>(dynamic_shared());
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) shared[i] = in[i];
  __syncthreads();
  uint32_t pairs[4];
  ptx::ldmatrix_x4_trans(pairs, shared + lane * 8);
  for (int m = 0; m < 4; ++m) {
    reinterpret_cast<uint32_t*>(out)[m * 32 + lane] = pairs[m];
  }
}

// A warp reads shared and global memory with a stride in floats.
__global__ void stride_kernel(const float* in, float* out, int stride) {
  OCTET_SHARED(float, values, 1024);
  for (int i = threadIdx.x; i < 1024; i += 32) values[i] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x * stride] + in[threadIdx.x * stride];
}

// The second write of each value comes while a neighbour may still be reading the first.
__global__ void overwrite_kernel(float* out) {
  OCTET_SHARED(float, values, 64);
  values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 32) % 64];
  values[threadIdx.x] = 2;
  __syncthreads();
  out[threadIdx.x] += values[threadIdx.x];
}

// Every lane's results of the warp operations: ballot, any, all, sum, largest, rotated, first of eight
__global__ void warp_kernel(const int* in, int* out) {
  const int lane = threadIdx.x, value = in[lane];
  int* mine = out + lane * 7;
  mine[0] = int(__ballot_sync(0xffffffffu, value > 10));
  mine[1] = __any_sync(0xffffffffu, value > 30);
  mine[2] = __all_sync(0xffffffffu, value >= 0);
  mine[3] = int(__reduce_add_sync(0xffffffffu, unsigned(value)));
  mine[4] = int(__reduce_max_sync(0xffffffffu, unsigned(value)));
  mine[5] = __shfl_sync(0xffffffffu, value, (lane + 1) % 32);
  mine[6] = __shfl_sync(0xffffffffu, value, 0, 8);
}

// Blocks take tickets from one counter; the last to come sums what all have written.
__global__ void ticket_kernel(unsigned* counter, unsigned* parts, unsigned* total) {
  OCTET_SHARED(unsigned, ticket, 1);
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = blockIdx.x + 1;
    __threadfence();
    ticket[0] = atomicAdd(counter, 1u);
  }
  __syncthreads();
  if (ticket[0] != gridDim.x - 1 || threadIdx.x != 0) return;
  unsigned sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += parts[i];
  *total = sum;
}

}  // namespace

const char* block_sum(const float* in, float* out, bool leave_out_barrier) {
  return launch({"block_sum", 1, 64, 0, nullptr}, block_sum_kernel, in, out, leave_out_barrier);
}
const char* read_unwritten(float* out) {
  return launch({"read_unwritten", 1, 64, 0, nullptr}, read_unwritten_kernel, out);
}
const char* divergent_barrier(float* out) {
  return launch({"divergent_barrier", 1, 64, 0, nullptr}, divergent_barrier_kernel, out);
}
const char* early_leaver(float* out) {
  return launch({"early_leaver", 1, 64, 0, nullptr}, early_leaver_kernel, out);
}
const char* divergent_warp(float* out) {
  return launch({"divergent_warp", 1, 64, 0, nullptr}, divergent_warp_kernel, out);
}
const char* missing_warp_barrier(float* out, bool leave_out_barrier) {
  return launch({"missing_warp_barrier", 1, 64, 0, nullptr}, missing_warp_barrier_kernel, out,
                leave_out_barrier);
}
const char* copy(const void* in, void* out, bool leave_out_wait) {
  return launch({"copy", 1, 32, 512, nullptr}, copy_kernel, static_cast<const uint4*>(in),
                static_cast<uint4*>(out), leave_out_wait);
}
const char* stride(const float* in, float* out, int64_t stride) {
  return launch({"stride", 1, 32, 0, nullptr}, stride_kernel, in, out, int(stride));
}
const char* overwrite(float* out) {
  return launch({"overwrite", 1, 64, 0, nullptr}, overwrite_kernel, out);
}
const char* past_the_end(const float* in, float* out, int64_t shift) {
  return launch({"past_the_end", 1, 32, 0, nullptr}, past_the_end_kernel, in, out, int(shift));
}
const char* product(const void* a, const void* b, float* d) {
  return launch({"product", 1, 32, 768, nullptr}, product_kernel, static_cast<const __nv_bfloat16*>(a),
                static_cast<const __nv_bfloat16*>(b), d);
}
const char* transpose(const void* in, void* out) {
  return launch({"transpose", 1, 32, 512, nullptr}, transpose_kernel, static_cast<const __nv_bfloat16*>(in),
                static_cast<__nv_bfloat16*>(out));
}
const char* warp_operations(const int* in, int* out) {
  return launch({"warp_operations", 1, 32, 0, nullptr}, warp_kernel, in, out);
}
const char* tickets(unsigned* counter, unsigned* parts, unsigned* total, int64_t num_blocks) {
  return launch({"tickets", dim3(unsigned(num_blocks)), 64, 0, nullptr}, ticket_kernel, counter, parts,
                total);
}

}  // namespace octet::gpu

#define EXPORT(name) \
  __attribute__((visibility("default"))) decltype(&octet::gpu::name) octet_gpu_##name = &octet::gpu::name;

extern "C" {

EXPORT(block_sum)
EXPORT(read_unwritten)
EXPORT(divergent_barrier)
EXPORT(early_leaver)
EXPORT(divergent_warp)
EXPORT(missing_warp_barrier)
EXPORT(copy)
EXPORT(past_the_end)
EXPORT(stride)
EXPORT(overwrite)
EXPORT(product)
EXPORT(transpose)
EXPORT(warp_operations)
EXPORT(tickets)

}  // extern "C"
