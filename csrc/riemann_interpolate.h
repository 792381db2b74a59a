#pragma once

#include "dtypes.h"

namespace mipfast {

// out[k, r, f] = alphas[k] * act[r, f], rounded once; with names, for the named f alone, and act[r, f] elsewhere
//
// act    [rows, neurons] of dtype, contiguous
// alphas [steps] float32
// names  [rows, names_per_row] below neurons, negative = none, contiguous, or null (= every neuron)
// out    [steps, rows, neurons] of dtype, written
void riemann_interpolate(const void* act, Dtype dtype, const float* alphas, const int64_t* names, void* out,
                         int64_t steps, int64_t rows, int64_t neurons, int64_t names_per_row);

}  // namespace mipfast
