/* What the plain C core asks of Python about the GIL.  gil.c answers with
 * Python.h; the C tests answer with a mutex. */
#ifndef AU_GIL_H
#define AU_GIL_H

#include <stdbool.h>
#include <stdint.h>

/* Does the calling thread hold the GIL?  Async-signal-safe, also on threads that
 * Python never saw. */
bool au_gil_mine(void);
/* Is there one GIL?  Not if a sub-interpreter may have its own.  Any thread. */
bool au_gil_only(void);
/* Release it, as a C function would around a blocking call; take it back. */
void *au_gil_release(void);
void au_gil_take(void *token);
/* Interpreter exit, from an early exit hook with the GIL released: threads that
 * wait in au_gil_take are let through, later ones park.  Bounded. */
void au_gil_exit(void);
/* Let the interpreter end without the thread `left`, as if it were a daemon thread as `daemon` is
 * one, both by their ids in the kernel.  0, or -ESRCH if it does not know them.  Before the end. */
int au_gil_leave_behind(uint32_t left, uint32_t daemon);
/* Python says that SIGINT has a handler of Python's: let interrupt.h know it. */
void au_gil_know_handler(void);

/* Make the class `Exporter` in the Python module of that name.  0 or -1. */
int au_python_exporter(const char *module);

#endif
