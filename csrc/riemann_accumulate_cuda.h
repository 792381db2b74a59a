#pragma once

#include <string>

#include "dtypes.h"

namespace mipfast {

// Why no kernel can run here, in CUDA's words; empty where one can.
std::string cuda_trouble();

// As riemann_accumulate, for device pointers, on `stream` (a cudaStream_t) of the current device. A group's rows are
// summed in runs of rows_per_split neighbours: s1, s2 [splits, groups, neurons], to be summed over the splits, of which
// there are ceil(rows_per_group / rows_per_split). Throws std::runtime_error for a launch that CUDA refuses.
void riemann_accumulate_cuda(const void* grad, Dtype grad_dtype, const float* weights, const void* act,
                             Dtype act_dtype, float* s1, float* s2, int64_t steps, int64_t groups,
                             int64_t rows_per_group, int64_t rows_per_split, int64_t neurons, void* stream);

}  // namespace mipfast
