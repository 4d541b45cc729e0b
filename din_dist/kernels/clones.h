// Before a function: it is compiled once for each instruction set, and which to use is found out when it is loaded. For plain
// loops; what has more to choose from is in attention.cc.
#pragma once

#if defined(__x86_64__)
#define DIN_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DIN_CLONES
#endif
