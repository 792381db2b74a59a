#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>

#include "riemann_accumulate_cuda.h"

namespace mipfast {
namespace {

constexpr int kThreads = 256;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }

// Neighbours that one thread loads at once.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T values[N];
};

// One thread per Lanes neurons of one split of one group. No atomics: the same input gives the same bits.
template <int Lanes, typename Grad, typename Act>
__global__ void accumulate(const Grad* grad, const float* weights, const Act* act, float* s1, float* s2,
                           int64_t steps, int64_t groups, int64_t rows_per_group, int64_t rows_per_split,
                           int64_t neurons) {
  const int64_t packs = neurons / Lanes;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t group = thread / packs % groups;
  const int64_t split = thread / packs / groups;
  const int64_t begin = split * rows_per_split;
  if (begin >= rows_per_group) return;
  const int64_t end = min(begin + rows_per_split, rows_per_group);
  const int64_t first = thread % packs * Lanes;
  const int64_t step_stride = groups * rows_per_group * neurons;

  float sum1[Lanes] = {}, sum2[Lanes] = {};
  for (int64_t row = group * rows_per_group + begin; row < group * rows_per_group + end; ++row) {
    const int64_t offset = row * neurons + first;
    float part1[Lanes] = {};
#pragma unroll 4
    for (int64_t k = 0; k < steps; ++k) {
      const auto g = *reinterpret_cast<const Pack<Grad, Lanes>*>(grad + k * step_stride + offset);
      const float w = weights[k];
#pragma unroll
      for (int i = 0; i < Lanes; ++i) {
        const float value = to_float(g.values[i]);
        part1[i] += w * value;
        sum2[i] += w * value * value;
      }
    }
    if (act) {
      const auto a = *reinterpret_cast<const Pack<Act, Lanes>*>(act + offset);
#pragma unroll
      for (int i = 0; i < Lanes; ++i) part1[i] *= to_float(a.values[i]);
    }
#pragma unroll
    for (int i = 0; i < Lanes; ++i) sum1[i] += part1[i];
  }
  const int64_t out = (split * groups + group) * neurons + first;
#pragma unroll
  for (int i = 0; i < Lanes; ++i) s1[out + i] = sum1[i], s2[out + i] = sum2[i];
}

template <int Lanes, typename Grad, typename Act>
void launch(const Grad* grad, const float* weights, const Act* act, float* s1, float* s2, int64_t steps,
            int64_t groups, int64_t rows_per_group, int64_t rows_per_split, int64_t neurons, cudaStream_t stream) {
  const int64_t splits = (rows_per_group + rows_per_split - 1) / rows_per_split;
  const int64_t blocks = (splits * groups * (neurons / Lanes) + kThreads - 1) / kThreads;
  accumulate<Lanes><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      grad, weights, act, s1, s2, steps, groups, rows_per_group, rows_per_split, neurons);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

template <typename Then>
void with_device_type(Dtype dtype, const void* data, Then then) {
  switch (dtype) {
    case Dtype::float32: return then(static_cast<const float*>(data));
    case Dtype::bfloat16: return then(static_cast<const __nv_bfloat16*>(data));
    case Dtype::float16: return then(static_cast<const __half*>(data));
  }
}

}  // namespace

std::string cuda_trouble() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return count ? "" : "no CUDA device";
}

void riemann_accumulate_cuda(const void* grad, Dtype grad_dtype, const float* weights, const void* act,
                             Dtype act_dtype, float* s1, float* s2, int64_t steps, int64_t groups,
                             int64_t rows_per_group, int64_t rows_per_split, int64_t neurons, void* stream) {
  if (rows_per_group == 1) neurons *= groups, groups = 1;  // nothing to sum over: one long row
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  const bool packed = neurons % 4 == 0 && aligned(grad) && aligned(act);
  with_device_type(grad_dtype, grad, [&](auto* g) {
    with_device_type(act_dtype, act, [&](auto* a) {
      const auto cuda_stream = static_cast<cudaStream_t>(stream);
      if (packed)
        launch<4>(g, weights, a, s1, s2, steps, groups, rows_per_group, rows_per_split, neurons, cuda_stream);
      else
        launch<1>(g, weights, a, s1, s2, steps, groups, rows_per_group, rows_per_split, neurons, cuda_stream);
    });
  });
}

}  // namespace mipfast
