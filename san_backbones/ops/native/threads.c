/* Threads of an OpenMP runtime that has LLVM's interface without GCC's (libiomp5md.dll, on Windows). threads.py finds
 * its functions, so that nothing is linked here. */
#include <stddef.h>
#include <stdint.h>

struct location { /* ident_t of kmp.h */
    int32_t reserved_1, flags, reserved_2, reserved_3;
    const char *source;
};
static struct location location = {0, 2 /* KMP_IDENT_KMPC */, 0, 0, ";san_backbones;run;0;0;;"};

typedef void (*microtask)(int32_t *, int32_t *, void (*)(void *), void *);
static void (*fork_call)(struct location *, int32_t, microtask, ...);
static void (*push_num_threads)(struct location *, int32_t, int32_t);
static int32_t (*global_thread_num)(struct location *);

void san_kmp_use(void *fork, void *push, void *number) {
    fork_call = (void (*)(struct location *, int32_t, microtask, ...))fork;
    push_num_threads = (void (*)(struct location *, int32_t, int32_t))push;
    global_thread_num = (int32_t(*)(struct location *))number;
}

static void each(int32_t *global, int32_t *local, void (*work)(void *), void *argument) {
    (void)global, (void)local;
    work(argument);
}

/* GOMP_parallel's signature. */
void san_kmp_parallel(void (*work)(void *), void *argument, unsigned threads, unsigned flags) {
    (void)flags;
    push_num_threads(&location, global_thread_num(&location), (int32_t)threads);
    fork_call(&location, 2, each, work, argument);
}
