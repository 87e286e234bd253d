// Registers the ops for CPU tensors in the namespace of this build, and makes the library a Python module. The CUDA ops
// register themselves.
#include <Python.h>

#ifdef CPU_KERNEL
#include "cpu_ops.h"

STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, m) { register_ops(m, best_ops()); }
#endif

#define JOINED(a, b) a##b
#define INIT_OF(name) JOINED(PyInit_, name)
#define QUOTED(name) #name
#define NAME_OF(name) QUOTED(name)

PyMODINIT_FUNC INIT_OF(TORCH_EXTENSION_NAME)() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, NAME_OF(TORCH_EXTENSION_NAME), nullptr, 0, nullptr};
  return PyModule_Create(&module);
}
