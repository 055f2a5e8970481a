/* Runs loops of some microseconds on a pool of threads. */
#pragma once
#include <stdint.h>

/* work(args, i) for every i from 0 to n - 1, on up to `threads` threads including the caller's; returns when all are done.
 * Several threads may call it at once: all but one of them run their loops alone. */
void parallel(void (*work)(void *args, int32_t i), void *args, int32_t n, int32_t threads);
