// Picks the instruction set once, at the first call.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace aqn::cpu {

namespace baseline {
extern const Kernels table;
}
#if defined(AQN_X86)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512bf16 {
extern const Kernels table;
}
#endif

namespace {

std::vector<const Kernels*> runnable() {  // narrowest first
  std::vector<const Kernels*> tables = {&baseline::table};
#if defined(AQN_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) tables.push_back(&avx2::table);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    tables.push_back(&avx512::table);
    if (__builtin_cpu_supports("avx512bf16")) tables.push_back(&avx512bf16::table);
  }
#endif
  return tables;
}

// AQNSIM_ISA names a table, so that the narrower code can be tested on a wide machine.
const Kernels& choose() {
  const std::vector<const Kernels*> tables = runnable();
  const char* asked = std::getenv("AQNSIM_ISA");
  if (!asked) return *tables.back();
  std::string known;
  for (const Kernels* t : tables) {
    if (std::strcmp(t->isa, asked) == 0) return *t;
    known += std::string(known.empty() ? "" : ", ") + t->isa;
  }
  throw std::runtime_error("AQNSIM_ISA=" + std::string(asked) + " cannot run here; this processor runs: " + known);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace aqn::cpu
