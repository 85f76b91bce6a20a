#include "tile.h"
#define KERNEL clones_kernel
#define KERNEL_ATTR \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#include "loops.inc"
extern const Variant kClones[] = {{"loops_clones", "dispatched", clones_kernel}};
