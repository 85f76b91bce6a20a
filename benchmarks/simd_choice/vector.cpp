#include "tile.h"
#define BODY "vector_body.inc"
#include "each_target.h"
extern const Variant kVector[] = {{"vector_ext", "sse2", sse2::kernel},
                                  {"vector_ext", "avx2", avx2::kernel},
                                  {"vector_ext", "avx512", avx512::kernel}};
