// gpu/all_reduce.cu   Sums over the GPUs of one machine through memory they map from each other
//
//   all_reduce                out = bf16(sum over ranks r = 0, 1, ... of x_r)
//   all_reduce_add_rms_norm   residual = bf16(residual + that sum), out = rms_norm(residual) * weight
//
//   x, out, residual [M, H] bf16   weight [H] bf16
//
//   bytes   one-shot: every rank reads world * 2 M H from its peers; two-shot: 2 * 2 M H and one meeting more
//           -> a few us of latency for a step's rows, then bound by the links
//   map     32 blocks, always: a block takes rows b, b + 32, ... Each copies its rows into this rank's
//           region, meets the same block of every peer, then sums. One-shot sums whole rows on every
//           rank; two-shot sums 1/world of each row, meets again, and collects the others' parts.
//           Regions hold two messages by turns: a rank that is past the next meeting knows that all peers
//           are done with the one before. Flags count up and the count is kept on the device, so a
//           captured graph can be replayed.
//   needs   2 to 8 ranks that call alike, in one stream each; H % 8 == 0 and H <= 16384; peer access
//   order   ranks ascend, fp32, one rounding: one-shot and two-shot give the same bits; the norm as
//           block_sum has it, for H alone
//   source  the one- and two-shot schemes of NVIDIA's TensorRT-LLM custom all-reduce, by description
//   twin    cpu/shared_memory_group.cc
//   speed   not yet measured

#include <ptx.cuh>

#include "elements.cuh"
#include "launchers.h"

namespace octet::gpu {
namespace {

constexpr int kBlocks = 32, kThreads = 512, kMaxRanks = 8;
constexpr int kMaxPieces = 4;  // of eight values, per thread and row

// What one rank lends to its peers.
struct Region {
  uint32_t* flags;     // [kBlocks][kMaxRanks]: how often the peer's block has come
  uint32_t* meetings;  // [kBlocks]: how often the own block has met; only the owner looks
  bf16* sent[2];       // messages, by turns
  bf16* summed[2];     // parts that this rank has summed (two-shot)

  __device__ Region(void* base, int64_t capacity) {
    auto* bytes = static_cast<unsigned char*>(base);
    flags = reinterpret_cast<uint32_t*>(bytes);
    meetings = flags + kBlocks * kMaxRanks;
    auto* messages = reinterpret_cast<bf16*>(bytes + kHeader);
    for (int turn = 0; turn < 2; ++turn) {
      sent[turn] = messages + turn * capacity;
      summed[turn] = messages + (2 + turn) * capacity;
    }
  }
  static constexpr int64_t kHeader = 2048;
};
static_assert(kBlocks * (kMaxRanks + 1) * 4 <= Region::kHeader);

// The block meets the same block of every peer: what each wrote before is seen by all after.
__device__ void meet(const PeerGroup& group, uint32_t count) {
  __syncthreads();
  const int peer = threadIdx.x;
  if (peer < group.world_size) {
    const Region theirs(group.regions[peer], group.capacity), ours(group.regions[group.rank], group.capacity);
    ptx::store_flag(theirs.flags + int(blockIdx.x) * kMaxRanks + group.rank, count);
    const uint32_t* flag = ours.flags + int(blockIdx.x) * kMaxRanks + peer;
    while (int32_t(ptx::load_flag(flag) - count) < 0) {
    }
  }
  __syncthreads();
}

struct Rows {
  int64_t size;  // elements of the message; the last row may be shorter
  int width;

