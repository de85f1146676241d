// common/checks.h   Boundary checks written as shapes; the message is made from the check.
//
//   Checks check("rms_norm");
//   Dim M("M"), H("H");
//   check(x, "x", {&M, &H}, kActivation)(weight, "weight", {&H}, kActivation);
//
// A Dim takes its value from the first tensor that uses it and must agree afterwards, so the error reads
//   rms_norm: weight must be [H=64] float32|bfloat16, got [65] float32
// Everything raised here is a ValueError: the caller passed the wrong tensor.

#pragma once

#include <tvm/ffi/tvm_ffi.h>

#include <initializer_list>
#include <string>

#include "../include/weight_view.h"
#include "dispatch.h"
#include "status.h"

namespace octet {

namespace ffi = tvm::ffi;
using ffi::Optional;
using ffi::TensorView;

class Dim {
 public:
  explicit Dim(const char* name, int64_t value = -1) : name_(name), value_(value) {}
  Dim(int64_t value) : name_(""), value_(value) {}  // NOLINT: a plain number is a dimension too

  bool accepts(int64_t actual) const { return value_ < 0 || value_ == actual; }
  void bind(int64_t actual) { value_ = actual; }
  int64_t value() const { return value_; }
  operator int64_t() const { return value_; }  // NOLINT: reads like the number it names

  std::string text() const {
    if (value_ < 0) return name_;
    const std::string number = std::to_string(value_);
    return *name_ ? std::string(name_) + "=" + number : number;
  }

 private:
  const char* name_;
  int64_t value_;
};

// The element types that one argument may have.
enum Types : unsigned {
  kFloat32 = 1,
  kBFloat16 = 2,
  kActivation = kFloat32 | kBFloat16,
  kInt32 = 4,
  kInt64 = 8,
  kInt8 = 16,
  kUInt8 = 32,
};

class Checks {
 public:
  explicit Checks(const char* op);

  // Shape, type, layout and device of one tensor; unbound Dims take their value here.
  const Checks& operator()(const TensorView& tensor, const char* name, std::initializer_list<Dim*> shape,
                           unsigned types) const {
    require_place(tensor, name);
    if (!has_shape(tensor, shape) || !(type_of(tensor) & types)) {
      fail(std::string(name) + " must be " + shape_text(shape) + " " + types_text(types) + ", got " +
           actual_text(tensor));
    }
    if (!tensor.IsContiguous()) fail(std::string(name) + " must be contiguous: copy it first");
    int64_t axis = 0;
    for (Dim* dim : shape) dim->bind(tensor.size(axis++));
    return *this;
  }

  // Any shape of `size` elements.
  void flat(const TensorView& tensor, const char* name, Dim& size, unsigned types) const {
    require_place(tensor, name);
    if (!size.accepts(tensor.numel()) || !(type_of(tensor) & types)) {
      fail(std::string(name) + " must be " + size.text() + " elements of " + types_text(types) + ", got " +
           actual_text(tensor));
    }
    if (!tensor.IsContiguous()) fail(std::string(name) + " must be contiguous: copy it first");
    size.bind(tensor.numel());
  }

  void same_type(const TensorView& a, const char* a_name, const TensorView& b, const char* b_name) const {
    if (type_of(a) != type_of(b)) {
      fail(std::string(a_name) + " is " + types_text(type_of(a)) + " but " + b_name + " is " +
           types_text(type_of(b)) + ": both must have one type");
    }
  }

  void require(bool holds, const std::string& otherwise) const {
    if (!holds) fail(otherwise);
  }

  // The end of every boundary function: nullptr passes, words are raised.
  void done(Status status) const;

  [[noreturn]] void fail(const std::string& what) const {
    TVM_FFI_THROW(ValueError) << op_ << ": " << what;
    __builtin_unreachable();
  }

  static unsigned type_of(const TensorView& tensor) {
    const DLDataType t = tensor.dtype();
    if (t.lanes != 1) return 0;
    if (t.code == kDLFloat && t.bits == 32) return kFloat32;
    if (t.code == kDLBfloat && t.bits == 16) return kBFloat16;
    if (t.code == kDLInt && t.bits == 32) return kInt32;
    if (t.code == kDLInt && t.bits == 64) return kInt64;
    if (t.code == kDLInt && t.bits == 8) return kInt8;
    if (t.code == kDLUInt && t.bits == 8) return kUInt8;
    return 0;
  }

 private:
  // Defined by each library: on the CPU in boundary/place.cc, on the device in gpu_boundary/place.cc.
  void require_place(const TensorView& tensor, const char* name) const;

  static bool has_shape(const TensorView& tensor, std::initializer_list<Dim*> shape) {
    if (tensor.ndim() != int32_t(shape.size())) return false;
    int64_t axis = 0;
    for (Dim* dim : shape) {
      if (!dim->accepts(tensor.size(axis++))) return false;
    }
    return true;
  }

  static std::string shape_text(std::initializer_list<Dim*> shape) {
    std::string text = "[";
    for (Dim* dim : shape) text += (text.size() > 1 ? ", " : "") + dim->text();
    return text + "]";
  }

  static std::string types_text(unsigned types) {
    static const char* const names[] = {"float32", "bfloat16", "int32", "int64", "int8", "uint8"};
    std::string text;
    for (int i = 0; i < 6; ++i) {
      if (types >> i & 1u) text += (text.empty() ? "" : "|") + std::string(names[i]);
    }
    return text.empty() ? "another type" : text;
  }

  static std::string actual_text(const TensorView& tensor) {
    std::string text = "[";
    for (int32_t i = 0; i < tensor.ndim(); ++i) {
      text += (i ? ", " : "") + std::to_string(tensor.size(i));
    }
    return text + "] " + std::string(ffi::DLDataTypeToString(tensor.dtype()));
  }

  const char* op_;
};

inline DType dtype_of(const TensorView& tensor) {
  return Checks::type_of(tensor) == kBFloat16 ? DType::bfloat16 : DType::float32;
}

template <class T>
T* data_of(const TensorView& tensor) {
  return reinterpret_cast<T*>(static_cast<char*>(tensor.data_ptr()) + tensor.byte_offset());
}
inline void* data_of(const TensorView& tensor) {
  return data_of<void>(tensor);
}

// What cuda_ops.Weight passes: kind as its index in WeightKind, data, scales (none for plain kinds), group.
// `stack` is the number of matrices, or null for a single one.
WeightView check_weight(const Checks& check, const char* name, int64_t kind, const TensorView& data,
                        const Optional<TensorView>& scales, int64_t group, Dim* stack, Dim& out_features,
                        Dim& in_features);

}  // namespace octet
