// aqnsim._core: the kernels for Python, over raw addresses. It knows neither torch nor numpy: callers pass pointers to
// contiguous memory that they own, and the number of threads to use.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "core/philox.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using namespace aqn;
using namespace pybind11::literals;

namespace {

using StatsArray = std::array<double, 9>;

StatsArray as_array(const cpu::Stats& s) {
  return {s.count, s.changed, s.error2, s.reference2, s.injected2, s.injected_n, s.saturated, s.nonfinite, s.hits};
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

StatsArray cast(uintptr_t x, uintptr_t y, uintptr_t scales, uintptr_t words, int dtype, std::array<int64_t, 3> shape,
                bool row_major, const Element& element, const Scaling& scaling, float tensor_amax, bool unscaled,
                bool measure, int threads) {
  cpu::CastArgs a;
  a.x = at<const void>(x);
  a.y = at<void>(y);
  a.scales = at<void>(scales);
  a.words = at<const uint32_t>(words);
  a.dtype = static_cast<cpu::Dtype>(dtype);
  a.batch = shape[0];
  a.high = shape[1];
  a.wide = shape[2];
  a.row_major = row_major;
  a.element = element;
  a.scaling = scaling;
  a.tensor_amax = tensor_amax;
  a.unscaled = unscaled;
  a.threads = threads;
  py::gil_scoped_release release;
  return as_array(cpu::kernels().cast(a, measure));
}

StatsArray perturb(uintptr_t y, uintptr_t out, int in_dtype, int out_dtype, int64_t rows, int64_t columns,
                   uintptr_t row_ids, bool pairs, uintptr_t magnitude, const std::vector<ErrorModel>& models,
                   bool measure, int threads) {
  cpu::PerturbArgs a;
  a.y = at<const void>(y);
  a.out = at<void>(out);
  a.in_dtype = static_cast<cpu::Dtype>(in_dtype);
  a.out_dtype = static_cast<cpu::Dtype>(out_dtype);
  a.rows = rows;
  a.columns = columns;
  a.row_ids = {at<const int64_t>(row_ids), pairs};
  a.magnitude = at<const float>(magnitude);
  a.models = models.data();
  a.models_count = static_cast<int>(models.size());
  a.threads = threads;
  py::gil_scoped_release release;
  return as_array(cpu::kernels().perturb(a, measure));
}

void gemm(uintptr_t a, uintptr_t b, uintptr_t out, int dtype, std::array<int64_t, 4> shape,
          const Accumulator& accumulator, int threads) {
  cpu::GemmArgs g;
  g.a = at<const void>(a);
  g.b = at<const void>(b);
  g.out = at<float>(out);
  g.dtype = static_cast<cpu::Dtype>(dtype);
  g.batch = shape[0];
  g.m = shape[1];
  g.k = shape[2];
  g.n = shape[3];
  g.accumulator = accumulator;
  g.threads = threads;
  py::gil_scoped_release release;
  cpu::kernels().gemm(g);
}

// Returns how many NaNs are lost.
int64_t pack(uintptr_t x, uintptr_t y, uintptr_t scales, int dtype, std::array<int64_t, 2> shape,
             const Element& element, const Scaling& scaling, const Codes& codes, int scale_code, float tensor_amax,
             int threads) {
  cpu::PackArgs p = {};
  p.cast.x = at<const void>(x);
  p.cast.y = at<void>(y);
  p.cast.scales = at<void>(scales);
  p.cast.dtype = static_cast<cpu::Dtype>(dtype);
  p.cast.batch = 1;
  p.cast.high = shape[0];
  p.cast.wide = shape[1];
  p.cast.row_major = true;
  p.cast.element = element;
  p.cast.scaling = scaling;
  p.cast.tensor_amax = tensor_amax;
  p.cast.threads = threads;
  p.codes = codes;
  p.scale_code = static_cast<cpu::ScaleCode>(scale_code);
  py::gil_scoped_release release;
  return cpu::kernels().pack(p);
}

// Whether pack() has a loop for a format with blocks along the last axis.
bool packs(const Element& element, const Scaling& scaling, const Codes& codes) {
  if (codes.bits > 8 || scaling.rows > 1 || scaling.finite_only || scaling.searches()) return false;
  const int together = codes.bits == 4 ? 2 : codes.bits == 2 || codes.bits == 6 ? 4 : 1;
  if (scaling.columns % together != 0) return false;
  if (scaling.rule == Scale::kHif4) return element.rounding == Rounding::kNearestAway;
  return PlainEncoder::fits(element) || IntegerEncoder::fits(element, codes) || Hif8Encoder::fits(element);
}

int64_t encode(uintptr_t x, uintptr_t y, std::array<int64_t, 2> shape, const Codes& codes, int threads) {
  const cpu::EncodeArgs e = {at<const float>(x), at<void>(y), shape[0], shape[1], codes, threads};
  py::gil_scoped_release release;
  return cpu::kernels().encode(e);
}

void unpack(uintptr_t from, uintptr_t scales, uintptr_t y, int dtype, std::array<int64_t, 2> shape,
            std::array<int64_t, 4> blocks, const Codes& codes, int scale_code, int scale_use, float tensor_scale,
            int threads) {
  cpu::UnpackArgs u;
  u.from = at<const void>(from);
  u.scales = at<const void>(scales);
  u.y = at<void>(y);
  u.dtype = static_cast<cpu::Dtype>(dtype);
  u.rows = shape[0];
  u.columns = shape[1];
  u.along = blocks[0];
  u.inner = blocks[1];
  u.per_block = blocks[2];
  u.run = blocks[3];
  u.codes = codes;
  u.scale_code = static_cast<cpu::ScaleCode>(scale_code);
  u.scale_use = static_cast<cpu::ScaleUse>(scale_use);
  u.tensor_scale = tensor_scale;
  u.threads = threads;
  py::gil_scoped_release release;
  cpu::kernels().unpack(u);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "aqnsim's kernels over raw pointers; use aqnsim.ops instead.";
  m.def("isa", [] { return cpu::kernels().isa; });
  py::class_<Element>(m, "Element")
      .def(py::init([](int mantissa_bits, int min_exponent, int bias, float max, float max_negative, float min_normal,
                       float nan, int overflow, int rounding, int random_bits, bool is_signed, bool has_zero,
                       bool has_negative_zero, bool flush, bool tapered) {
             return Element{mantissa_bits,
                            min_exponent,
                            bias,
                            max,
                            max_negative,
                            min_normal,
                            nan,
                            static_cast<Overflow>(overflow),
                            static_cast<Rounding>(rounding),
                            random_bits,
                            is_signed,
                            has_zero,
                            has_negative_zero,
                            flush,
                            tapered};
           }),
           py::kw_only(), "mantissa_bits"_a, "min_exponent"_a, "bias"_a, "max"_a, "max_negative"_a, "min_normal"_a,
           "nan"_a, "overflow"_a, "rounding"_a, "random_bits"_a, "is_signed"_a, "has_zero"_a, "has_negative_zero"_a,
           "flush"_a, "tapered"_a);
  py::class_<Scaling>(m, "Scaling")
      .def(py::init([](int rule, int rows, int columns, int emax, uint32_t carry_from, int zero_exponent,
                       bool finite_only, float largest) {
             return Scaling{
                 static_cast<Scale>(rule), rows, columns, emax, carry_from, zero_exponent, finite_only, largest};
           }),
           py::kw_only(), "rule"_a, "rows"_a = 0, "columns"_a = 0, "emax"_a = 0, "carry_from"_a = 0,
           "zero_exponent"_a = 0, "finite_only"_a = false, "largest"_a = 0.0f);
  py::class_<Accumulator>(m, "Accumulator")
      .def(py::init([](int fraction_bits, int chunk, int order, bool nearest, int result_bits, bool nearest_result,
                       bool flush, int min_exponent, int64_t promote) {
             return Accumulator{fraction_bits, chunk,        static_cast<Order>(order),
                                nearest,       result_bits,  nearest_result,
                                flush,         min_exponent, promote};
           }),
           py::kw_only(), "fraction_bits"_a, "chunk"_a, "order"_a, "nearest"_a, "result_bits"_a, "nearest_result"_a,
           "flush"_a, "min_exponent"_a, "promote"_a);
  py::class_<Codes>(m, "Codes")
      .def(py::init([](int spelling, int bits, int mantissa_bits, int min_exponent, bool is_signed, bool has_zero,
                       bool has_negative_zero, int inf, int nan) {
             return Codes{static_cast<Spelling>(spelling),
                          bits,
                          mantissa_bits,
                          min_exponent,
                          is_signed,
                          has_zero,
                          has_negative_zero,
                          inf,
                          nan};
           }),
           py::kw_only(), "spelling"_a, "bits"_a, "mantissa_bits"_a, "min_exponent"_a, "is_signed"_a, "has_zero"_a,
           "has_negative_zero"_a, "inf"_a, "nan"_a);
  m.def("cast", &cast);
  m.def("packs", &packs);
  m.def("pack", &pack);
  m.def("encode", &encode);
  m.def("unpack", &unpack);
  m.def("tensor_scale", [](const Scaling& k, float amax) { return TensorScale(k, amax).stored; });
  m.def("random_words", [](uintptr_t out, uintptr_t row_ids, bool pairs, int64_t rows, int64_t columns, uint64_t key,
                           uint32_t word, int threads) {
    py::gil_scoped_release release;
    cpu::kernels().random_words(at<uint32_t>(out), {at<const int64_t>(row_ids), pairs}, rows, columns, key, word,
                                threads);
  });
  py::class_<ErrorModel>(m, "ErrorModel")
      .def(py::init([](int kind, uint64_t key, uint64_t hit_key, uint32_t word, uint32_t last_hit, float a, float b,
                       bool by_magnitude, int lanes, int bit, int low_bit) {
             return ErrorModel{
                 static_cast<ErrorKind>(kind), key, hit_key, word, last_hit, a, b, by_magnitude, lanes, bit, low_bit};
           }),
           py::kw_only(), "kind"_a, "key"_a, "hit_key"_a, "word"_a, "last_hit"_a, "a"_a, "b"_a, "by_magnitude"_a,
           "lanes"_a, "bit"_a, "low_bit"_a);
  m.def("perturb", &perturb);
  m.def("gemm", &gemm);
  m.def("amax", [](uintptr_t x, int dtype, int64_t n, int threads) {
    py::gil_scoped_release release;
    return cpu::kernels().amax(at<const void>(x), static_cast<cpu::Dtype>(dtype), n, threads);
  });
  m.def("normal", [](uintptr_t out, int64_t rows, int64_t columns, uint64_t key, uint32_t word) {
    py::gil_scoped_release release;
    cpu::kernels().normal(at<float>(out), rows, columns, key, word);
  });
  m.def("philox", [](std::array<uint32_t, 4> c, std::array<uint32_t, 2> k) {
    philox4x32_10(c[0], c[1], c[2], c[3], k[0], k[1]);
    return c;
  });
}
