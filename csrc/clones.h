#pragma once

#include <cstdint>

// MIPFAST_CLONES before a function: compiled for AVX-512, AVX2 and any x86-64, the best chosen when the library is
// loaded. Without it bf16 takes twice as long and fp16 five times; fp32 gains nothing. Needs GCC's support for
// templates and glibc's ifunc; elsewhere the function is compiled once, for what the compiler was told to assume.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__x86_64__) && defined(__GLIBC__)
#define MIPFAST_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MIPFAST_CLONES
#endif

// MIPFAST_INLINE: what a clone calls must become part of it, or it is the plain x86-64 code that runs.
// MIPFAST_PREFETCH: into the second-level cache.
#if defined(__GNUC__)
#define MIPFAST_INLINE __attribute__((always_inline)) inline
#define MIPFAST_PREFETCH(address) __builtin_prefetch(address, 0, 2)
#else
#define MIPFAST_INLINE inline
#define MIPFAST_PREFETCH(address)
#endif
