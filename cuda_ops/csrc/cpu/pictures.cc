// cpu/pictures.cc   A picture resized by the bicubic filter of Pillow, with its bits, and cut into patches.
//
//   across  line[c, x] = clip((half + sum_t pixel[y, first(x) + t, c] * k(x, t)) >> 22)
//   down    out[y, x]  = clip((half + sum_t line[first(y) + t, x] * k(y, t)) >> 22)
//   order   across, then down; the other way round where much more height is lost than width
//
//   k      weights of the Catmull-Rom cubic (a = -1/2), stretched when the picture shrinks, normalised to sum
//   1 in
//          double precision and rounded to multiples of 2^-22: Pillow's numbers, so both sums are exact
//   bytes  the picture once, the patches once; lines that a row needs lie in a ring in L1
//   map    four pixels of four channels, or sixteen bytes of a line, per vector; one thread: a decoder has
//   one source the published algorithm of Pillow's Resample.c: convolution in fixed point, rows before
//   columns

#include "../include/pictures.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace octet::cpu {
namespace {

constexpr int kBits = 22;  // 8 bits of pixel, 2 of headroom for weights beyond 1
constexpr int kPatch = 14, kMerge = 2, kChannels = 3;
constexpr int64_t kPatchBytes = kChannels * kPatch * kPatch;
constexpr double kSupport = 2.0;  // of the filter, in pixels of the output

double cubic(double x) {
  constexpr double a = -0.5;
  if (x < 0.0) x = -x;
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

// Which inputs each output of one axis reads, and with which weights.
struct Axis {
  int64_t taps;                  // per output, at most
  std::vector<int64_t> first;    // [outputs]
  std::vector<int64_t> count;    // [outputs]
  std::vector<int32_t> weights;  // [outputs, taps], zeros behind `count`

  Axis(int64_t inputs, int64_t outputs) {
    const double scale = static_cast<double>(inputs) / static_cast<double>(outputs);
    const double stretch = std::max(scale, 1.0), support = kSupport * stretch, per_pixel = 1.0 / stretch;
    taps = static_cast<int64_t>(std::ceil(support)) * 2 + 1;
    first.resize(outputs), count.resize(outputs), weights.assign(outputs * taps, 0);
    std::vector<double> exact(taps);
    for (int64_t i = 0; i < outputs; ++i) {
      const double center = (static_cast<double>(i) + 0.5) * scale;
      first[i] = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
      count[i] = std::min(static_cast<int64_t>(center + support + 0.5), inputs) - first[i];
      double sum = 0.0;
      for (int64_t t = 0; t < count[i]; ++t) {
        exact[t] = cubic((static_cast<double>(t + first[i]) - center + 0.5) * per_pixel);
        sum += exact[t];
      }
      for (int64_t t = 0; t < count[i]; ++t) {
        const double weight = (sum != 0.0 ? exact[t] / sum : exact[t]) * (1 << kBits);
        weights[i * taps + t] = static_cast<int32_t>(weight < 0 ? weight - 0.5 : weight + 0.5);
      }
    }
  }
};

// Sixteen sums of bytes times weights. Integers, so every body gives the same bits.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

class Sums {
 public:
  void add(const uint8_t* bytes, int32_t weight) { add(load(bytes), _mm512_set1_epi32(weight)); }

  // Four pixels of four bytes, each with a weight of its own.
  void add_each(__m128i pixels, const int32_t* weights) {
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    add(pixels, _mm512_permutexvar_epi32(lanes, _mm512_castsi128_si512(load(weights))));
  }

  __m128i bytes() const {
    const __m512i positive = _mm512_max_epi32(_mm512_srai_epi32(sums_, kBits), _mm512_setzero_si512());
    return _mm512_cvtusepi32_epi8(positive);
  }

 private:
  static __m128i load(const void* data) { return _mm_loadu_si128(static_cast<const __m128i*>(data)); }

  void add(__m128i bytes, __m512i weights) {
    sums_ = _mm512_add_epi32(sums_, _mm512_mullo_epi32(_mm512_cvtepu8_epi32(bytes), weights));
  }

  __m512i sums_ = _mm512_set1_epi32(1 << (kBits - 1));
};

#elif defined(__AVX2__)

class Sums {
 public:
  void add(const uint8_t* bytes, int32_t weight) {
    const __m256i each = _mm256_set1_epi32(weight);
    add(load(bytes), each, each);
  }

  // Four pixels of four bytes, each with a weight of its own.
  void add_each(__m128i pixels, const int32_t* weights) {
    const __m256i four = _mm256_castsi128_si256(load(weights));
    add(pixels, _mm256_permutevar8x32_epi32(four, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)),
        _mm256_permutevar8x32_epi32(four, _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3)));
  }

