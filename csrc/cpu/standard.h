// Standard headers, to be included before a target pragma: what they define must stay callable on
// every processor, since the linker keeps only one copy of it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>
