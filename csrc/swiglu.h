#pragma once

#include "dtypes.h"

namespace mipfast {

// out[i] = gate[i] sigmoid(gate[i]) up[i]
// d_gate[i] = d_out[i] d out / d gate, d_up[i] = d_out[i] gate[i] sigmoid(gate[i])
//
// All [size] of one dtype, contiguous; arithmetic in float32, rounded once. Neither depends on the number of threads.
void swiglu(const void* gate, const void* up, Dtype dtype, void* out, int64_t size);

void swiglu_gradients(const void* d_out, const void* gate, const void* up, Dtype dtype, void* d_gate, void* d_up,
                      int64_t size);

}  // namespace mipfast
