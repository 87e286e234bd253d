// The host module `_C`: facts about the build and the processor. The op libraries do not need it.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

py::dict build_facts() {
  py::dict facts;
  facts["compiler"] = __VERSION__;
  facts["torch"] = RANA_TORCH;
  facts["instruction_sets"] = RANA_SETS;
  return facts;
}

py::dict cpu_features() {
  py::dict features;
#if defined(__x86_64__)
  __builtin_cpu_init();
  features["avx2"] = bool(__builtin_cpu_supports("avx2"));
  features["fma"] = bool(__builtin_cpu_supports("fma"));
  features["avx512f"] = bool(__builtin_cpu_supports("avx512f"));
  features["avx512bf16"] = bool(__builtin_cpu_supports("avx512bf16"));
  features["amx_bf16"] = bool(__builtin_cpu_supports("amx-bf16"));
#endif
  return features;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about this build of rana_kernels and about this processor.";
  m.def("build_facts", &build_facts, "Compiler, torch and instruction sets the libraries were built with.");
  m.def("cpu_features", &cpu_features, "Vector extensions this processor has.");
}