  __m128i bytes() const {
    const __m256i words = _mm256_packs_epi32(_mm256_srai_epi32(low_, kBits), _mm256_srai_epi32(high_, kBits));
    const __m256i sorted = _mm256_permute4x64_epi64(words, 0xD8);  // packing works on halves of 128 bits
    return _mm_packus_epi16(_mm256_castsi256_si128(sorted), _mm256_extracti128_si256(sorted, 1));
  }

 private:
  static __m128i load(const void* data) { return _mm_loadu_si128(static_cast<const __m128i*>(data)); }

  void add(__m128i bytes, __m256i low, __m256i high) {
    const __m128i rest = _mm_unpackhi_epi64(bytes, bytes);
    low_ = _mm256_add_epi32(low_, _mm256_mullo_epi32(_mm256_cvtepu8_epi32(bytes), low));
    high_ = _mm256_add_epi32(high_, _mm256_mullo_epi32(_mm256_cvtepu8_epi32(rest), high));
  }

  __m256i low_ = _mm256_set1_epi32(1 << (kBits - 1)), high_ = low_;
};

#endif

#if defined(__AVX2__)

struct PixelSums : Sums {
  void add_pixels(const uint8_t* pixels, const int32_t* offsets, const int32_t* weights) {
    int32_t four[4];
    for (int i = 0; i < 4; ++i) std::memcpy(&four[i], pixels + offsets[i], 4);
    add_each(_mm_setr_epi32(four[0], four[1], four[2], four[3]), weights);
  }

  // The same for pixels side by side.
  void add_run(const uint8_t* pixels, const int32_t* weights) {
    add_each(_mm_loadu_si128(reinterpret_cast<const __m128i*>(pixels)), weights);
  }

  void store(uint8_t* out) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes()); }

  // Four bytes to each of the three lines.
  void store_channels(uint8_t* line, int64_t stride) const {
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m128i sorted = _mm_shuffle_epi8(bytes(), order);
    const int32_t red = _mm_cvtsi128_si32(sorted), green = _mm_extract_epi32(sorted, 1);
    const int32_t blue = _mm_extract_epi32(sorted, 2);
    std::memcpy(line, &red, 4);
    std::memcpy(line + stride, &green, 4);
    std::memcpy(line + 2 * stride, &blue, 4);
  }
};

#else

struct PixelSums {
  int32_t sums[16];

  PixelSums() { std::fill_n(sums, 16, 1 << (kBits - 1)); }

  void add(const uint8_t* bytes, int32_t weight) {
    for (int i = 0; i < 16; ++i) sums[i] += bytes[i] * weight;
  }

  // Four pixels of four bytes, each with a weight of its own.
  void add_pixels(const uint8_t* pixels, const int32_t* offsets, const int32_t* weights) {
    for (int i = 0; i < 16; ++i) sums[i] += pixels[offsets[i / 4] + i % 4] * weights[i / 4];
  }

  // The same for pixels side by side.
  void add_run(const uint8_t* pixels, const int32_t* weights) {
    for (int i = 0; i < 16; ++i) sums[i] += pixels[i] * weights[i / 4];
  }

