// Lists of tensors cut into chunks of equal size, so that threads share one pass over all of them.
#pragma once

#include <cstdint>

#include "tritium.h"

// first_chunk (tensors + 1): tensor k owns chunks [first_chunk[k], first_chunk[k + 1]); returns how many there are.
TRITIUM_INLINE int64_t cut(int64_t tensors, const int64_t* sizes, int64_t chunk, int64_t* first_chunk) {
  int64_t chunks = 0;
  for (int64_t k = 0; k < tensors; ++k) {
    first_chunk[k] = chunks;
    chunks += (sizes[k] + chunk - 1) / chunk;
  }
  return first_chunk[tensors] = chunks;
}

struct Piece {
  int64_t tensor, at, n;  // n elements of the tensor, from element `at`
};

// What chunk c is: the last tensor whose first chunk is ≤ c; empty tensors own none.
TRITIUM_INLINE Piece piece(int64_t c, int64_t tensors, const int64_t* sizes, int64_t chunk,
                           const int64_t* first_chunk) {
  int64_t low = 0, high = tensors;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first_chunk[middle] <= c ? low : high) = middle;
  }
  const int64_t at = (c - first_chunk[low]) * chunk, left = sizes[low] - at;
  return {low, at, left < chunk ? left : chunk};
}
