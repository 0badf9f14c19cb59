// Picks the instruction set once, at the first call.
#include <cstdlib>
#include <cstring>

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
#endif

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#if defined(AQN_X86)
    __builtin_cpu_init();
    const char* limit = std::getenv("AQNSIM_ISA");  // lets a test run the narrower code on a wide machine
    const bool below512 = limit && std::strcmp(limit, "avx512") != 0,
               below2 = limit && std::strcmp(limit, "baseline") == 0;
    if (!below512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      return avx512::table;
    if (!below2 && __builtin_cpu_supports("avx2")) return avx2::table;
#endif
    return baseline::table;
  }();
  return chosen;
}

}  // namespace aqn::cpu