  void store(uint8_t* out) const {
    for (int i = 0; i < 16; ++i) out[i] = static_cast<uint8_t>(std::clamp(sums[i] >> kBits, 0, 255));
  }

  // Four bytes to each of the three lines.
  void store_channels(uint8_t* line, int64_t stride) const {
    uint8_t made[16];
    store(made);
    for (int i = 0; i < 4 * kChannels; ++i) line[i / 4 * stride + i % 4] = made[i % 4 * 4 + i / 4];
  }
};

#endif

// The horizontal pass: one row of pixels to three lines. Four outputs at a time, which share no input.
class Rows {
 public:
  Rows(const Axis& axis, int64_t inputs, int64_t outputs) : groups_((outputs + 3) / 4), taps_(axis.taps) {
    offsets_.assign(groups_ * taps_ * 4, 0), weights_.assign(groups_ * taps_ * 4, 0),
        counts_.assign(groups_, 0);
    for (int64_t i = 0; i < outputs; ++i) {
      const int64_t group = i / 4;
      counts_[group] = std::max(counts_[group], axis.count[i]);
      for (int64_t t = 0; t < taps_; ++t) {
        const int64_t at = (group * taps_ + t) * 4 + i % 4;
        offsets_[at] = static_cast<int32_t>(4 * std::min(axis.first[i] + t, inputs - 1));
        weights_[at] = axis.weights[i * taps_ + t];
      }
    }
    for (int64_t group = 0; group < groups_; ++group) {
      const int32_t* offsets = &offsets_[group * taps_ * 4];
      bool are_neighbours = true;
      for (int64_t i = 0; i < 4 * counts_[group]; ++i) {
        are_neighbours &= offsets[i] == offsets[0] + 4 * (i / 4 + i % 4);
      }
      are_neighbours_.push_back(are_neighbours);
    }
  }

  // `lines` are three of `stride` bytes, one per channel; up to three bytes behind a line's end are written.
  void run(const uint8_t* pixels, uint8_t* lines, int64_t stride) const {
    for (int64_t group = 0; group < groups_; ++group) {
      PixelSums sums;
      const int32_t* offsets = &offsets_[group * taps_ * 4];
      const int32_t* weights = &weights_[group * taps_ * 4];
      for (int64_t t = 0; t < counts_[group]; ++t) {
        if (are_neighbours_[group]) {
          sums.add_run(pixels + offsets[0] + 4 * t, weights + 4 * t);
        } else {
          sums.add_pixels(pixels, offsets + 4 * t, weights + 4 * t);
        }
      }
      sums.store_channels(lines + 4 * group, stride);
    }
  }

 private:
  int64_t groups_, taps_;
  std::vector<int32_t> offsets_;         // [groups, taps, 4] bytes from the start of a row
  std::vector<int32_t> weights_;         // [groups, taps, 4]
  std::vector<int64_t> counts_;          // [groups] taps that any of the four needs
  std::vector<uint8_t> are_neighbours_;  // [groups] whether the four read side by side, all along
};

// The vertical pass: `width` bytes of one row from `count` rows; whole vectors are read and written.
void blend(const uint8_t* const* rows, const int32_t* weights, int64_t count, int64_t width, uint8_t* out) {
  for (int64_t x = 0; x < width; x += 16) {
    PixelSums sums;
    for (int64_t t = 0; t < count; ++t) sums.add(rows[t] + x, weights[t]);
    sums.store(out + x);
  }
}

// Row y of one channel to its place in the patches.
void cut(const uint8_t* line, int64_t y, int channel, int64_t columns, uint8_t* patches) {
  const int64_t windows = columns / (kPatch * kMerge), in_window = y % (kPatch * kMerge);
  const int64_t first = y / (kPatch * kMerge) * windows * kMerge * kMerge + in_window / kPatch * kMerge;
  uint8_t* out = patches + first * kPatchBytes + channel * kPatch * kPatch + in_window % kPatch * kPatch;
  for (int64_t window = 0; window < windows; ++window, out += kMerge * kMerge * kPatchBytes) {
    for (int i = 0; i < kMerge; ++i, line += kPatch) std::memcpy(out + i * kPatchBytes, line, kPatch);
  }
}

