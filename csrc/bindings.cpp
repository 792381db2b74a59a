#include <pybind11/pybind11.h>

#include "riemann_accumulate.h"

namespace py = pybind11;
using mipfast::Dtype;

namespace {

// Addresses, not tensors: one binary serves every torch, and mipfast/ops.py has checked what they point to.
template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::enum_<Dtype>(m, "Dtype")
      .value("float32", Dtype::float32)
      .value("bfloat16", Dtype::bfloat16)
      .value("float16", Dtype::float16);

  m.def(
      "riemann_accumulate",
      [](uintptr_t grad, Dtype grad_dtype, uintptr_t weights, uintptr_t act, Dtype act_dtype, uintptr_t s1,
         uintptr_t s2, int64_t steps, int64_t groups, int64_t rows_per_group, int64_t neurons) {
        py::gil_scoped_release release;
        mipfast::riemann_accumulate(at<const void>(grad), grad_dtype, at<const float>(weights),
                                    at<const void>(act), act_dtype, at<float>(s1), at<float>(s2), steps,
                                    groups, rows_per_group, neurons);
      },
      py::kw_only(), py::arg("grad"), py::arg("grad_dtype"), py::arg("weights"), py::arg("act"),
      py::arg("act_dtype"), py::arg("s1"), py::arg("s2"), py::arg("steps"), py::arg("groups"),
      py::arg("rows_per_group"), py::arg("neurons"));
}
