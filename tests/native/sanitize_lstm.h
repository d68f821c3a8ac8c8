// The LSTM's kernels on buffers of the exact size: the forward pass against the equations in double, the backward pass
// against the forward pass's own differences.
#pragma once
#include <random>

#include "core/lstm.h"
#include "native/checking.h"

namespace synkern {

template <typename E>
class LSTMProblem {
  using A = typename E::Wide;

 public:
  LSTMProblem(int64_t samples, int64_t steps, int64_t units)
      : n_(samples), t_(steps), h_(units), projection_(n_ * t_ * 4 * h_), weight_(4 * h_ * h_), first_(n_ * h_),
        packed_(lstm_kernels().packed_size(h_), 0xff), gates_(n_ * t_ * 4 * h_, 0xff), cells_(n_ * (t_ + 1) * h_, 0xff),
        states_(n_ * t_ * h_, 0xff) {
    std::mt19937_64 engine(3);
    std::uniform_real_distribution<double> uniform(-1, 1);
    for (int64_t j = 0; j < n_ * t_ * 4 * h_; ++j) projection_[j] = A(2 * uniform(engine));
    for (int64_t j = 0; j < 4 * h_ * h_; ++j) weight_[j] = A(uniform(engine) / double(h_));
    for (int64_t j = 0; j < n_ * h_; ++j) first_[j] = A(uniform(engine));
    for (int64_t s = 0; s < n_; ++s)
      for (int64_t j = 0; j < h_; ++j) cells_[s * (t_ + 1) * h_ + j] = A(uniform(engine));
  }

  void check() {
    ++problems;
    run_forward();
    for (int64_t s = 0; s < n_; ++s)
      for (int64_t t = 0; t < t_; ++t)
        for (int64_t j = 0; j < h_; ++j) check_step(s, t, j);
    check_backward();
  }

 private:
  std::string where() const {
    return std::string(E::name) + " " + std::to_string(n_) + " x " + std::to_string(t_) + " x " + std::to_string(h_);
  }
  double gate(int64_t s, int64_t t, int64_t which, int64_t j) const {
    double sum = double(projection_[((s * t_ + t) * 4 + which) * h_ + j]);
    for (int64_t k = 0; k < h_; ++k)
      sum += double(weight_[(which * h_ + j) * h_ + k]) *
             double(t ? states_[(s * t_ + t - 1) * h_ + k] : first_[s * h_ + k]);
    return which == 2 ? std::tanh(sum) : 1 / (1 + std::exp(-sum));
  }

  void run_forward() {
    const LSTMKernels& kernels = lstm_kernels();
    kernels.pack(E::dtype, weight_.data(), h_, packed_.data());
    const LSTMForward arrays{projection_.data(), first_.data(), gates_.data(), cells_.data(), states_.data()};
    kernels.forward({E::dtype, n_, t_, h_, packed_.data()}, arrays, 0, n_ / 2);
    kernels.forward({E::dtype, n_, t_, h_, packed_.data()}, arrays, n_ / 2, n_);
  }

  void check_step(int64_t s, int64_t t, int64_t j) {
    const double i = gate(s, t, 0, j), f = gate(s, t, 1, j), g = gate(s, t, 2, j), o = gate(s, t, 3, j);
    const double cell = f * double(cells_[(s * (t_ + 1) + t) * h_ + j]) + i * g;
    expect(std::fabs(double(cells_[(s * (t_ + 1) + t + 1) * h_ + j]) - cell) < 1e-5, where(), "LSTM cell");
    expect(std::fabs(double(states_[(s * t_ + t) * h_ + j]) - o * std::tanh(cell)) < 1e-5, where(), "LSTM state");
  }

  // The gradient of the sum of all states with respect to a projection's entry.
  void check_backward() {
    Array<A> ones(n_ * t_ * h_), grad(n_ * t_ * 4 * h_, 0xff), first(n_ * h_, 0xff), cell(n_ * h_, 0xff);
    for (int64_t j = 0; j < n_ * t_ * h_; ++j) ones[j] = A(1);
    const LSTMKernels& kernels = lstm_kernels();
    kernels.pack_transposed(E::dtype, weight_.data(), h_, packed_.data());
    const LSTMBackward arrays{gates_.data(), cells_.data(), ones.data(), nullptr, grad.data(), first.data(), cell.data()};
    kernels.backward({E::dtype, n_, t_, h_, packed_.data()}, arrays, 0, n_ / 2);
    kernels.backward({E::dtype, n_, t_, h_, packed_.data()}, arrays, n_ / 2, n_);
    if (sizeof(A) != sizeof(double) || n_ == 0 || t_ == 0) return;  // differences of float32 say little
    const double step = 1e-6;
    for (int64_t which = 0; which < 4; ++which) {
      const int64_t entry = which * h_ + h_ - 1;
      const double there = sum_with(entry, step), back = sum_with(entry, -step);
      expect(std::fabs((there - back) / (2 * step) - double(grad[entry])) < 1e-6, where(), "LSTM gradient");
    }
  }

  double sum_with(int64_t entry, double change) {
    const A before = projection_[entry];
    projection_[entry] = A(double(before) + change);
    run_forward();
    projection_[entry] = before;
    double sum = 0;
    for (int64_t j = 0; j < n_ * t_ * h_; ++j) sum += double(states_[j]);
    return sum;
  }

  int64_t n_, t_, h_;
  Array<A> projection_, weight_, first_, packed_, gates_, cells_, states_;
};

inline void check_lstm() {
  for (int64_t samples : {0, 1, 6, 7, 25})
    for (int64_t steps : {0, 1, 4})
      for (int64_t units : {1, 5, 8, 17}) {
        LSTMProblem<Float32>(samples, steps, units).check();
        LSTMProblem<Float64>(samples, steps, units).check();
      }
}

}  // namespace synkern