class Resizer {
 public:
  Resizer(const uint8_t* pixels, int64_t rows, int64_t columns, int64_t out_rows, int64_t out_columns,
          uint8_t* patches)
      : pixels_(pixels),
        rows_(rows),
        columns_(columns),
        out_rows_(out_rows),
        out_columns_(out_columns),
        patches_(patches),
        down_(rows, out_rows),
        across_(Axis(columns, out_columns), columns, out_columns),
        stride_((out_columns + 31) / 16 * 16) {}

  void rows_first() {
    std::vector<uint8_t> ring(down_.taps * kChannels * stride_), line(stride_);
    std::vector<const uint8_t*> sources(down_.taps);
    int64_t done = 0;  // input rows that are resized across
    for (int64_t y = 0; y < out_rows_; ++y) {
      const int64_t first = down_.first[y], count = down_.count[y];
      for (done = std::max(done, first); done < first + count; ++done) {
        across_.run(row(done), &ring[done % down_.taps * kChannels * stride_], stride_);
      }
      for (int channel = 0; channel < kChannels; ++channel) {
        for (int64_t t = 0; t < count; ++t) {
          sources[t] = &ring[((first + t) % down_.taps * kChannels + channel) * stride_];
        }
        blend(sources.data(), &down_.weights[y * down_.taps], count, out_columns_, line.data());
        cut(line.data(), y, channel, out_columns_, patches_);
      }
    }
  }

  void columns_first() {
    const int64_t width = 4 * columns_, whole = width / 16 * 16;
    std::vector<uint8_t> lines(kChannels * stride_), blended(width + 16), ends(down_.taps * 16);
    std::vector<const uint8_t*> sources(down_.taps), rest(down_.taps);
    for (int64_t y = 0; y < out_rows_; ++y) {
      const int32_t* weights = &down_.weights[y * down_.taps];
      const int64_t count = down_.count[y];
      for (int64_t t = 0; t < count; ++t) {
        sources[t] = row(down_.first[y] + t);
        rest[t] = &ends[t * 16];  // behind the last whole vector: the picture may end there
        std::memcpy(&ends[t * 16], sources[t] + whole, width - whole);
      }
      blend(sources.data(), weights, count, whole, blended.data());
      blend(rest.data(), weights, count, width - whole, blended.data() + whole);
      across_.run(blended.data(), lines.data(), stride_);
      for (int channel = 0; channel < kChannels; ++channel) {
        cut(&lines[channel * stride_], y, channel, out_columns_, patches_);
      }
    }
  }

 private:
  const uint8_t* row(int64_t y) const { return pixels_ + y * columns_ * 4; }

  const uint8_t* pixels_;
  int64_t rows_, columns_, out_rows_, out_columns_;
  uint8_t* patches_;
  Axis down_;
  Rows across_;
  int64_t stride_;  // of a line: whole vectors may be read and written
};

}  // namespace

Status resize_patches(const uint8_t* pixels, int64_t rows, int64_t columns, int64_t out_rows,
                      int64_t out_columns, uint8_t* patches) {
  constexpr int64_t kCell = kPatch * kMerge;
  if (rows < 1 || columns < 1) return "the picture has no pixels";
  if (out_rows % kCell || out_columns % kCell) return "the new size must be a multiple of 28";
  Resizer resizer(pixels, rows, columns, out_rows, out_columns, patches);
  // Both orders round in between, so the order is part of the result; this is Pillow 13's choice.
  const int64_t lost_rows = std::max<int64_t>(rows - out_rows, 0);
  const int64_t lost_columns = std::max<int64_t>(columns - out_columns, 0);
  if (lost_rows > 2 * lost_columns) {
    resizer.columns_first();
  } else {
    resizer.rows_first();
  }
  return nullptr;
}

}  // namespace octet::cpu
