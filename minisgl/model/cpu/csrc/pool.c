/* Runs the items of a loop on a pool of threads, which take them one by one: a helper that does not get a core takes none, and
 * no thread waits for it.  With OpenMP's static shares and barriers, every loop takes as long as its slowest thread, and on cores
 * shared with other busy processes (this engine has four of its own) a step of two hundred loops took up to thirty times as long.
 *
 * Helpers spin for some tens of microseconds after the last item, which bridges the gaps within a step, then sleep. */
#define _GNU_SOURCE
#include "pool.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MAX_THREADS 256
#define SPINS 2000
#define PATIENCE 20000 /* spins before the core is yielded to a helper that was preempted in the middle of an item */

static pthread_mutex_t in_use = PTHREAD_MUTEX_INITIALIZER;
static struct {
    void (*work)(void *, int32_t);
    void *args;
    int32_t n, helpers;
} job;
static _Atomic uint64_t ticket;  /* number of the loop << 32 | items not handed out yet */
static _Atomic int32_t done;     /* items finished */
static _Atomic uint32_t epoch;   /* changes with every loop: helpers sleep on it */
static _Atomic int32_t sleepers;
static _Atomic int32_t needed;   /* helpers of the running loop; those with higher numbers stay out */
static int32_t started;

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

static inline int items_left(void) { return (uint32_t)atomic_load_explicit(&ticket, memory_order_relaxed) != 0; }

/* A thread that holds an item knows that its loop is running, so `job` is valid until the item is reported as done. */
static void take_items(void) {
    uint64_t t = atomic_load(&ticket);
    while ((uint32_t)t) {
        if (!atomic_compare_exchange_weak(&ticket, &t, t - 1)) continue;
        job.work(job.args, job.n - (int32_t)(uint32_t)t);
        atomic_fetch_add(&done, 1);
        t = atomic_load(&ticket);
    }
}

static void *helper(void *number) {
    const int32_t me = (int32_t)(intptr_t)number;
    for (;;) {
        uint32_t seen = atomic_load(&epoch);
        for (int i = 0; i < SPINS && !items_left(); i++) relax();
        if (items_left() && me < atomic_load(&needed)) {
            take_items();
            continue;
        }
        atomic_fetch_add(&sleepers, 1);
        syscall(SYS_futex, &epoch, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
        atomic_fetch_sub(&sleepers, 1);
    }
    return NULL;
}

static void start_helpers(int32_t n) {
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    pthread_t thread;
    while (started < n && pthread_create(&thread, &detached, helper, (void *)(intptr_t)started) == 0) started++;
    pthread_attr_destroy(&detached);
}

void parallel(void (*work)(void *, int32_t), void *args, int32_t n, int32_t threads) {
    int32_t helpers = (threads < n ? threads : n) - 1;
    if (helpers > MAX_THREADS) helpers = MAX_THREADS;
    if (helpers < 1 || pthread_mutex_trylock(&in_use)) {
        for (int32_t i = 0; i < n; i++) work(args, i);
        return;
    }
    if (started < helpers) start_helpers(helpers);
    job.work = work, job.args = args, job.n = n;
    atomic_store(&needed, helpers);
    atomic_store(&done, 0);
    atomic_store(&ticket, (((atomic_load(&ticket) >> 32) + 1) << 32) | (uint32_t)n);
    atomic_fetch_add(&epoch, 1);
    if (atomic_load(&sleepers)) syscall(SYS_futex, &epoch, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    take_items();
    for (int i = 0; atomic_load(&done) < n; i++)
        if (i < PATIENCE) relax();
        else sched_yield();
    pthread_mutex_unlock(&in_use);
}
