// Functions that fastmt/native.py calls past PyTorch's dispatcher, which would take longer than they.
#pragma once

#define FASTMT_EXPORTED extern "C" __attribute__((visibility("default")))
