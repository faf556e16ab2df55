// A heap for the large tensors of a CPU: memory that is freed stays in the process, in one region, given out best fit
// first, with neighbours that are free joined. engine/allocator.py says why, engine/plan.py's Heap computes the same.
//
// glibc's heap keeps freed memory as well, but its posix_memalign, which torch calls, looks for 96 bytes more than it
// then hands out: the hole that a tensor leaves is by itself too small for the next one of its size. And small objects
// lie between the holes.
//
// torch has no way to be given another allocator but a C++ class that is compiled against its version, whose errors,
// reports to the profiler and fills would be ours to repeat. Its own one calls two functions of the C library, through
// a table that the loader fills; this puts ours there (in libc10 alone), which hand on all that is small.
#include "tritium.h"

#include <cstddef>
#include <cstdlib>

#if defined(__linux__) && defined(__LP64__)
#include <elf.h>
#include <link.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <set>
#include <utility>

namespace {

constexpr size_t UNIT = 64;             // what torch aligns to, and what a block's size is rounded up to
constexpr size_t GAP = 64;              // or tensors of 2^n bytes lie 2^n apart, and what reads several misses the cache
constexpr size_t SMALLEST = 256 << 10;  // smaller ones are glibc's
// engine/plan.py holds the same three numbers

// Blocks in [0, reserve), addresses relative to the region's. Never destroyed: tensors are freed after main, too.
struct Heap {
  struct Block {
    size_t size;
    bool taken;
  };
  std::map<size_t, Block> blocks;              // by address, side by side, up to the top
  std::set<std::pair<size_t, size_t>> unused;  // (size, address) of those that are not taken
  char* base = nullptr;
  size_t reserve = 0, top = 0, most = 0, taken = 0;
  int open = 0;  // how often it was: above 0 it takes requests and keeps what is freed
  pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

  void* take(size_t size) {
    const size_t need = (size + UNIT - 1) / UNIT * UNIT + GAP;
    size_t at;
    const auto fit = unused.lower_bound({need, 0});
    if (fit != unused.end()) {
      const auto [length, start] = *fit;
      at = start;
      unused.erase(fit);
      if (length > need) {
        blocks[at + need] = {length - need, false};
        unused.insert({length - need, at + need});
      }
    } else {
      if (need > reserve - top) return nullptr;
      at = top;
      top += need;
      if (top > most) most = top;
    }
    blocks[at] = {need, true};
    taken += need;
    return base + at;
  }

  void give(size_t at) {
    auto block = blocks.find(at);
    if (block == blocks.end() || !block->second.taken) {
      fputs("tritium: the memory of a tensor was freed twice, or was never a tensor's; the process ends\n", stderr);
      abort();
    }
    taken -= block->second.size;
    block->second.taken = false;
    const auto next = std::next(block);
    if (next != blocks.end() && !next->second.taken) {
      unused.erase({next->second.size, next->first});
      block->second.size += next->second.size;
      blocks.erase(next);
    }
    if (block != blocks.begin()) {
      const auto before = std::prev(block);
      if (!before->second.taken) {
        unused.erase({before->second.size, before->first});
        before->second.size += block->second.size;
        blocks.erase(block);
        block = before;
      }
    }
    const auto [start, length] = std::pair(block->first, block->second.size);
    if (start + length == top) {
      top = start;
      blocks.erase(block);
    } else {
      unused.insert({length, start});
    }
    if (!open) give_back(start, length);
  }

  // Whole pages of a part that is not taken go back to the system.
  void give_back(size_t start, size_t length) {
    const size_t page = sysconf(_SC_PAGESIZE);
    const size_t begin = (start + page - 1) / page * page, end = (start + length) / page * page;
    if (begin < end) madvise(base + begin, end - begin, MADV_DONTNEED);
  }
};

Heap* const heap = new Heap;

struct Held {
  Held() { pthread_mutex_lock(&heap->lock); }
  ~Held() { pthread_mutex_unlock(&heap->lock); }
};

int take(void** result, size_t alignment, size_t size) {
  if (size >= SMALLEST && alignment <= UNIT) {
    const Held held;
    if (heap->open && (*result = heap->take(size)) != nullptr) return 0;
  }
  return posix_memalign(result, alignment, size);
}

void give(void* pointer) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(heap->base);
  if (at >= heap->reserve) return free(pointer);
  const Held held;
  heap->give(at);
}

// Where the loader has written the addresses of the two functions for one library: found by the library's relocations.
struct Search {
  const char* library;
  void* value[2];
  int found[2];
};

