/* A pool of threads for loops of some microseconds. */
#pragma once
#include <stdint.h>

/* work(args, i) for every i from 0 to n - 1, on up to `threads` threads, this one among them; returns when all are done.
 * Calls from several threads at once are allowed: all but one of them run their loops alone. */
void parallel(void (*work)(void *args, int32_t i), void *args, int32_t n, int32_t threads);
