// What every op starts from: torch's tensors as pointers and sizes, and a launch on torch's current stream.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "../check.h"
#include "../tensors.h"
#include "expand.cuh"
#include "project.cuh"
#include "tiling.h"

// Only a torch with CUDA has this function. Declared weak, it lets the library load on any torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace {

[[noreturn]] inline void fail(const char* op, const std::string& what) {
  throw std::runtime_error(std::string("rana::") + op + ": " + what);
}

inline void check_cuda(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error: it is reported here, and must not be reported again by a later call
  fail(op, std::string("CUDA says: ") + cudaGetErrorString(error));
}

struct Block {
  int threads;
  size_t shared_bytes;
};

// The device of an op's input, with its card and its stream. It is the current device while this lives.
class Device {
 public:
  Device(const char* op, const Tensor& input) : op(op), guard_(input.get_device_index()) {
    if (!aoti_torch_get_current_cuda_stream) fail(op, "this torch was built without CUDA");
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream(input.get_device_index(), &stream)) fail(op, "torch has no CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
    processors_ = find_processors();
  }

  const char* const op;

  int processors() const { return processors_; }

  // Runs kernel(arguments...). If `together`, all blocks run at once, so that they can wait for one another.
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, Block block, bool together,
              Arguments&&... arguments) const {
    cudaLaunchAttribute cooperative;
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = together;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(block.threads);
    config.dynamicSmemBytes = block.shared_bytes;
    config.stream = stream_;
    config.attrs = &cooperative;
    config.numAttrs = 1;
    check_cuda(op, cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
  }

  int current() const {
    int device = 0;
    check_cuda(op, cudaGetDevice(&device));
    return device;
  }

 private:
  int attribute(cudaDeviceAttr name, int device) const {
    int value = 0;
    check_cuda(op, cudaDeviceGetAttribute(&value, name, device));
    return value;
  }

  int find_processors() const {
    static std::mutex lock;
    static std::map<int, int> known;
    const std::lock_guard<std::mutex> hold(lock);
    const int device = current();
    int& processors = known[device];
    if (!processors) {
      const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
      const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
      if (major < 8)
        fail(op, "the card has compute capability " + std::to_string(major) + "." + std::to_string(minor) +
                     ", wanted 8.0 or later");
      processors = attribute(cudaDevAttrMultiProcessorCount, device);
    }
    return processors;
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
  int processors_;
};

// A kernel in a grid of at most one block a multiprocessor, so that all blocks run at once. They may wait for one
// another only if launched `together`.
template <class Op>
class Kernel {
 public:
  Kernel(const Device& device, void (*kernel)(Op), Block block) : device_(device), kernel_(kernel), block_(block) {
    prepare();
  }

  int blocks() const { return device_.processors(); }
  void launch(int64_t most_blocks, const Op& op, bool together = true) const {
    device_.launch(kernel_, std::clamp<int64_t>(most_blocks, 1, blocks()), block_, together, op);
  }

 private:
  // Allows the shared memory and checks that a block has room, once for each device.
  void prepare() const {
    static std::mutex lock;
    static std::set<std::pair<void (*)(Op), int>> prepared;
    const std::lock_guard<std::mutex> hold(lock);
    const std::pair here{kernel_, device_.current()};
    if (prepared.count(here)) return;
    check_cuda(device_.op,
               cudaFuncSetAttribute(kernel_, cudaFuncAttributeMaxDynamicSharedMemorySize, int(block_.shared_bytes)));
    int fit = 0;
    check_cuda(device_.op,
               cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kernel_, block_.threads, block_.shared_bytes));
    if (!fit) fail(device_.op, "the card has no room for a block of the kernel");
    prepared.insert(here);
  }

  const Device& device_;
  void (*kernel_)(Op);
  Block block_;
};

// Scratch memory: one allocation by torch, cut into pieces that start on 16 bytes.
class Workspace {
 public:
  // After `allocate`, `piece` points at `count` elements.
  template <class E>
  void add(E*& piece, int64_t count) {
    assign_.push_back([&piece, start = bytes_](char* memory) { piece = reinterpret_cast<E*>(memory + start); });
    bytes_ += ceil_div(std::max<int64_t>(count, 1) * int64_t(sizeof(E)), 16) * 16;
  }
  template <class Z>
  void add(Z& z) {
    add(z.z, z.size());
  }
  // The memory lives as long as the tensor that is returned; torch reuses it in the order of the stream.
  Tensor allocate(const Tensor& like) {
    Tensor memory = torch::stable::new_empty(like, {bytes_ / int64_t(sizeof(float))}, ScalarType::Float);
    for (const auto& assign : assign_) assign(static_cast<char*>(memory.mutable_data_ptr()));
    return memory;
  }

 private:
  int64_t bytes_ = 0;
  std::vector<std::function<void(char*)>> assign_;
};

inline bool on_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Returns whether the rows of a weight, `bits` long and `ld` bytes apart, start on 16 bytes and are whole packets.
inline bool in_packets(const Tensor& weight, int64_t bits, int64_t ld) {
  return on_16_bytes(weight.const_data_ptr()) && bits % 128 == 0 && (weight.size(0) < 2 || ld % 16 == 0);
}

// Returns whether a weight that is there can be a Plain<T>.
template <class T>
bool is_plain(const OptionalTensor& weight, const OptionalTensor& scale) {
  constexpr int64_t kBytes = sizeof(T);
  return !scale && (!weight || in_packets(*weight, weight->size(1) * 8 * kBytes, weight->stride(0) * kBytes));
}

template <class T>
Plain<T> plain(const Tensor& weight) {
  return {static_cast<const T*>(weight.const_data_ptr()), weight.size(0), weight.size(1), weight.stride(0)};
}

