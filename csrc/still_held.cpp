// The module `_held`: whether dictionaries of Python still hold what they did. A step of generation asks that of
// hundreds of dictionaries, and its weights have pushed all of them out of the caches. It needs Python alone.
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace {

constexpr Py_ssize_t kAhead = 32;  // dictionaries and keys are asked from memory so many turns early

const char kDoc[] =
    "still_held(dictionaries, keys, values): all(d.get(k) is v for d, k, v in zip(dictionaries, keys, values)), "
    "for tuples of one length";

PyObject* still_held(PyObject*, PyObject* args) {
  PyObject *dictionaries, *keys, *values;
  if (!PyArg_ParseTuple(args, "O!O!O!", &PyTuple_Type, &dictionaries, &PyTuple_Type, &keys, &PyTuple_Type, &values))
    return nullptr;
  const Py_ssize_t count = PyTuple_Size(dictionaries);
  if (PyTuple_Size(keys) != count || PyTuple_Size(values) != count) {
    PyErr_SetString(PyExc_ValueError, "still_held: wanted tuples of one length");
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < count; i++) {
    if (i + kAhead < count) {
      __builtin_prefetch(PyTuple_GetItem(dictionaries, i + kAhead));
      __builtin_prefetch(PyTuple_GetItem(keys, i + kAhead));
    }
    PyObject* const held = PyTuple_GetItem(dictionaries, i);
    if (!PyDict_Check(held)) {
      PyErr_SetString(PyExc_TypeError, "still_held: wanted dictionaries");
      return nullptr;
    }
    PyObject* const found = PyDict_GetItemWithError(held, PyTuple_GetItem(keys, i));
    if (!found && PyErr_Occurred()) return nullptr;
    if ((found ? found : Py_None) != PyTuple_GetItem(values, i)) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyMethodDef methods[] = {{"still_held", still_held, METH_VARARGS, kDoc}, {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_held", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__held() { return PyModule_Create(&module); }
