#include "tile.h"
#define BODY "loops_body.inc"
#include "each_target.h"
extern const Variant kLoops[] = {{"loops_pragma", "sse2", sse2::kernel},
                                 {"loops_pragma", "avx2", avx2::kernel},
                                 {"loops_pragma", "avx512", avx512::kernel}};
