// The CPU kernels, compiled once for each instruction set (AQN_ISA names it). Written so that the compiler vectorises
// the inner loops: fixed trip counts over small local arrays, no branches on data.
#include "kernels.h"

#include "cast.h"
#include "gemm.h"
#include "pack.h"
#include "perturb.h"

namespace aqn::cpu::AQN_ISA {

extern const Kernels table;
const Kernels table = {AQN_ISA_NAME, cast, perturb, amax, normal, random_words, gemm, pack, encode, unpack};

}  // namespace aqn::cpu::AQN_ISA
