// How an op misses the right answer, given a standard normal z of the element's logical coordinates.
#pragma once

#include "bits.h"

namespace aqn {

enum class ErrorKind : int { kRelativeGaussian = 0, kAbsoluteGaussian = 1 };

// y' = y + (sigma z) |y|, or y + sigma z. Infinities and NaNs pass unchanged.
AQN_HD float perturbed(ErrorKind kind, float sigma, float y, float z) {
  const float step = sigma * z;
  const float missed = y + (kind == ErrorKind::kRelativeGaussian ? step * abs_of(y) : step);
  return is_finite(y) ? missed : y;
}

}  // namespace aqn
