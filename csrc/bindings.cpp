#include <pybind11/pybind11.h>

#include "linear.h"
#include "misdirection_loss.h"
#include "riemann_accumulate.h"
#include "riemann_interpolate.h"
#include "riemann_project.h"
#include "swiglu.h"
#include "word_sums.h"
#ifdef MIPFAST_CUDA
#include "riemann_accumulate_cuda.h"
#endif

namespace py = pybind11;
using mipfast::Dtype;

namespace {

// Addresses, not tensors: one binary serves every torch. mipfast/ops has checked what they point to, and calls these
// functions by backends.call_extension.
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

  m.def(
      "misdirection_loss",
      [](uintptr_t hidden, Dtype hidden_dtype, uintptr_t target, Dtype target_dtype, bool one_target,
         uintptr_t kept, int64_t rows, int64_t width) {
        py::gil_scoped_release release;
        return mipfast::misdirection_loss(at<const void>(hidden), hidden_dtype, at<const void>(target),
                                          target_dtype, one_target, at<const uint8_t>(kept), rows, width);
      },
      py::kw_only(), py::arg("hidden"), py::arg("hidden_dtype"), py::arg("target"), py::arg("target_dtype"),
      py::arg("one_target"), py::arg("kept"), py::arg("rows"), py::arg("width"));

  m.def(
      "misdirection_gradient",
      [](uintptr_t hidden, Dtype hidden_dtype, uintptr_t target, Dtype target_dtype, bool one_target,
         uintptr_t kept, double d_loss, uintptr_t gradient, int64_t rows, int64_t width) {
        py::gil_scoped_release release;
        mipfast::misdirection_gradient(at<const void>(hidden), hidden_dtype, at<const void>(target),
                                       target_dtype, one_target, at<const uint8_t>(kept), d_loss,
                                       at<void>(gradient), rows, width);
      },
      py::kw_only(), py::arg("hidden"), py::arg("hidden_dtype"), py::arg("target"), py::arg("target_dtype"),
      py::arg("one_target"), py::arg("kept"), py::arg("d_loss"), py::arg("gradient"), py::arg("rows"),
      py::arg("width"));

  m.def(
      "riemann_interpolate",
      [](uintptr_t act, Dtype dtype, uintptr_t alphas, uintptr_t names, uintptr_t out, int64_t steps,
         int64_t rows, int64_t neurons, int64_t names_per_row) {
        py::gil_scoped_release release;
        mipfast::riemann_interpolate(at<const void>(act), dtype, at<const float>(alphas),
                                     at<const int64_t>(names), at<void>(out), steps, rows, neurons,
                                     names_per_row);
      },
      py::kw_only(), py::arg("act"), py::arg("dtype"), py::arg("alphas"), py::arg("names"), py::arg("out"),
      py::arg("steps"), py::arg("rows"), py::arg("neurons"), py::arg("names_per_row"));

  m.def(
      "riemann_project",
      [](uintptr_t base, uintptr_t act, uintptr_t weight, Dtype dtype, uintptr_t alphas, uintptr_t names,
         uintptr_t out, int64_t steps, int64_t rows, int64_t hidden, int64_t neurons, int64_t names_per_row) {
        py::gil_scoped_release release;
        mipfast::riemann_project(at<const void>(base), at<const void>(act), at<const void>(weight), dtype,
                                 at<const float>(alphas), at<const int64_t>(names), at<void>(out), steps, rows,
                                 hidden, neurons, names_per_row);
      },
      py::kw_only(), py::arg("base"), py::arg("act"), py::arg("weight"), py::arg("dtype"), py::arg("alphas"),
      py::arg("names"), py::arg("out"), py::arg("steps"), py::arg("rows"), py::arg("hidden"), py::arg("neurons"),
      py::arg("names_per_row"));

  m.def(
      "swiglu",
      [](uintptr_t gate, uintptr_t up, Dtype dtype, uintptr_t out, int64_t size) {
        py::gil_scoped_release release;
        mipfast::swiglu(at<const void>(gate), at<const void>(up), dtype, at<void>(out), size);
      },
      py::kw_only(), py::arg("gate"), py::arg("up"), py::arg("dtype"), py::arg("out"), py::arg("size"));

