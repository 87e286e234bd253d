// The checks of each op's arguments, in the same words as rana_kernels/ops/checks.py. Every compiled backend uses them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

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

  // The tensor must be [rows, columns] in the input's dtype and have contiguous rows; -1 stands for any size.
  void matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns) const {
    place(name, t, dtype_);
    if (t.dim() != 2 || (rows >= 0 && t.size(0) != rows) || (columns >= 0 && t.size(1) != columns))
      fail(name, "shape " + list(t.sizes()), "shape [" + size(rows) + ", " + size(columns) + "]");
    if (t.size(1) > 1 && t.stride(1) != 1 && t.size(0) > 0)
      fail(name, "strides " + list(t.strides()),
           "rows that are contiguous: call .contiguous() once, where the weights are loaded");
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

  void place(const char* name, const Tensor& t, ScalarType dtype) const {
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
                                const OptionalTensor& norms, const OptionalTensor& bias) {
  const Check check("masked_linear", "h", h);
  const int64_t ranks = last_size(h);
  check.matrix("rows", rows, ranks, -1);
  check.threshold("threshold", threshold, ranks);
  check.norms("norms", norms, ranks);
  check.bias("bias", bias, rows.size(1));
}

inline void check_masked_lowrank_linear(const Tensor& x, const Tensor& B, const Tensor& rows, const Tensor& threshold,
                                        const OptionalTensor& bias) {
  const Check check("masked_lowrank_linear", "x", x);
  check.matrix("B", B, -1, last_size(x));
  check.matrix("rows", rows, B.size(0), -1);
  check.threshold("threshold", threshold, B.size(0));
  check.bias("bias", bias, rows.size(1));
}

inline void check_ranks(const Check& check, const Tensor& B, const Tensor& up_rows, const OptionalTensor& gate_rows) {
  const std::string ranks = std::to_string(B.size(0)) + " rows";
  const int64_t up = up_rows.size(0);
  if (!gate_rows && B.size(0) != up) check.fail("B", ranks, std::to_string(up) + ", the rows of up_rows");
  if (!gate_rows) return;
  const int64_t gate = gate_rows->size(0);
  if (B.size(0) != up + gate && !(B.size(0) == up && up == gate))
    check.fail("B", ranks,
               std::to_string(up + gate) + " (up's " + std::to_string(up) + " over gate's " + std::to_string(gate) +
                   "), or as many as up_rows and gate_rows each (shared ranks)");
}

// `known` says whether the backend has the activation of that name.
inline void check_masked_mlp(const Tensor& x, const Tensor& B, const Tensor& up_rows, const OptionalTensor& gate_rows,
                             const Tensor& threshold, const OptionalTensor& up_bias, const OptionalTensor& gate_bias,
                             const Tensor& down_rows, const Tensor& down_norms, const Tensor& down_threshold,
                             const OptionalTensor& down_bias, const std::string& activation, bool known) {
  const Check check("masked_mlp", "x", x);
  check.matrix("B", B, -1, last_size(x));
  check.matrix("up_rows", up_rows, -1, -1);
  const int64_t neurons = up_rows.size(1);
  if (gate_rows) check.matrix("gate_rows", *gate_rows, -1, neurons);
  check_ranks(check, B, up_rows, gate_rows);
  if (!gate_rows && gate_bias) check.fail("gate_bias", "a value", "None, because gate_rows is None");
  check.thresholds("threshold", threshold, B.size(0));
  check.bias("up_bias", up_bias, neurons);
  check.bias("gate_bias", gate_bias, neurons);
  check.matrix("down_rows", down_rows, neurons, -1);
  check.thresholds("down_norms", down_norms, neurons);
  check.threshold("down_threshold", down_threshold, neurons);
  check.bias("down_bias", down_bias, down_rows.size(1));
  if (!known) check.fail("activation", "'" + activation + "'", "one of silu, gelu, gelu_tanh, relu, relu2");
}

inline void check_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const Check check("linear", "x", x);
  check.matrix("weight", weight, -1, last_size(x));
  check.bias("bias", bias, weight.size(0));
}

}  // namespace rana
