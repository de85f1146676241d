// boundary/attention.cc   Exported: paged_attention, segment_attention.

#include "../include/attention.h"

#include "../common/checks.h"
#include "kv_cache.h"

namespace octet {
namespace {

void paged_attention(TensorView q, TensorView k_cache, TensorView v_cache, TensorView block_tables,
                     TensorView query_starts, TensorView kv_lens, double scale, TensorView out,
                     Optional<TensorView> k_scales, Optional<TensorView> v_scales) {
  Checks check("paged_attention");
  Dim M("M"), nq("nq"), nkv("nkv"), hd("hd"), blocks("num_blocks"), size("block_size"), S("S"), B("B");
  check(q, "q", {&M, &nq, &hd}, kActivation);
  const cpu::KvCache cache =
      check_cache(check, q, k_cache, v_cache, k_scales, v_scales, blocks, nkv, size, hd);
  check(block_tables, "block_tables", {&S, &B}, kInt32)(kv_lens, "kv_lens", {&S}, kInt32);
  Dim starts("S+1", S + 1), width("nq*hd", nq * hd);
  check(query_starts, "query_starts", {&starts}, kInt32)(out, "out", {&M, &width}, kActivation);
  check.require(nkv > 0 && nq % nkv == 0, "nq=" + std::to_string(nq.value()) +
                                              " must be a multiple of nkv=" + std::to_string(nkv.value()));
  check.same_type(q, "q", out, "out");
  const cpu::PagedBatch batch{data_of<int32_t>(block_tables), data_of<int32_t>(query_starts),
                              data_of<int32_t>(kv_lens), S, B};
  check.done(cpu::paged_attention(dtype_of(q), data_of(q), cache, batch, float(scale), data_of(out), M, nq,
                                  {blocks, nkv, size, hd}));
}

void segment_attention(TensorView qkv, TensorView segment_starts, double scale, TensorView out) {
  Checks check("segment_attention");
  Dim P("P"), three(3), heads("heads"), hd("hd"), starts("N+1");
  check(qkv, "qkv", {&P, &three, &heads, &hd}, kActivation)(segment_starts, "segment_starts", {&starts},
                                                            kInt32);
  Dim width("heads*hd", heads * hd);
  check(out, "out", {&P, &width}, kActivation);
  check.require(starts > 0, "segment_starts must hold at least one entry");
  check.same_type(qkv, "qkv", out, "out");
  check.done(cpu::segment_attention(dtype_of(qkv), data_of(qkv), data_of<int32_t>(segment_starts), starts - 1,
                                    float(scale), data_of(out), P, heads, hd));
}

OCTET_EXPORT_OP(paged_attention, paged_attention)
OCTET_EXPORT_OP(segment_attention, segment_attention)

}  // namespace
}  // namespace octet