template <class T>
AnyWidth<T> any_width(const Tensor& weight, const OptionalTensor& scale, int64_t columns) {
  const int width = !scale ? 8 * sizeof(T) : rana::is_packed(weight) ? 4 : 8;
  const auto* const data = static_cast<const uint8_t*>(weight.const_data_ptr());
  const int64_t rows = weight.size(0), ld = weight.stride(0) * (scale ? 1 : sizeof(T));
  bool whole = in_packets(weight, columns * width, ld);
  OneByOne<T> all{data, nullptr, rows, columns, ld, 0, 0, width};
  if (scale) {
    whole = whole && std::max(ld, scale->stride(0)) <= kMostBytesApart;
    all.scale = static_cast<const half*>(scale->const_data_ptr());
    all.scale_ld = scale->stride(0);
    all.group_bits = rana::group_bits<int>(columns, scale->size(1));
  }
  return {all, rows, columns, whole};
}

template <class W>
struct Storage {
  using Type = W;
};

// Calls f with the Storage of an op's weights: Plain if all of them can be, else AnyWidth.
template <class T, class F>
void for_storage(bool plain, F f) {
  if (plain) f(Storage<Plain<T>>{});
  else f(Storage<AnyWidth<T>>{});
}

// Returns a weight with `columns` columns as a kernel gets it.
template <class W>
W stored(const Tensor& weight, const OptionalTensor& scale, int64_t columns) {
  using T = typename W::Element;
  if constexpr (std::is_same_v<W, Plain<T>>) return plain<T>(weight);
  else return any_width<T>(weight, scale, columns);
}
// Rows, whose number of columns is even in 4 bits.
template <class W>
W stored_rows(const Tensor& weight, const OptionalTensor& scale) {
  return stored<W>(weight, scale, rana::columns_of(weight));
}

// A block of a decode kernel. Its phases use the same shared memory, one after the other.
template <class W, int kTokens>
constexpr Block kBlock{kThreads, std::max(sizeof(Partials<kTokens>), kExpandBytes<W, kTokens>)};

// The parts of an op as its kernel gets them, except for how they are cut up: `cut` decides that.

template <class W>
Projection<W> projection(const Packed<typename W::Element>& x, int64_t tokens, W B) {
  if constexpr (!std::is_same_v<W, Plain<typename W::Element>>) B.in_packets = B.in_packets && on_16_bytes(x.data);
  return {{x.data, int(B.columns), int(tokens)}, B, 1};
}

template <class T>
Output<T> output(const std::optional<Packed<T>>& bias, Tensor& y) {
  return {data_of(bias), static_cast<T*>(y.mutable_data_ptr()), last_size(y)};
}

// Returns how many warps read one row of B together.
template <int kTokens, class W>
int warps_a_row(const W& B) {
  constexpr int64_t kSlice = bytes_of<W>(Products<kTokens, W>::kColumns);  // which a warp reads at a time
  return warps_a_row(bytes_of<W>(B.columns), kSlice, kWarps);
}
template <int kTokens, class T>
int warps_a_row(const AnyWidth<T>& B) {
  if (B.all.width > 8) return warps_a_row<kTokens>(Plain<T>{nullptr, B.rows, B.columns, 0});
  constexpr int64_t kSlice = bytes_of<Quantized<T, 4>>(Products<kTokens, Quantized<T, 4>>::kColumns);
  return warps_a_row(B.columns * B.all.width / 8, kSlice, kWarps);
}

template <int kTokens, class T>
Rounding rounding(const Plain<T>&) {
  return {8, 4};
}
// In fewer bits there are fewer packets for as many blocks. A tile may be a sector of memory, 32 bytes, or less for
// several tokens, where instructions count for more than bytes.
template <int kTokens, class T>
Rounding rounding(const AnyWidth<T>& weights) {
  const int64_t bytes = kPacket<AnyWidth<T>> * weights.all.width / 8;
  return {128 / bytes, kTokens == 1 ? std::max<int64_t>(1, 32 / bytes) : 1};
}

template <int kTokens, class W>
void cut(Projection<W>& projection) {
  projection.warps_a_row = warps_a_row<kTokens>(projection.B);
}
template <int kTokens, class Z, class W>
void cut(Expansion<Z, W>& e, int64_t blocks) {
  const int64_t packets = ceil_div(e.rows.columns, kPacket<W>);
  e.width = packets_a_tile(packets, blocks, kMostPackets<W, kTokens>, rounding<kTokens>(e.rows));
  e.tiles = int(ceil_div(packets, e.width));
}

// Returns how many blocks have work.
template <int kTokens, class W>
int64_t items(const Projection<W>& projection) {
  return ceil_div(projection.B.rows * projection.warps_a_row, kWarps);
}

// Calls f with the number of tokens that the kernel for `tokens` tokens is compiled for, as a constant. With quantised
// weights, the kernel for sixteen leaves out the products of the last eight if there are no more than eight.
template <class W, class F>
void for_tokens(int64_t tokens, F f) {
  if (tokens == 1) return f(std::integral_constant<int, 1>{});
  if constexpr (!W::kQuantized)
    if (tokens <= 8) return f(std::integral_constant<int, 8>{});
  return f(std::integral_constant<int, 16>{});
}

// ---- kernels over the elements of a tensor ----

// Calls f(i) for all i < count.
template <class F>
__device__ void for_each(int64_t count, F f) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x)
    f(i);
}

constexpr Block kPlainBlock{512, 0};

inline int blocks_for_each(const Device& device, int64_t count) {
  return int(std::clamp<int64_t>(ceil_div(count, kPlainBlock.threads), 1, 4 * device.processors()));
}

}  // namespace
