#pragma once

#include "dtypes.h"

namespace mipfast {

// s1[g, f] = sum_{r in group g} act[r, f] * sum_k weights[k] * grad[k, r, f]
// s2[g, f] = sum_{r in group g} sum_k weights[k] * grad[k, r, f]^2
//
// grad    [steps, groups * rows_per_group, neurons] of grad_dtype, contiguous
// weights [steps] float32
// act     [groups * rows_per_group, neurons] of act_dtype, contiguous, or null (= ones)
// s1, s2  [groups, neurons] float32, written
//
// A non-finite gradient gives a non-finite sum. The result does not depend on the number of threads.
void riemann_accumulate(const void* grad, Dtype grad_dtype, const float* weights, const void* act,
                        Dtype act_dtype, float* s1, float* s2, int64_t steps, int64_t groups,
                        int64_t rows_per_group, int64_t neurons);

}  // namespace mipfast
