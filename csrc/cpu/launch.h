// What every op starts from: torch's tensors as pointers and sizes.
#pragma once

#include <torch/csrc/stable/library.h>

#include "../check.h"
#include "../tensors.h"
#include "expand.h"
#include "project.h"

namespace {

template <class T>
Plain<T> plain(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.size(0), t.size(1), t.stride(0)};
}

}  // namespace
