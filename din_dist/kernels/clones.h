// A prefix for functions that are compiled once for each instruction set; the loader chooses the version. It is meant
// for plain loops. attention.cc chooses its instruction set itself.
#pragma once

#if defined(__x86_64__)
#define DIN_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DIN_CLONES
#endif
