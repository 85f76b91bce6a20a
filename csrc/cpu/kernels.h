// The kernels of one instruction set, collected in its table; included once for each.
#pragma once

#include "cpu/cells_kernel.h"
#include "cpu/confidence_kernel.h"
#include "cpu/consistency_kernel.h"
#include "cpu/cross_entropy_kernel.h"
#include "cpu/ema_kernel.h"
#include "cpu/noise_kernel.h"

#define FASTMT_NAME_OF(isa) #isa
#define FASTMT_NAME(isa) FASTMT_NAME_OF(isa)

namespace FASTMT_ISA {

extern const fastmt::Kernels table{
    FASTMT_NAME(FASTMT_ISA), W,
    confidence,              consistency,
    cross_entropy,           label_sums,
    cells_confidence,        cells_consistency,
    cells_cross_entropy,     cells_join,
    gaussian_noise,          ema,
    scale};

}  // namespace FASTMT_ISA
