// One token of each text through all blocks of a Llama or a relative, in one call. The weights that a step reads push
// the interpreter out of the caches, so each call from Python takes 20 to 30 µs.
#pragma once

#include <map>
#include <memory>
#include <mutex>

#include "attention.h"

// The ops come before: see all_ops.cpp.
namespace {

// What a step does, one after the other. rana_kernels/integrations/decoding/recipe.py has the same list.
enum class Instruction : int64_t {
  kAddNorm,    // add the output to the residual stream, if there is one. Its norm is read next
  kNormHeads,  // replace the heads of q and k by their norms
  kAttend,     // add k and v to the cache. What q attends to is read next
  kCombine,    // act(gate) · up is read next
  kLinear,     // this op and the following ones keep their outputs side by side
  kMaskedLinear,
  kMaskedLowrankLinear,
  kMaskedMlp,
};

// Outputs [batch, 1, width] of one op or several, side by side.
class Columns {
 public:
  void add(Tensor output) { outputs_.push_back(std::move(output)); }
  void clear() { outputs_.clear(); }
  int64_t width() const {
    int64_t sum = 0;
    for (const Tensor& output : outputs_) sum += last_size(output);
    return sum;
  }
  // The output, or null if there is none yet.
  OptionalTensor only() const {
    require(outputs_.size() <= 1, "one output");
    return outputs_.empty() ? OptionalTensor() : OptionalTensor(outputs_[0]);
  }
  // The columns [first, first + width), which one op has computed.
  template <class T>
  Vectors<T> part(int64_t first, int64_t width) const {
    require(first >= 0 && width > 0, "outputs as wide as the heads of the cache");
    for (const Tensor& output : outputs_) {
      const int64_t columns = last_size(output);
      if (first + width <= columns) return {static_cast<const T*>(output.const_data_ptr()) + first, columns};
      if (first < columns) break;
      first -= columns;
    }
    throw std::runtime_error("rana_decoding: wanted heads, or a gate, that one op has computed");
  }

 private:
  std::vector<Tensor> outputs_;
};

// y = act(gate) · up, for `width` elements.
template <class T>
void combine_token(const T* gate, const T* up, int64_t width, Activation activation, T* y) {
  for (int64_t i = 0; i < width; i += kChunk) {
    const Chunk g = load_first(gate + i, width - i), u = load_first(up + i, width - i);
    const Chunk active = rounded<T>({activation(g.lo), activation(g.hi)});
    store_first(y + i, {active.lo * u.lo, active.hi * u.hi}, width - i);
  }
}

// The instructions of a step, and the tensors that they read.
struct Recipe {
  std::vector<int64_t> instructions;
  std::vector<OptionalTensor> weights;
};

// The recipes that programs keep here, by number, so that a step need not hand over hundreds of tensors.
class Recipes {
 public:
  int64_t keep(Recipe recipe) {
    const std::lock_guard<std::mutex> alone(mutex_);
    kept_[++last_] = std::make_shared<const Recipe>(std::move(recipe));
    return last_;
  }
  void forget(int64_t number) {
    const std::lock_guard<std::mutex> alone(mutex_);
    kept_.erase(number);
  }
  // A step in progress shares the recipe, so another thread may forget it meanwhile.
  std::shared_ptr<const Recipe> find(int64_t number) {
    const std::lock_guard<std::mutex> alone(mutex_);
    const auto found = kept_.find(number);
    require(found != kept_.end(), "a recipe that is kept");
    return found->second;
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<const Recipe>> kept_;
  int64_t last_ = 0;
};

// It lives as long as the process: torch may be gone before its destructor would run.
Recipes& recipes() {
  static Recipes& all = *new Recipes;
  return all;
}

int64_t keep_recipe(std::vector<int64_t> instructions, std::vector<OptionalTensor> weights) {
  return recipes().keep({std::move(instructions), std::move(weights)});
}

void forget_recipe(int64_t number) { recipes().forget(number); }

// A step in progress: the residual stream x, what the next op reads, and what ops have computed of it.
class TokenStep {
 public:
  TokenStep(const Tensor& x, const std::vector<OptionalTensor>& weights, double eps, const Text& activation)
      : x_(x), read_(x), weights_(weights), eps_(eps), activation_(activation) {}

  void add_norm() {
    const OptionalTensor* const w = take(1);
    read_ = add_rms_norm(x_, outputs_.only(), given(w[0]), eps_);
    outputs_.clear();
  }

  void norm_heads(const Attention& attention) {
    const OptionalTensor* const w = take(2);
    const int64_t D = attention.head_size(), keys = attention.width(), queries = outputs_.width() - 2 * keys;
    for_dtype(x_.scalar_type(), [&](auto element) {
      using T = decltype(element);
      norm_each<T>(outputs_.part<T>(0, queries), queries, given(w[0]), D);
      norm_each<T>(outputs_.part<T>(queries, keys), keys, given(w[1]), D);
    });
  }

  void attend(const Attention& attention) {
    const int64_t keys = attention.width(), queries = outputs_.width() - 2 * keys;
    require(queries % keys == 0, "heads of q that share keys evenly");
    Tensor y = empty_output(x_, queries);
    for_dtype(x_.scalar_type(), [&](auto element) {
      using T = decltype(element);
      attend_heads<T>(attention, outputs_.part<T>(0, queries), outputs_.part<T>(queries, keys),
                      outputs_.part<T>(queries + keys, keys), queries / keys, static_cast<T*>(y.mutable_data_ptr()));
    });
    read_next(y);
  }