int hook(dl_phdr_info* info, size_t, void* argument) {
  auto* search = static_cast<Search*>(argument);
  const char* slash = strrchr(info->dlpi_name, '/');
  if (strcmp(slash ? slash + 1 : info->dlpi_name, search->library) != 0) return 0;
  const ElfW(Dyn)* dynamic = nullptr;
  for (int i = 0; i < info->dlpi_phnum; ++i)
    if (info->dlpi_phdr[i].p_type == PT_DYNAMIC)
      dynamic = reinterpret_cast<const ElfW(Dyn)*>(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
  if (!dynamic) return 1;
  const ElfW(Sym)* symbols = nullptr;
  const char* strings = nullptr;
  struct {
    const ElfW(Rela)* first = nullptr;
    size_t bytes = 0;
  } tables[2];
  for (; dynamic->d_tag != DT_NULL; ++dynamic) {
    // glibc has added the library's address here already; other loaders leave it to the reader
    const auto address = dynamic->d_un.d_ptr < info->dlpi_addr ? info->dlpi_addr + dynamic->d_un.d_ptr
                                                               : dynamic->d_un.d_ptr;
    if (dynamic->d_tag == DT_SYMTAB) symbols = reinterpret_cast<const ElfW(Sym)*>(address);
    if (dynamic->d_tag == DT_STRTAB) strings = reinterpret_cast<const char*>(address);
    if (dynamic->d_tag == DT_RELA) tables[0].first = reinterpret_cast<const ElfW(Rela)*>(address);
    if (dynamic->d_tag == DT_RELASZ) tables[0].bytes = dynamic->d_un.d_val;
    if (dynamic->d_tag == DT_JMPREL) tables[1].first = reinterpret_cast<const ElfW(Rela)*>(address);
    if (dynamic->d_tag == DT_PLTRELSZ) tables[1].bytes = dynamic->d_un.d_val;
  }
  if (!symbols || !strings) return 1;
  static const char* const names[2] = {"posix_memalign", "free"};
  // Both are found, and may be written to, before one is changed: with one of the two ours, memory of the one heap would
  // be given to the other.
  enum { FIND, UNLOCK, WRITE };
  for (const int phase : {FIND, UNLOCK, WRITE}) {
    if (phase == UNLOCK && !(search->found[0] && search->found[1])) return 1;
    for (const auto& table : tables)
      for (size_t i = 0; table.first && i < table.bytes / sizeof(ElfW(Rela)); ++i) {
        const ElfW(Rela)& relocation = table.first[i];
        const ElfW(Sym)& symbol = symbols[ELF64_R_SYM(relocation.r_info)];
        if (symbol.st_name == 0 || relocation.r_addend != 0) continue;
        for (int k = 0; k < 2; ++k) {
          if (strcmp(strings + symbol.st_name, names[k]) != 0) continue;
          auto** slot = reinterpret_cast<void**>(info->dlpi_addr + relocation.r_offset);
          if (phase == FIND) {
            ++search->found[k];
          } else if (phase == WRITE) {
            __atomic_store_n(slot, search->value[k], __ATOMIC_RELEASE);
          } else {
            // it may be read-only since the loader filled it; which of the two is not told, so it stays writable
            const size_t page = sysconf(_SC_PAGESIZE);
            auto* start = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(slot) / page * page);
            if (mprotect(start, page, PROT_READ | PROT_WRITE) != 0) {
              search->found[0] = search->found[1] = 0;
              return 1;
            }
          }
        }
      }
  }
  return 1;
}

}  // namespace

// Large tensors from now on come from the heap and stay in it, until it is closed as often as it was opened. library:
// whose calls are taken ("libc10.so"). reserve: bytes of address space, of the first time. huge: ask for huge pages.
// Returns 0; 1 where the library is not there or calls other functions; 2 where there is no room for the region.
TRITIUM_VISIBLE int tritium_heap_open(const char* library, int64_t reserve, int huge) {
  static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;
  static bool hooked = false;
  pthread_mutex_lock(&one);
  int result = 0;
  if (!heap->base) {
    constexpr size_t HUGE_PAGE = 2 << 20;
    void* region = mmap(nullptr, reserve + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                        -1, 0);
    if (region == MAP_FAILED) {
      result = 2;
    } else {
      const uintptr_t start = (reinterpret_cast<uintptr_t>(region) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
      heap->base = reinterpret_cast<char*>(start);
      heap->reserve = reserve;
      if (huge) madvise(heap->base, reserve, MADV_HUGEPAGE);
      // a child of a fork has the heap as it is between two calls
      pthread_atfork([] { pthread_mutex_lock(&heap->lock); }, [] { pthread_mutex_unlock(&heap->lock); },
                     [] { pthread_mutex_unlock(&heap->lock); });
    }
  }
  if (result == 0 && !hooked) {
    Search search = {library, {reinterpret_cast<void*>(&take), reinterpret_cast<void*>(&give)}, {0, 0}};
    dl_iterate_phdr(hook, &search);
    hooked = search.found[0] && search.found[1];
    if (!hooked) result = 1;
  }
  if (result == 0) {
    const Held held;
    ++heap->open;
  }
  pthread_mutex_unlock(&one);
  return result;
}

// Tensors come from the C library again; of those in the heap each gives its memory back when it is freed, and what is
// free in it now goes back.
TRITIUM_VISIBLE void tritium_heap_close() {
  const Held held;
  if (--heap->open > 0) return;
  for (const auto& [size, at] : heap->unused) heap->give_back(at, size);
  heap->give_back(heap->top, heap->most - heap->top);
  heap->most = heap->top;
}

// Bytes: taken now, up to the last one that is taken, and the most of the latter since it was opened.
TRITIUM_VISIBLE void tritium_heap_bytes(int64_t* result) {
  const Held held;
  result[0] = heap->taken, result[1] = heap->top, result[2] = heap->most;
}

#else

TRITIUM_VISIBLE int tritium_heap_open(const char*, int64_t, int) { return 1; }
TRITIUM_VISIBLE void tritium_heap_close() {}
TRITIUM_VISIBLE void tritium_heap_bytes(int64_t* result) { result[0] = result[1] = result[2] = 0; }

#endif