  m.def(
      "swiglu_gradients",
      [](uintptr_t d_out, uintptr_t gate, uintptr_t up, Dtype dtype, uintptr_t d_gate, uintptr_t d_up,
         int64_t size) {
        py::gil_scoped_release release;
        mipfast::swiglu_gradients(at<const void>(d_out), at<const void>(gate), at<const void>(up), dtype,
                                  at<void>(d_gate), at<void>(d_up), size);
      },
      py::kw_only(), py::arg("d_out"), py::arg("gate"), py::arg("up"), py::arg("dtype"), py::arg("d_gate"),
      py::arg("d_up"), py::arg("size"));

#ifdef MIPFAST_LINEAR
  m.attr("LEAST_OUTER") = mipfast::kLeastOuter;
  m.def(
      "linear",
      [](uintptr_t x, int64_t x_stride, uintptr_t weight, int64_t weight_stride, uintptr_t bias, uintptr_t out,
         int64_t rows, int64_t inner, int64_t outer) {
        py::gil_scoped_release release;
        mipfast::linear(at<const float>(x), x_stride, at<const float>(weight), weight_stride, at<const float>(bias),
                        at<float>(out), rows, inner, outer);
      },
      py::kw_only(), py::arg("x"), py::arg("x_stride"), py::arg("weight"), py::arg("weight_stride"), py::arg("bias"),
      py::arg("out"), py::arg("rows"), py::arg("inner"), py::arg("outer"));

  m.def(
      "linear_input_gradient",
      [](uintptr_t d_out, int64_t d_out_stride, uintptr_t weight, int64_t weight_stride, uintptr_t d_x, int64_t rows,
         int64_t inner, int64_t outer) {
        py::gil_scoped_release release;
        mipfast::linear_input_gradient(at<const float>(d_out), d_out_stride, at<const float>(weight), weight_stride,
                                       at<float>(d_x), rows, inner, outer);
      },
      py::kw_only(), py::arg("d_out"), py::arg("d_out_stride"), py::arg("weight"), py::arg("weight_stride"),
      py::arg("d_x"), py::arg("rows"), py::arg("inner"), py::arg("outer"));
#endif

  m.def(
      "word_sums",
      [](uintptr_t words, uintptr_t whole, uintptr_t upper, uintptr_t out, int64_t rows, int64_t width) {
        py::gil_scoped_release release;
        mipfast::word_sums(at<const int64_t>(words), at<const int64_t>(whole), at<const int64_t>(upper),
                           at<int64_t>(out), rows, width);
      },
      py::kw_only(), py::arg("words"), py::arg("whole"), py::arg("upper"), py::arg("out"), py::arg("rows"),
      py::arg("width"));

#ifdef MIPFAST_CUDA
  m.def("cuda_trouble", &mipfast::cuda_trouble);
  m.def(
      "riemann_accumulate_cuda",
      [](uintptr_t grad, Dtype grad_dtype, uintptr_t weights, uintptr_t act, Dtype act_dtype, uintptr_t s1,
         uintptr_t s2, int64_t steps, int64_t groups, int64_t rows_per_group, int64_t rows_per_split,
         int64_t neurons, uintptr_t stream) {
        py::gil_scoped_release release;
        mipfast::riemann_accumulate_cuda(at<const void>(grad), grad_dtype, at<const float>(weights),
                                         at<const void>(act), act_dtype, at<float>(s1), at<float>(s2), steps,
                                         groups, rows_per_group, rows_per_split, neurons, at<void>(stream));
      },
      py::kw_only(), py::arg("grad"), py::arg("grad_dtype"), py::arg("weights"), py::arg("act"),
      py::arg("act_dtype"), py::arg("s1"), py::arg("s2"), py::arg("steps"), py::arg("groups"),
      py::arg("rows_per_group"), py::arg("rows_per_split"), py::arg("neurons"), py::arg("stream"));
#endif
}
