// The CPU kernels, compiled once for each instruction set (AQN_ISA names it). Written so that the compiler vectorises
// the inner loops: fixed trip counts over small local arrays, no branches on data.
#include "kernels.h"

#include "finish.h"
#include "gemm.h"
#include "pack.h"

namespace aqn::cpu::AQN_ISA {

extern const Kernels table;
const Kernels table = {AQN_ISA_NAME, cast, perturb, finish, amax,   normal,
                       random_words, gemm, pack,    encode, unpack, nullptr};

}  // namespace aqn::cpu::AQN_ISA
