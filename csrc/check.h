// The checks of each op's arguments, in the same words as rana_kernels/ops/checks.py. Every compiled backend uses them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "quantized.h"

namespace rana {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Bool: return "torch.bool";
    default: return "number " + std::to_string(int(dtype));
  }
}

template <class Ints>
std::string list(const Ints& values) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < values.size(); i++) out << (i ? ", " : "") << values[i];
  out << ']';
  return out.str();
}

inline bool is_packed(const Tensor& weight) { return weight.scalar_type() == ScalarType::Byte; }
inline bool is_quantized(const Tensor& weight) { return is_packed(weight) || weight.scalar_type() == ScalarType::Char; }
// N of a weight [R, N] as it is stored; in 4 bits N is even.
inline int64_t columns_of(const Tensor& weight) { return weight.size(1) * (is_packed(weight) ? 2 : 1); }

// Checks the arguments of one op against its first argument, the input.
class Check {
 public:
  Check(const char* op, const char* name, const Tensor& input)
      : op_(op), dtype_(input.scalar_type()), device_type_(input.device().type()), device_(input.get_device_index()) {
    const bool known = dtype_ == ScalarType::Float || dtype_ == ScalarType::BFloat16 || dtype_ == ScalarType::Half;
    if (!known) fail(name, "dtype " + name_of(dtype_), "float32, bfloat16 or float16");
    if (input.dim() == 0) fail(name, "shape []", "at least one dimension");
  }

  [[noreturn]] void fail(const std::string& name, const std::string& has, const std::string& wanted) const {
    throw std::runtime_error(std::string("rana::") + op_ + ": " + name + " has " + has + ", wanted " + wanted);
  }

  // A matrix of weights, [rows, columns]: in the input's dtype, or quantised if it has a scale. -1 stands for any size.
  // Returns the columns.
  int64_t weight(const std::string& name, const Tensor& t, const OptionalTensor& scale, int64_t rows,
                 int64_t columns) const {
    const std::string scale_name = (ends_with_rows(name) ? name.substr(0, name.size() - 5) : name) + "_scale";
    if (!scale) {
      if (is_quantized(t))
        fail(name, "dtype " + name_of(t.scalar_type()), name_of(dtype_) + ", or " + scale_name + " beside it");
      place(name, t, dtype_);
      matrix(name, t, rows, columns);
      return t.size(1);
    }
    if (!is_quantized(t))
      fail(name, "dtype " + name_of(t.scalar_type()), "int8 or uint8, because " + scale_name + " is given");
    place(name, t, t.scalar_type());
    matrix(name, t, rows, is_packed(t) && columns >= 0 ? (columns + 1) / 2 : columns);
    const int64_t found = columns < 0 ? columns_of(t) : columns;
    scales(scale_name, *scale, t.size(0), found);
    return found;
  }

  void absent(const char* name, const OptionalTensor& t, const char* because) const {
    if (t) fail(name, "a value", std::string("None, because ") + because);
  }
  void bias(const char* name, const OptionalTensor& t, int64_t size) const {
    if (t) vector(name, *t, size, dtype_);
  }
  void norms(const char* name, const OptionalTensor& t, int64_t size) const {
    if (t) vector(name, *t, size, ScalarType::Float);
  }
  void thresholds(const char* name, const Tensor& t, int64_t size) const { vector(name, t, size, ScalarType::Float); }
  void threshold(const char* name, const Tensor& t, int64_t size) const {
    place(name, t, ScalarType::Float);
    if (t.dim() != 0 && !(t.dim() == 1 && t.size(0) == size))
      fail(name, "shape " + list(t.sizes()), "shape [] or [" + std::to_string(size) + "]");
  }

 private:
  static std::string size(int64_t n) { return n < 0 ? "any" : std::to_string(n); }
  static bool ends_with_rows(const std::string& name) {
    return name.size() > 5 && name.compare(name.size() - 5, 5, "_rows") == 0;
  }

  void matrix(const std::string& name, const Tensor& t, int64_t rows, int64_t columns) const {
    if (t.dim() != 2 || (rows >= 0 && t.size(0) != rows) || (columns >= 0 && t.size(1) != columns))
      fail(name, "shape " + list(t.sizes()), "shape [" + size(rows) + ", " + size(columns) + "]");
    contiguous_rows(name, t);
  }
  void contiguous_rows(const std::string& name, const Tensor& t) const {
    if (t.size(1) > 1 && t.stride(1) != 1 && t.size(0) > 0)
      fail(name, "strides " + list(t.strides()),
           "rows that are contiguous: call .contiguous() once, where the weights are loaded");
  }
  void scales(const std::string& name, const Tensor& t, int64_t rows, int64_t columns) const {
    place(name, t, ScalarType::Half);
    if (t.dim() != 2 || t.size(0) != rows || group_size(columns, t.size(1)) < 0) {
      std::string wanted;
      int64_t last = -1;
      for (int64_t group : {kGroupSizes[0], kGroupSizes[1], kGroupSizes[2], columns}) {
        const int64_t groups = groups_of(columns, group);
        if (groups != last)
          wanted += (wanted.empty() ? "[" : " or [") + std::to_string(rows) + ", " + std::to_string(groups) + "]";
        last = groups;
      }
      fail(name, "shape " + list(t.sizes()), "shape " + wanted + ", a scale for 32, 64, 128 or all columns");
    }
    contiguous_rows(name, t);
  }
  void place(const std::string& name, const Tensor& t, ScalarType dtype) const {
    if (t.scalar_type() != dtype) fail(name, "dtype " + name_of(t.scalar_type()), name_of(dtype));
    if (t.device().type() != device_type_ || t.get_device_index() != device_)
      fail(name, "another device", "the device of the input");
  }
  void vector(const char* name, const Tensor& t, int64_t size, ScalarType dtype) const {
    place(name, t, dtype);
    if (t.dim() != 1 || t.size(0) != size)
      fail(name, "shape " + list(t.sizes()), "shape [" + std::to_string(size) + "]");
  }

