// Continue a text with a .pt2 file, without Python. run.py is its twin.
//
//   run PACKAGE MODEL PROMPT COUNT
//
// PACKAGE: the folder with the libraries of rana_kernels · PROMPT: a text file of token ids
#include <ATen/ops/arange.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/tensor.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using Tokens = std::vector<int64_t>;

// What this processor can do of what setup.py compiles for.
std::string instruction_set() {
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16")) return "amx";
  if (avx512) return bf16 ? "avx512_bf16" : "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return "avx2";
#endif
  return "baseline";
}

// Loading registers: the schemas of the ops, or the kernels that serve them.
void load_library(const std::string& path) {
  if (!dlopen(path.c_str(), RTLD_NOW)) throw std::runtime_error(dlerror());
}

Tokens read_tokens(const std::string& path) {
  std::ifstream file(path);
  Tokens tokens{std::istream_iterator<int64_t>(file), {}};
  if (tokens.empty() || !file.eof()) throw std::runtime_error(path + " is no text file of token ids");
  return tokens;
}

// The `count` tokens after `prompt`, always the likeliest.
Tokens continuation(torch::inductor::AOTIModelPackageLoader& program, const Tokens& prompt, int64_t count) {
  Tokens written, unseen = prompt;
  int64_t seen = 0;
  while (int64_t(written.size()) < count) {
    const int64_t size = unseen.size();
    const at::Tensor logits = program.run({at::tensor(unseen).unsqueeze(0), at::arange(seen, seen + size)})[0];
    seen += size;
    unseen = {logits.select(0, 0).select(0, -1).argmax().item<int64_t>()};
    written.push_back(unseen[0]);
  }
  return written;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 5) throw std::runtime_error("wanted four arguments: PACKAGE MODEL PROMPT COUNT");
  const std::string package = argv[1];
  load_library(package + "/_schemas.abi3.so");
  load_library(package + "/_cpu_" + instruction_set() + ".abi3.so");
  const c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader program(argv[2]);
  const Tokens prompt = read_tokens(argv[3]);
  const int64_t count = std::stoll(argv[4]), total = int64_t(prompt.size()) + count;
  const std::string length = program.get_metadata().at("length");
  if (total > std::stoll(length))
    throw std::runtime_error("prompt and count are " + std::to_string(total) + " tokens, the cache holds " + length);
  for (const int64_t token : continuation(program, prompt, count)) std::cout << token << ' ';
  std::cout << std::endl;
} catch (const std::exception& error) {
  std::cerr << "run: " << error.what() << std::endl;
  return 1;
}
