// The pybind11 module: the same kernels on numpy arrays, and what was built. No torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "core/rows.h"

namespace py = pybind11;

namespace synkern {
namespace {

// Arrays come from synkern/numpy.py, which checks shapes and converts dtypes; here they are contiguous already.
struct NumpyProblem {
  Rows rows{};
  std::vector<char> statistics;
  size_t item;

  NumpyProblem(const py::array& logits, const py::array& target, const py::object& weight, const py::object& ratio,
               const py::object& class_weight, int64_t loss, double p0, double p1, double p2, double label_smoothing,
               double z_loss, int64_t ignore_index)
      : item(size_t(logits.itemsize())) {
    rows.logits = logits.data();
    rows.rows = logits.shape(0);
    rows.classes = logits.shape(1);
    rows.logits_stride = rows.classes;
    rows.dtype = item == sizeof(double) ? DType::float64 : DType::float32;
    rows.target = target.data();
    rows.target_type = IndexType::int64;
    rows.ignore_index = ignore_index;
    rows.weight = data_of(weight);
    rows.ratio = data_of(ratio);
    rows.class_weight = data_of(class_weight);
    rows.class_weight_sum =
        class_weight.is_none() ? double(rows.classes) : class_weight.attr("sum")().cast<double>();
    rows.loss = {LossKind(loss), p0, p1, p2, label_smoothing, z_loss};
    const int64_t bad = first_bad_target(rows);
    if (bad >= 0)
      throw py::value_error("synkern: target[" + std::to_string(bad) + "] is " +
                            std::to_string(target_at(rows, bad)) + ", expected a class in [0, " +
                            std::to_string(rows.classes) + ") or ignore_index (" + std::to_string(ignore_index) +
                            "); correct the label, or mark the row with ignore_index");
    statistics.resize(size_t(statistics_rows) * size_t(rows.rows) * item);
    rows.statistics = statistics.data();
    // The reduction is numpy's: every row's own denominator is 1.
    const int64_t first = stat_denominator * rows.rows;
    for (int64_t i = first; i < first + rows.rows; ++i) {
      if (item == sizeof(double))
        static_cast<double*>(rows.statistics)[i] = 1.0;
      else
        static_cast<float*>(rows.statistics)[i] = 1.f;
    }
  }

  static const void* data_of(const py::object& x) {
    return x.is_none() ? nullptr : py::reinterpret_borrow<py::array>(x).data();
  }
};

template <typename... Shape>
py::array new_array(size_t item, Shape... shape) {
  const std::vector<py::ssize_t> sizes{py::ssize_t(shape)...};
  return item == sizeof(double) ? py::array(py::array_t<double>(sizes)) : py::array(py::array_t<float>(sizes));
}

py::tuple row_loss(const py::array& logits, const py::array& target, const py::object& weight, const py::object& ratio,
                   const py::object& class_weight, int64_t loss, double p0, double p1, double p2,
                   double label_smoothing, double z_loss, int64_t ignore_index, bool derivatives) {
  NumpyProblem problem(logits, target, weight, ratio, class_weight, loss, p0, p1, p2, label_smoothing, z_loss,
                       ignore_index);
  const Rows& rows = problem.rows;
  py::array losses = new_array(problem.item, rows.rows);
  py::object gradient = py::none(), hessian = py::none();
  if (derivatives) {
    gradient = new_array(problem.item, rows.rows, rows.classes);
    hessian = new_array(problem.item, rows.rows, rows.classes);
  }
  void* losses_out = losses.mutable_data();
  void* gradient_out = derivatives ? py::reinterpret_borrow<py::array>(gradient).mutable_data() : nullptr;
  void* hessian_out = derivatives ? py::reinterpret_borrow<py::array>(hessian).mutable_data() : nullptr;
  {
    py::gil_scoped_release release;
    const RowKernels& kernels = row_kernels();
    kernels.forward(rows, losses_out, 0, rows.rows);
    if (derivatives) {
      kernels.backward(rows, nullptr, 1.0, gradient_out, nullptr, 0, rows.rows);
      kernels.hessian_diagonal(rows, hessian_out, 0, rows.rows);
    }
  }
  return py::make_tuple(losses, gradient, hessian, kept_weight(rows));
}

}  // namespace
}  // namespace synkern

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.doc() = "The CPU kernels on numpy arrays.";
  m.def("isa", [] { return synkern::row_kernels().isa; }, "Instruction set of the kernels in use.");
  m.def("compiler", [] { return SYNKERN_COMPILER; }, "Compiler that built them.");
  m.def("row_loss", &synkern::row_loss);
}
