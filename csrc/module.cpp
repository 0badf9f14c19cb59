// aqnsim._core: the kernels for Python, over raw addresses. It knows neither torch nor numpy: callers pass pointers to
// contiguous memory that they own, and the number of threads to use.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>

#include "core/philox.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using namespace aqn;

namespace {

using StatsArray = std::array<double, 8>;

StatsArray as_array(const cpu::Stats& s) {
  return {s.count, s.changed, s.error2, s.reference2, s.injected2, s.injected_n, s.saturated, s.nonfinite};
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

StatsArray cast(uintptr_t x, uintptr_t y, uintptr_t scales, int dtype, std::array<int64_t, 3> shape, int64_t block,
                int mantissa_bits, int min_exponent, float max, int overflow, int scale, float tensor_amax,
                bool unscaled, bool measure, int threads) {
  cpu::CastArgs a;
  a.x = at<const void>(x);
  a.y = at<void>(y);
  a.scales = at<float>(scales);
  a.dtype = static_cast<cpu::Dtype>(dtype);
  a.outer = shape[0];
  a.n = shape[1];
  a.inner = shape[2];
  a.block = block;
  a.element = {mantissa_bits, min_exponent, max, static_cast<Overflow>(overflow)};
  a.scale = static_cast<Scale>(scale);
  a.emax = std::ilogb(max);
  a.tensor_amax = tensor_amax;
  a.unscaled = unscaled;
  a.threads = threads;
  py::gil_scoped_release release;
  return as_array(cpu::kernels().cast(a, measure));
}

StatsArray perturb(uintptr_t y, uintptr_t out, int in_dtype, int out_dtype, int64_t rows, int64_t columns,
                   uintptr_t row_ids, uint64_t key, uint32_t step, int kind, float sigma, bool measure, int threads) {
  cpu::PerturbArgs a;
  a.y = at<const void>(y);
  a.out = at<void>(out);
  a.in_dtype = static_cast<cpu::Dtype>(in_dtype);
  a.out_dtype = static_cast<cpu::Dtype>(out_dtype);
  a.rows = rows;
  a.columns = columns;
  a.row_ids = at<const int64_t>(row_ids);
  a.key = key;
  a.step = step;
  a.kind = static_cast<ErrorKind>(kind);
  a.sigma = sigma;
  a.threads = threads;
  py::gil_scoped_release release;
  return as_array(cpu::kernels().perturb(a, measure));
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "aqnsim's kernels over raw pointers; use aqnsim.ops instead.";
  m.def("isa", [] { return cpu::kernels().isa; });
  m.def("cast", &cast);
  m.def("perturb", &perturb);
  m.def("amax", [](uintptr_t x, int dtype, int64_t n, int threads) {
    py::gil_scoped_release release;
    return cpu::kernels().amax(at<const void>(x), static_cast<cpu::Dtype>(dtype), n, threads);
  });
  m.def("normal", [](uintptr_t out, int64_t rows, int64_t columns, uint64_t key, uint32_t step) {
    py::gil_scoped_release release;
    cpu::kernels().normal(at<float>(out), rows, columns, key, step);
  });
  m.def("philox", [](std::array<uint32_t, 4> c, std::array<uint32_t, 2> k) {
    philox4x32_10(c[0], c[1], c[2], c[3], k[0], k[1]);
    return c;
  });
}
