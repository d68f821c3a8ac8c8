// Memory for large outputs. A gradient of 64 MB that is mapped anew at every step spends longer in page faults and
// unmapping than in the kernel, so the last one released is kept for the next.
#pragma once
#include <cstdint>

namespace synkern {

// Below this many bytes the ordinary allocator does as well.
constexpr int64_t large_output = 8 << 20;

// Memory of at least `bytes`, uninitialised, on huge pages where there are any; null where it cannot be had.
void* allocate_output(int64_t bytes);
// Gives it back: the one block kept for the next call is replaced. Marking it for the system to take (MADV_FREE) costs
// 4.6 ms at 64 MB, a third of the whole loss and backward.
void release_output(void* data);
// Unmaps the block that is kept.
void empty_output_cache();

}  // namespace synkern
