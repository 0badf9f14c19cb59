// The baseline kernels as a program, so that they can run on an emulated processor: one operation on the values of a
// file. Numbers come as integers, floats as their bits, in the order in which test_neon.py writes them.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "../csrc/cpu/kernels.h"

namespace aqn::cpu::baseline {
extern const Kernels table;
}

using namespace aqn;

namespace {

struct Numbers {
  char** next;
  int64_t integer() { return static_cast<int64_t>(std::strtoull(*next++, nullptr, 10)); }
  float real() { return float_of(static_cast<uint32_t>(integer())); }
};

Element element(Numbers& n) {
  Element e = {};
  e.mantissa_bits = static_cast<int>(n.integer());
  e.min_exponent = static_cast<int>(n.integer());
  e.bias = static_cast<int>(n.integer());
  e.max = n.real();
  e.max_negative = n.real();
  e.min_normal = n.real();
  e.nan = n.real();
  e.overflow = static_cast<Overflow>(n.integer());
  e.rounding = static_cast<Rounding>(n.integer());
  e.random_bits = static_cast<int>(n.integer());
  e.is_signed = n.integer();
  e.has_zero = n.integer();
  e.has_negative_zero = n.integer();
  e.flush = n.integer();
  e.tapered = n.integer();
  return e;
}

Scaling scaling(Numbers& n) {
  Scaling s = {};
  s.rule = static_cast<Scale>(n.integer());
  s.rows = static_cast<int>(n.integer());
  s.columns = static_cast<int>(n.integer());
  s.emax = static_cast<int>(n.integer());
  s.carry_from = static_cast<uint32_t>(n.integer());
  s.zero_exponent = static_cast<int>(n.integer());
  s.finite_only = n.integer();
  s.largest = n.real();
  return s;
}

void cast(Numbers n, const char* x, char* y) {
  cpu::CastArgs a = {};
  a.x = x;
  a.y = y;
  a.threads = 1;
  a.dtype = static_cast<cpu::Dtype>(n.integer());
  a.batch = n.integer();
  a.high = n.integer();
  a.wide = n.integer();
  a.row_major = n.integer();
  const bool by_tensor = n.integer();
  a.draws.columns = n.integer();
  a.draws.key = static_cast<uint64_t>(n.integer());
  a.draws.word = static_cast<uint32_t>(n.integer());
  a.element = element(n);
  a.scaling = scaling(n);
  if (by_tensor) a.tensor_amax = cpu::baseline::table.amax(x, a.dtype, a.batch * a.high * a.wide, 1);
  cpu::baseline::table.cast(a, false);
}

void perturb(Numbers n, const char* x, char* y) {
  cpu::PerturbArgs a = {};
  ErrorModel model = {};
  a.y = x;
  a.out = y;
  a.threads = 1;
  a.models = &model;
  a.models_count = 1;
  a.in_dtype = a.out_dtype = static_cast<cpu::Dtype>(n.integer());
  a.rows = n.integer();
  a.columns = n.integer();
  model.a = n.real();
  model.key = static_cast<uint64_t>(n.integer());
  model.word = static_cast<uint32_t>(n.integer());
  cpu::baseline::table.perturb(a, false);
}

}  // namespace

// neon_driver cast|perturb SIZE NUMBERS...: SIZE bytes from standard input, as many to standard output.
int main(int, char** argv) {
  std::vector<char> x(std::strtoull(argv[2], nullptr, 10)), y(x.size());
  if (std::fread(x.data(), 1, x.size(), stdin) != x.size()) return 2;
  (std::string(argv[1]) == "cast" ? cast : perturb)({argv + 3}, x.data(), y.data());
  return std::fwrite(y.data(), 1, y.size(), stdout) == y.size() ? 0 : 3;
}
