// The contraction kernels on buffers of the exact size, against a loop in double.
#pragma once
#include <random>

#include "core/contraction.h"
#include "native/checking.h"

namespace synkern {

template <typename E>
class Layer {
  using Storage = typename E::Storage;
  using A = typename E::Wide;

 public:
  Layer(int64_t rows, int64_t inputs, int64_t outputs, int64_t gap)
      : rows_(rows), inputs_(inputs), outputs_(outputs), a_stride_(inputs + gap), b_stride_(outputs + gap),
        a_(rows ? (rows - 1) * a_stride_ + inputs : 0), b_(rows ? (rows - 1) * b_stride_ + outputs : 0),
        v_(outputs * inputs), bias_(outputs), rstd_(rows), index_(rows) {
    fill(a_, rows ? (rows - 1) * a_stride_ + inputs : 0);
    fill(b_, rows ? (rows - 1) * b_stride_ + outputs : 0);
    fill(v_, outputs * inputs);
    for (int64_t j = 0; j < outputs; ++j) bias_[j] = A(uniform_(engine_));
    for (int64_t i = 0; i < rows; ++i) rstd_[i] = A(1.5 + uniform_(engine_));
    for (int64_t i = 0; i < rows; ++i) index_[i] = outputs ? i % outputs : 0;
  }

  void check_linear(bool bias) {
    const ContractionKernels& kernels = contraction_kernels();
    Array<A> packed(kernels.packed_size(outputs_, inputs_), 0xff);
    kernels.pack(E::dtype, v_.data(), inputs_, outputs_, inputs_, packed.data());
    const LinearContraction layer{E::dtype, a_.data(), b_.data(), packed.data(), bias ? bias_.data() : nullptr,
                                  a_stride_, b_stride_, inputs_, outputs_};
    run([&](double* out, int64_t begin, int64_t end) { kernels.linear(layer, out, begin, end); },
        [&](int64_t row, double& size) {
          double sum = 0;
          for (int64_t p = 0; p < outputs_; ++p) {
            double inner = bias ? double(bias_[p]) : 0, inner_size = std::fabs(inner);
            for (int64_t k = 0; k < inputs_; ++k) {
              const double term = E::decode(v_[p * inputs_ + k]) * E::decode(a_[row * a_stride_ + k]);
              inner += term;
              inner_size += std::fabs(term);
            }
            sum += E::decode(b_[row * b_stride_ + p]) * inner;
            size += std::fabs(E::decode(b_[row * b_stride_ + p])) * inner_size;
          }
          return sum;
        },
        "linear contraction");
  }

  // v's rows are the entries; a plays the gradient, so that both have the width `inputs`
  void check_embedding() {
    if (!outputs_) return;
    const EmbeddingContraction layer{E::dtype, index_.data(), a_.data(), v_.data(), a_stride_, inputs_, inputs_};
    run([&](double* out, int64_t begin, int64_t end) { contraction_kernels().embedding(layer, out, begin, end); },
        [&](int64_t row, double& size) {
          double sum = 0;
          for (int64_t k = 0; k < inputs_; ++k) {
            const double term = E::decode(a_[row * a_stride_ + k]) * E::decode(v_[index_[row] * inputs_ + k]);
            sum += term;
            size += std::fabs(term);
          }
          return sum;
        },
        "embedding contraction");
  }

  void check_norm(bool centred) {
    const NormContraction layer{E::dtype, b_.data(), b_.data(), centred ? rstd_.data() : nullptr, rstd_.data(),
                                bias_.data(), bias_.data(), b_stride_, b_stride_, outputs_};
    run([&](double* out, int64_t begin, int64_t end) { contraction_kernels().norm(layer, out, begin, end); },
        [&](int64_t row, double& size) {
          double sum = 0;
          const double mean = centred ? double(rstd_[row]) : 0;
          for (int64_t j = 0; j < outputs_; ++j) {
            const double x = E::decode(b_[row * b_stride_ + j]), w = double(bias_[j]);
            sum += x * (w * (x - mean) * double(rstd_[row]) + w);
            size += std::fabs(x * w) * (std::fabs(x) + std::fabs(mean) + 1) * (1 + double(rstd_[row]));
          }
          return sum;
        },
        "norm contraction");
  }

 private:
  void fill(Array<Storage>& x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = E::encode(uniform_(engine_));
  }

  // In two parts, as two threads would, and compared row by row.
  template <typename Kernel, typename Reference>
  void run(const Kernel& kernel, const Reference& reference, const char* what) {
    constexpr double relative = sizeof(A) == sizeof(double) ? 1e-12 : 4e-6;
    ++problems;
    Array<double> out(rows_, 0xff);
    kernel(out.data(), 0, rows_ / 2);
    kernel(out.data(), rows_ / 2, rows_);
    for (int64_t row = 0; row < rows_; ++row) {
      double size = 0;
      const double expected = reference(row, size);
      expect(std::fabs(out[row] - expected) <= relative * size,
             std::string(E::name) + " " + std::to_string(rows_) + " x " + std::to_string(inputs_) + " x " +
                 std::to_string(outputs_),
             what);
    }
  }

  int64_t rows_, inputs_, outputs_, a_stride_, b_stride_;
  Array<Storage> a_, b_, v_;
  Array<A> bias_, rstd_;
  Array<int64_t> index_;
  std::mt19937_64 engine_{7};
  std::uniform_real_distribution<double> uniform_{-1, 1};
};

template <typename E>
void check_contraction_of() {
  for (int64_t rows : {0, 1, 5, 6, 13, 97, 200})
    for (int64_t inputs : {1, 7, 256, 300})
      for (int64_t outputs : {1, 8, 15, 16, 17, 33})
        for (int64_t gap : {0, 3}) {
          Layer<E> layer(rows, inputs, outputs, gap);
          layer.check_linear(false);
          layer.check_linear(true);
          layer.check_embedding();
          layer.check_norm(true);
          layer.check_norm(false);
        }
}

inline void check_contraction() {
  check_contraction_of<Float32>();
  check_contraction_of<Float64>();
  check_contraction_of<BFloat16>();
  check_contraction_of<Float16>();
}

}  // namespace synkern
