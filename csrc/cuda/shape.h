// What a launch is described by.
#pragma once
#include <cstdint>

namespace synkern {

struct Device {
  int multiprocessors;
  int64_t shared_bytes;  // most dynamic shared memory of a block
  bool clusters;
};

struct Shape {
  int64_t blocks;
  int threads;
  int64_t shared_bytes = 0;
  int cluster = 1;  // blocks that share a row; `blocks` counts clusters
  int parts = 1;    // of a row, each for a block that knows nothing of the others
};

}  // namespace synkern
