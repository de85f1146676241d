// gpu_boundary/attention.cc   Exported: rope_write_kv, plan_attention, paged_attention, segment_attention.

#include "device.h"

namespace octet {
namespace {

// The caches of one layer: their geometry, and whether they are int8 with scales.
struct Caches {
  Dim blocks{"num_blocks"}, nkv{"nkv"}, size{"block_size"}, hd{"hd"};
  bool is_int8;
  gpu::Int8Caches int8{};

  Caches(const Checks& check, const TensorView& k, const TensorView& v, const Optional<TensorView>& k_scales,
         const Optional<TensorView>& v_scales)
      : is_int8(k_scales.has_value()) {
    const unsigned types = is_int8 ? unsigned(kInt8) : unsigned(kActivation);
    check(k, "k_cache", {&blocks, &nkv, &size, &hd}, types)(v, "v_cache", {&blocks, &nkv, &size, &hd}, types);
    check.same_type(k, "k_cache", v, "v_cache");
    check.require(is_int8 == v_scales.has_value(), "k_scales and v_scales come together");
    if (!is_int8) return;
    check(*k_scales, "k_scales", {&blocks, &nkv, &size}, kBFloat16);
    check(*v_scales, "v_scales", {&blocks, &nkv, &size}, kBFloat16);
    int8 = {data_of<int8_t>(k), data_of<int8_t>(v), data_of<BF16>(*k_scales), data_of<BF16>(*v_scales)};
  }
  cpu::KvShape shape() const { return {blocks, nkv, size, hd}; }
};

cpu::PagedBatch check_batch(const Checks& check, const TensorView& block_tables,
                            const TensorView& query_starts, const TensorView& kv_lens) {
  Dim S("S"), B("B");
  check(block_tables, "block_tables", {&S, &B}, kInt32)(kv_lens, "kv_lens", {&S}, kInt32);
  Dim starts("S+1", S + 1);
  check(query_starts, "query_starts", {&starts}, kInt32);
  return {data_of<int32_t>(block_tables), data_of<int32_t>(query_starts), data_of<int32_t>(kv_lens), S, B};
}

void* check_plan(const Checks& check, const TensorView& memory, const gpu::AttentionLimits& limits,
                 int64_t num_sequences, const cpu::KvShape& kv) {
  Dim bytes("bytes");
  check(memory, "plan.memory", {&bytes}, kUInt8);
  const int64_t needed = gpu::paged_attention_workspace_bytes(limits.short_tasks, limits.long_tasks,
                                                              num_sequences, kv.num_kv_heads, kv.head_dim);
  check.require(bytes >= needed, "plan.memory must hold " + std::to_string(needed) + " bytes, got " +
                                     std::to_string(bytes.value()));
  return data_of(memory);
}

void rope_write_kv(TensorView qkv, TensorView cos_sin, TensorView slots, TensorView k_cache,
                   TensorView v_cache, TensorView q_out, Optional<TensorView> k_scales,
                   Optional<TensorView> v_scales) {
  Checks check("rope_write_kv");
  const Caches kv(check, k_cache, v_cache, k_scales, v_scales);
  Dim M("M"), nq("nq"), hd("hd", kv.hd), two(2);
  check(q_out, "q_out", {&M, &nq, &hd}, kActivation);
  Dim width("(nq+2nkv)*hd", (nq + 2 * kv.nkv) * hd), pairs("hd/2", hd / 2);
  check(qkv, "qkv", {&M, &width}, kActivation)(cos_sin, "cos_sin", {&M, &pairs, &two}, kFloat32);
  check(slots, "slots", {&M}, kInt32);
  check.same_type(qkv, "qkv", q_out, "q_out");
  if (kv.is_int8) {
    check.require(dtype_of(qkv) == DType::bfloat16, "an int8 cache takes bfloat16 qkv");
    check.done(gpu::rope_write_int8(current_stream(), data_of(qkv), data_of<float>(cos_sin),
                                    data_of<int32_t>(slots), kv.int8, data_of(q_out), M, nq, kv.shape()));
    return;
  }
  check.same_type(qkv, "qkv", k_cache, "k_cache");
  check.done(gpu::rope_write_kv(current_stream(), dtype_of(qkv), data_of(qkv), data_of<float>(cos_sin),
                                data_of<int32_t>(slots), data_of(k_cache), data_of(v_cache), data_of(q_out),
                                M, nq, kv.shape()));
}

void plan_attention(TensorView block_tables, TensorView query_starts, TensorView kv_lens, int64_t num_heads,
                    int64_t num_kv_heads, int64_t head_dim, int64_t block_size, int64_t short_tasks,
                    int64_t long_tasks, TensorView memory) {
  Checks check("plan_attention");
  const cpu::PagedBatch batch = check_batch(check, block_tables, query_starts, kv_lens);
  const cpu::KvShape kv{0, num_kv_heads, block_size, head_dim};
  const gpu::AttentionLimits limits{short_tasks, long_tasks};
  check.require(num_kv_heads > 0 && num_heads % num_kv_heads == 0,
                "num_heads must be a multiple of num_kv_heads");
  void* plan = check_plan(check, memory, limits, batch.num_sequences, kv);
  check.done(gpu::plan_attention(current_stream(), batch, 0, num_heads, kv, limits, plan));
}

void paged_attention(TensorView q, TensorView k_cache, TensorView v_cache, TensorView block_tables,
                     TensorView query_starts, TensorView kv_lens, double scale, TensorView out,
                     int64_t short_tasks, int64_t long_tasks, TensorView memory,
                     Optional<TensorView> k_scales, Optional<TensorView> v_scales) {
  Checks check("paged_attention");
  const Caches kv(check, k_cache, v_cache, k_scales, v_scales);
  Dim M("M"), nq("nq"), hd("hd", kv.hd);
  check(q, "q", {&M, &nq, &hd}, kBFloat16);
  Dim width("nq*hd", nq * hd);
  check(out, "out", {&M, &width}, kBFloat16);
  if (!kv.is_int8) check.same_type(q, "q", k_cache, "k_cache");
  const cpu::PagedBatch batch = check_batch(check, block_tables, query_starts, kv_lens);
  const gpu::AttentionLimits limits{short_tasks, long_tasks};
  void* plan = check_plan(check, memory, limits, batch.num_sequences, kv.shape());
  if (kv.is_int8) {
    check.done(gpu::paged_attention_int8(current_stream(), data_of(q), kv.int8, batch, float(scale),
                                         data_of(out), M, nq, kv.shape(), limits, plan));
    return;
  }
  check.done(gpu::paged_attention(current_stream(), data_of(q), data_of(k_cache), data_of(v_cache), batch,
                                  float(scale), data_of(out), M, nq, kv.shape(), limits, plan));
}

int64_t attention_plan_bytes(int64_t short_tasks, int64_t long_tasks, int64_t num_sequences,
                             int64_t num_kv_heads, int64_t head_dim) {
  return gpu::paged_attention_workspace_bytes(short_tasks, long_tasks, num_sequences, num_kv_heads, head_dim);
}

void segment_attention(TensorView qkv, TensorView segment_starts, double scale, TensorView out) {
  Checks check("segment_attention");
  Dim P("P"), three(3), heads("heads"), hd("hd"), starts("N+1");
  check(qkv, "qkv", {&P, &three, &heads, &hd}, kBFloat16)(segment_starts, "segment_starts", {&starts},
                                                          kInt32);
  Dim width("heads*hd", heads * hd);
  check(out, "out", {&P, &width}, kBFloat16);
  check.require(starts > 0, "segment_starts must hold at least one entry");
  check.done(gpu::segment_attention(current_stream(), data_of(qkv), data_of<int32_t>(segment_starts),
                                    starts - 1, float(scale), data_of(out), P, heads, hd));
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope_write_kv, rope_write_kv);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan_attention, plan_attention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(paged_attention_planned, paged_attention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_plan_bytes, attention_plan_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(segment_attention, segment_attention);

}  // namespace
}  // namespace octet