  __device__ int64_t count() const { return (size + width - 1) / width; }
  __device__ int pieces(int64_t row) const { return int(min(int64_t(width), size - row * width) / 8); }
};

// Sum of one piece over the ranks in ascending order, as it will be stored.
__device__ __forceinline__ Eight sum_over_ranks(const PeerGroup& group, int turn, int64_t at) {
  uint4 raw[kMaxRanks];
#pragma unroll
  for (int r = 0; r < kMaxRanks; ++r) {
    if (r < group.world_size) {
      const Region region(group.regions[r], group.capacity);
      raw[r] = *reinterpret_cast<const uint4*>((turn ? region.sent[1] : region.sent[0]) + at);
    }
  }
  Eight sum = {};
#pragma unroll
  for (int r = 0; r < kMaxRanks; ++r) {
    if (r < group.world_size) {
      const Eight v = {{low_of(raw[r].x), high_of(raw[r].x), low_of(raw[r].y), high_of(raw[r].y),
                        low_of(raw[r].z), high_of(raw[r].z), low_of(raw[r].w), high_of(raw[r].w)}};
#pragma unroll
      for (int j = 0; j < 8; ++j) sum.value[j] += v.value[j];
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) sum.value[j] = as_stored(sum.value[j], bf16{});
  return sum;
}

// Residual and norm of one row whose sums this thread holds.
__device__ void finish_row(Eight (&sums)[kMaxPieces], int pieces, bf16* residual, const bf16* weight,
                           float eps, bf16* out) {
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kMaxPieces; ++i) {
    const int piece = threadIdx.x + i * kThreads;
    if (piece < pieces) {
      Eight r = load_eight(residual + piece * 8);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        r.value[j] = as_stored(r.value[j] + sums[i].value[j], bf16{});
        squares += r.value[j] * r.value[j];
      }
      store_eight(residual + piece * 8, r);
      sums[i] = r;
    }
  }
  const float scale = rsqrtf(block_sum<kThreads>(squares) / float(pieces * 8) + eps);
#pragma unroll
  for (int i = 0; i < kMaxPieces; ++i) {
    const int piece = threadIdx.x + i * kThreads;
    if (piece < pieces) {
      const Eight w = load_eight(weight + piece * 8);
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[i].value[j] = sums[i].value[j] * scale * w.value[j];
      store_eight(out + piece * 8, sums[i]);
    }
  }
}

struct Norm {
  bf16* residual;  // null: no residual and no norm
  const bf16* weight;
  float eps;
};

template <bool is_two_shot>
__global__ void __launch_bounds__(kThreads)
    all_reduce_kernel(const __grid_constant__ PeerGroup group, const bf16* x, bf16* out, Rows rows,
                      Norm norm) {
  const Region ours(group.regions[group.rank], group.capacity);
  const uint32_t before = ours.meetings[blockIdx.x];
  // Every call counts two meetings, whether it needs the second or not: so the half in use alternates.
  const int turn = int(before / 2 % 2);
  bf16* sent = turn ? ours.sent[1] : ours.sent[0];
  for (int64_t row = blockIdx.x; row < rows.count(); row += kBlocks) {
    for (int piece = threadIdx.x; piece < rows.pieces(row); piece += kThreads) {
      const int64_t at = row * rows.width + piece * 8;
      *reinterpret_cast<uint4*>(sent + at) = *reinterpret_cast<const uint4*>(x + at);
    }
  }
  meet(group, before + 1);

  if (is_two_shot) {
    bf16* summed = turn ? ours.summed[1] : ours.summed[0];
    for (int64_t row = blockIdx.x; row < rows.count(); row += kBlocks) {
      const int pieces = rows.pieces(row), share = (pieces + group.world_size - 1) / group.world_size;
      const int end = min(pieces, share * (group.rank + 1));
      for (int piece = share * group.rank + threadIdx.x; piece < end; piece += kThreads) {
        const int64_t at = row * rows.width + piece * 8;
        store_eight(summed + at, sum_over_ranks(group, turn, at));
      }
    }
    meet(group, before + 2);
  }

  for (int64_t row = blockIdx.x; row < rows.count(); row += kBlocks) {
    const int pieces = rows.pieces(row), share = (pieces + group.world_size - 1) / group.world_size;
    Eight sums[kMaxPieces];
#pragma unroll
    for (int i = 0; i < kMaxPieces; ++i) {
      const int piece = threadIdx.x + i * kThreads;
      if (piece < pieces) {
        const int64_t at = row * rows.width + piece * 8;
        if (is_two_shot) {
          const Region owner(group.regions[piece / share], group.capacity);
          sums[i] = load_eight((turn ? owner.summed[1] : owner.summed[0]) + at);
        } else {
          sums[i] = sum_over_ranks(group, turn, at);
        }
        if (!norm.residual) store_eight(out + at, sums[i]);
      }
    }
    if (norm.residual) {
      const int64_t at = row * rows.width;
      finish_row(sums, pieces, norm.residual + at, norm.weight, norm.eps, out + at);
    }
  }
  if (threadIdx.x == 0) ours.meetings[blockIdx.x] = before + 2;  // a skipped second meeting counts too
}

// Below this one-shot's extra bytes cost less than a second meeting.
constexpr int64_t kOneShotBytes = 512 * 1024;

Status check_group(const PeerGroup& group, int64_t size) {
  if (group.world_size < 2 || group.world_size > kMaxRanks) return "an all-reduce takes 2 to 8 ranks";
  if (size % 8 != 0) return "the message must be a multiple of 8 elements";
  if (size > group.capacity) return "the message is larger than the group's regions";
  return nullptr;
}

Status run(Stream stream, const PeerGroup& group, const void* x, void* out, const Rows& rows,
           const Norm& norm) {
  const bool is_two_shot = rows.size * 2 > kOneShotBytes;
  return launch({"all_reduce", kBlocks, kThreads, 0, stream},
                is_two_shot ? all_reduce_kernel<true> : all_reduce_kernel<false>, group,
                static_cast<const bf16*>(x), static_cast<bf16*>(out), rows, norm);
}

}  // namespace

int64_t peer_region_bytes(int64_t capacity) {
  return 2048 + 4 * capacity * 2;
}

Status all_reduce(Stream stream, const PeerGroup& group, const void* x, void* out, int64_t size) {
  if (Status wrong = check_group(group, size)) return wrong;
  if (size == 0) return nullptr;
  return run(stream, group, x, out, Rows{size, 4096}, Norm{nullptr, nullptr, 0});
}

Status all_reduce_add_rms_norm(Stream stream, const PeerGroup& group, const void* x, void* residual,
                               const void* weight, float eps, void* out, int64_t m, int64_t h) {
  if (Status wrong = check_group(group, m * h)) return wrong;
  if (h % 8 != 0 || h > kThreads * kMaxPieces * 8)
    return "the width of a row must be a multiple of 8 up to 16384";
  if (m == 0) return nullptr;
  return run(stream, group, x, out, Rows{m * h, int(h)},
             Norm{static_cast<bf16*>(residual), static_cast<const bf16*>(weight), eps});
}

}  // namespace octet::gpu