  void combine() {
    const Activation function = find_activation(activation_.value);
    require(function, "a known activation");
    const int64_t neurons = outputs_.width() / 2, tokens = tokens_of(x_);
    Tensor y = empty_output(x_, neurons);
    for_dtype(x_.scalar_type(), [&](auto element) {
      using T = decltype(element);
      const Vectors<T> gate = outputs_.part<T>(0, neurons), up = outputs_.part<T>(neurons, neurons);
      T* const out = static_cast<T*>(y.mutable_data_ptr());
      for (int64_t m = 0; m < tokens; m++)
        combine_token<T>(gate.data + m * gate.stride, up.data + m * up.stride, neurons, function, out + m * neurons);
    });
    read_next(y);
  }

  // So many dense linears. Those that are stored alike are computed in one call.
  void linears(size_t count) {
    std::vector<DenseWeight> alike;
    for (; count > 0; count--) {
      const OptionalTensor* const w = take(3);
      const DenseWeight next{given(w[0]), w[1], w[2]};
      if (!alike.empty() && !next.stored_as(alike[0])) outputs_.add(::linears(read_, alike)), alike.clear();
      alike.push_back(next);
    }
    outputs_.add(::linears(read_, alike));
  }

  void op(Instruction instruction) {
    const OptionalTensor* w;
    switch (instruction) {
      case Instruction::kMaskedLinear:
        w = take(5);
        return outputs_.add(masked_linear(read_, given(w[0]), given(w[1]), w[2], w[3], w[4]));
      case Instruction::kMaskedLowrankLinear:
        w = take(6);
        return outputs_.add(masked_lowrank_linear(read_, given(w[0]), given(w[1]), given(w[2]), w[3], w[4], w[5]));
      case Instruction::kMaskedMlp:
        w = take(15);
        return outputs_.add(masked_mlp(read_, w[0], given(w[1]), w[2], given(w[3]), w[4], w[5], w[6], given(w[7]),
                                       given(w[8]), given(w[9]), w[10], activation_, w[11], w[12], w[13], w[14]));
      default: require(false, "a known instruction");
    }
  }

  const Tensor& read() const { return read_; }

 private:
  const OptionalTensor* take(size_t count) {
    require(next_ + count <= weights_.size(), "more weights");
    next_ += count;
    return weights_.data() + next_ - count;
  }
  static const Tensor& given(const OptionalTensor& weight) {
    require(weight.has_value(), "a weight in place of None");
    return *weight;
  }
  void read_next(const Tensor& y) { read_ = y, outputs_.clear(); }

  template <class T>
  void norm_each(Vectors<T> heads, int64_t width, const Tensor& weight, int64_t D) const {
    require_like(weight, x_, D, "a weight for each element of a head, in the dtype of x");
    const Packed<T> w(weight);
    for (int64_t m = 0; m < tokens_of(x_); m++)
      for (int64_t i = 0; i + D <= width; i += D) {
        T* const head = const_cast<T*>(heads.data) + m * heads.stride + i;  // of an output that nobody else has
        add_rms_norm_token<T>(head, nullptr, w.data, D, float(eps_), head);
      }
  }

  const Tensor& x_;
  Tensor read_;
  const std::vector<OptionalTensor>& weights_;
  size_t next_ = 0;
  const double eps_;
  const Text& activation_;
  Columns outputs_;
};

Tensor run_blocks(const Tensor& x, int64_t number, double eps, const Tensor& cos, const Tensor& sin,
                  const OptionalTensor& seen, std::vector<Tensor> keys, std::vector<Tensor> values, int64_t length,
                  double scale, const Text& activation) {
  require(x.dim() == 3 && x.size(1) == 1 && keys.size() == values.size(), "one token of each text, and its cache");
  const std::shared_ptr<const Recipe> recipe = recipes().find(number);
  const std::vector<int64_t>& instructions = recipe->instructions;
  TokenStep step(x, recipe->weights, eps, activation);
  size_t block = 0;
  const auto attention = [&] {
    require(block < keys.size(), "keys and values of each block");
    const Attention own{cos, sin, seen, keys[block], values[block], length, scale};
    own.check(x);
    require(x.size(0) == own.batch(), "a token for each text");
    return own;
  };
  for (size_t i = 0; i < instructions.size(); i++) {
    switch (const auto instruction = Instruction(instructions[i])) {
      case Instruction::kAddNorm: step.add_norm(); break;
      case Instruction::kNormHeads: step.norm_heads(attention()); break;
      case Instruction::kAttend: step.attend(attention()), block++; break;
      case Instruction::kCombine: step.combine(); break;
      case Instruction::kLinear: {
        const size_t first = i;
        while (i + 1 < instructions.size() && instructions[i + 1] == instructions[i]) i++;
        step.linears(i + 1 - first);
        break;
      }
      default: step.op(instruction);
    }
  }
  return step.read();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rana_decoding, m) {
  m.def("keep_recipe(int[] instructions, Tensor?[] weights) -> int");
  m.def("forget_recipe(int recipe) -> ()");
  m.def(
      "run_blocks(Tensor(a!) x, int recipe, float eps, Tensor cos, Tensor sin, Tensor? seen, Tensor(b!)[] keys, "
      "Tensor(c!)[] values, int length, float scale, str activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rana_decoding, CompositeExplicitAutograd, m) {
  m.impl("keep_recipe", TORCH_BOX(&keep_recipe));
  m.impl("forget_recipe", TORCH_BOX(&forget_recipe));
}

STABLE_TORCH_LIBRARY_IMPL(rana_decoding, CPU, m) { m.impl("run_blocks", TORCH_BOX(&run_blocks)); }
