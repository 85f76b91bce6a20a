// The kernels for what every processor of the architecture has: SSE2 on x86-64, NEON on AArch64.
#define FASTMT_ISA baseline
#define FASTMT_LANES 4

#include "cpu/kernels.h"
