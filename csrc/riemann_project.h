#pragma once

#include "dtypes.h"

namespace mipfast {

// out[k, r, h] = base[r, h] + (alphas[k] - 1) * sum over the named f of act[r, f] * weight[h, f], rounded once
//
// base   [rows, hidden] of dtype, contiguous: act's product with weight
// act    [rows, neurons] of dtype, contiguous
// weight [hidden, neurons] of dtype, contiguous
// alphas [steps] float32
// names  [rows, names_per_row] below neurons, none twice in a row, negative = none, contiguous
// out    [steps, rows, hidden] of dtype, written
void riemann_project(const void* base, const void* act, const void* weight, Dtype dtype, const float* alphas,
                     const int64_t* names, void* out, int64_t steps, int64_t rows, int64_t hidden, int64_t neurons,
                     int64_t names_per_row);

}  // namespace mipfast
