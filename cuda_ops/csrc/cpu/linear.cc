// cpu/linear.cc   out[m, n] = activation(sum_k x[m, k] * W[n, k] + bias[n])
//
//   x [M, K] fp32|bf16    W [N, K] fp32|bf16|int8|int4    bias [N]    out [M, N] fp32|bf16
//
//   bytes   W once per kRowBlock rows of x; flops 2 * M * N * K
//   map     threads take runs of panels of weight rows; the products are in dot_panel.cc
//   needs   rows contiguous; M may be 0
//   order   depends on K and the instruction set alone (dot_panel.h); then bias, activation, one rounding

#include "../include/linear.h"

#include <algorithm>

#include "row_form.h"

namespace octet::cpu {
namespace {

F32x16 activate(Activation activation, F32x16 x) {
  switch (activation) {
    case Activation::gelu:
      return gelu(x);
    case Activation::quick_gelu:
      return quick_gelu(x);
    case Activation::none:
      break;
  }
  return x;
}

template <class Bias, class Out>
void finish_row(const float* sums, const Bias* bias, Activation activation, Out* out, int64_t width) {
  by_sixteen(width, [&](int64_t i, int64_t n) {
    F32x16 v = load_upto(sums + i, n);
    if (bias) v = v + load_upto(bias + i, n);
    store_upto(out + i, activate(activation, v), n);
  });
}

}  // namespace

Status linear(DType x_type, const void* x, const WeightView& w, DType bias_type, const void* bias,
              Activation activation, DType out_type, void* out, int64_t m) {
  if (w.is_packed && x_type != DType::bfloat16) return kPackedTakesBfloat16;
  const int64_t n = w.out_features, k = w.in_features;
  const RowForm form(x_type, w);
  const int64_t width = form.panel_width(n);
  for (int64_t begin = 0; begin < m; begin += kRowBlock) {
    const int64_t num_rows = std::min(kRowBlock, m - begin);
    const void* rows[kRowBlock];
    const char* block = static_cast<const char*>(row_of(x_type, x, begin, k));
    if (!form.is_plain()) {
      char* converted = scratch<char>(Slot::activations, size_t(num_rows * form.row_bytes()));
      form.convert(block, num_rows, converted);
      block = converted;
    }
    for (int64_t i = 0; i < num_rows; ++i) rows[i] = block + i * form.row_bytes();
    const auto multiply = [&](int64_t panel) {
      const int64_t first = panel * width, cols = std::min(width, n - first);
      float* sums = scratch<float>(Slot::outputs, size_t(kRowBlock * width));
      form.multiply(rows, num_rows, w, first, cols, sums, width);
      with_type(bias_type, [&](auto b) {
        with_type(out_type, [&](auto o) {
          const auto* bias_row = bias ? static_cast<const decltype(b)*>(bias) + first : nullptr;
          for (int64_t i = 0; i < num_rows; ++i) {
            auto* out_row = static_cast<decltype(o)*>(out) + (begin + i) * n + first;
            finish_row(sums + i * width, bias_row, activation, out_row, cols);
          }
        });
      });
    };
    parallel_in_runs(ceil_div(n, width), [&](int64_t begin_panel, int64_t end_panel) {
      for (int64_t panel = begin_panel; panel < end_panel; ++panel) multiply(panel);
    });
  }
  return nullptr;
}

Status cast(DType x_type, const void* x, DType out_type, void* out, int64_t size) {
  with_type(x_type, [&](auto from) {
    with_type(out_type, [&](auto to) {
      const auto* source = static_cast<const decltype(from)*>(x);
      auto* target = static_cast<decltype(to)*>(out);
      parallel_slices(size, 32768, [&](int64_t begin, int64_t end) {
        by_sixteen(end - begin, [&](int64_t i, int64_t n) {
          store_upto(target + begin + i, load_upto(source + begin + i, n), n);
        });
      });
    });
  });
  return nullptr;
}

Status add(DType type, void* x, const void* y, int64_t size) {
  with_type(type, [&](auto t) {
    auto* sums = static_cast<decltype(t)*>(x);
    const auto* terms = static_cast<const decltype(t)*>(y);
    parallel_slices(size, 32768, [&](int64_t begin, int64_t end) {
      by_sixteen(end - begin, [&](int64_t i, int64_t n) {
        const int64_t at = begin + i;
        store_upto(sums + at, load_upto(sums + at, n) + load_upto(terms + at, n), n);
      });
    });
  });
  return nullptr;
}

}  // namespace octet::cpu
