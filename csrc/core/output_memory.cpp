#include "core/output_memory.h"

#if defined(__linux__)
#include <sys/mman.h>

#include <atomic>

namespace synkern {
namespace {

constexpr int64_t huge_page = 2 << 20;

struct Block {
  void* mapping;
  int64_t mapped, capacity;
};

// The header lies in the page before the data, outside the range that huge pages are asked for.
Block* header(void* data) { return static_cast<Block*>(data) - 1; }

// One slot, exchanged atomically: no lock for a fork to leave held, and a child's copy is its own.
std::atomic<void*> kept{nullptr};

void unmap(void* data) {
  const Block block = *header(data);
  munmap(block.mapping, size_t(block.mapped));
}

}  // namespace

void* allocate_output(int64_t bytes) {
  if (void* data = kept.exchange(nullptr)) {
    const int64_t capacity = header(data)->capacity;
    if (capacity >= bytes && capacity / 2 <= bytes) return data;
    unmap(data);
  }
  const int64_t capacity = (bytes + huge_page - 1) / huge_page * huge_page, mapped = capacity + 2 * huge_page;
  void* mapping = mmap(nullptr, size_t(mapped), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) return nullptr;
  const uintptr_t data = (uintptr_t(mapping) + huge_page) / huge_page * huge_page;
  madvise(reinterpret_cast<void*>(data), size_t(capacity), MADV_HUGEPAGE);  // advice: a refusal costs speed alone
  *header(reinterpret_cast<void*>(data)) = {mapping, mapped, capacity};
  return reinterpret_cast<void*>(data);
}

void release_output(void* data) {
  if (void* previous = kept.exchange(data)) unmap(previous);
}

void empty_output_cache() {
  if (void* data = kept.exchange(nullptr)) unmap(data);
}

}  // namespace synkern

#else

namespace synkern {
void* allocate_output(int64_t) { return nullptr; }
void release_output(void*) {}
void empty_output_cache() {}
}  // namespace synkern

#endif