  const char* op_;
  ScalarType dtype_;
  torch::headeronly::DeviceType device_type_;
  torch::stable::DeviceIndex device_;
};

inline int64_t last_size(const Tensor& t) { return t.size(t.dim() - 1); }

// ---- the ops, argument by argument ----

inline void check_masked_linear(const Tensor& h, const Tensor& rows, const Tensor& threshold,
                                const OptionalTensor& norms, const OptionalTensor& bias,
                                const OptionalTensor& rows_scale) {
  const Check check("masked_linear", "h", h);
  const int64_t ranks = last_size(h), columns = check.weight("rows", rows, rows_scale, ranks, -1);
  check.threshold("threshold", threshold, ranks);
  check.norms("norms", norms, ranks);
  check.bias("bias", bias, columns);
}

inline void check_masked_lowrank_linear(const Tensor& x, const Tensor& B, const Tensor& rows, const Tensor& threshold,
                                        const OptionalTensor& bias, const OptionalTensor& B_scale,
                                        const OptionalTensor& rows_scale) {
  const Check check("masked_lowrank_linear", "x", x);
  check.weight("B", B, B_scale, -1, last_size(x));
  const int64_t columns = check.weight("rows", rows, rows_scale, B.size(0), -1);
  check.threshold("threshold", threshold, B.size(0));
  check.bias("bias", bias, columns);
}

inline void check_stacked_ranks(const Check& check, const Tensor& B, const Tensor& up_rows,
                                const OptionalTensor& gate_rows) {
  const std::string ranks = std::to_string(B.size(0)) + " rows";
  const int64_t up = up_rows.size(0);
  if (!gate_rows && B.size(0) != up) check.fail("B", ranks, std::to_string(up) + ", the rows of up_rows");
  if (!gate_rows) return;
  const int64_t gate = gate_rows->size(0);
  if (B.size(0) != up + gate && !(B.size(0) == up && up == gate))
    check.fail("B", ranks,
               std::to_string(up + gate) + " (up's " + std::to_string(up) + " over gate's " + std::to_string(gate) +
                   "), or as many as up_rows and gate_rows each (joint ranks)");
}

// `known` says whether the backend has the activation of that name.
inline void check_masked_mlp(const Tensor& x, const OptionalTensor& B, const Tensor& up_rows,
                             const OptionalTensor& gate_rows, const Tensor& threshold, const OptionalTensor& norms,
                             const OptionalTensor& up_bias, const OptionalTensor& gate_bias, const Tensor& down_rows,
                             const Tensor& down_norms, const Tensor& down_threshold, const OptionalTensor& down_bias,
                             const std::string& activation, const OptionalTensor& B_scale,
                             const OptionalTensor& up_scale, const OptionalTensor& gate_scale,
                             const OptionalTensor& down_scale, bool known) {
  const Check check("masked_mlp", "x", x);
  const int64_t size = last_size(x), ranks = B ? -1 : size;
  const int64_t neurons = check.weight("up_rows", up_rows, up_scale, ranks, -1);
  if (gate_rows) {
    check.weight("gate_rows", *gate_rows, gate_scale, ranks, neurons);
  } else {
    check.absent("gate_bias", gate_bias, "gate_rows is None");
    check.absent("gate_scale", gate_scale, "gate_rows is None");
  }
  if (B) {
    check.weight("B", *B, B_scale, -1, size);
    check_stacked_ranks(check, *B, up_rows, gate_rows);
    check.absent("norms", norms, "B is given and the norms of ranks are 1");
    check.thresholds("threshold", threshold, B->size(0));
  } else {
    check.absent("B_scale", B_scale, "B is None");
    check.threshold("threshold", threshold, size);
    check.norms("norms", norms, size);
  }
  check.bias("up_bias", up_bias, neurons);
  check.bias("gate_bias", gate_bias, neurons);
  const int64_t columns = check.weight("down_rows", down_rows, down_scale, neurons, -1);
  check.thresholds("down_norms", down_norms, neurons);
  check.threshold("down_threshold", down_threshold, neurons);
  check.bias("down_bias", down_bias, columns);
  if (!known) check.fail("activation", "'" + activation + "'", "one of silu, gelu, gelu_tanh, relu, relu2");
}

inline void check_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& weight_scale) {
  const Check check("linear", "x", x);
  check.weight("weight", weight, weight_scale, -1, last_size(x));
  check.bias("bias", bias, weight.size(0));
}

}  // namespace rana
