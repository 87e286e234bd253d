// The host module `_C`: facts about the build. The op libraries do not need it.
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about this build of rana_kernels.";
  m.def("build_facts", &build_facts, "Compiler, torch and instruction sets the libraries were built with.");
}
