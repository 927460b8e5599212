/* Error pages: memory that gives an error to whoever touches it, SIGBUS or EFAULT.
 *
 * Where the mapping is ours, an error page is a private mapping of an empty file, on every kernel:
 * beyond the end of a file there is nothing to be had.  Offsets go with addresses, so neighbours
 * merge into one mapping.  UFFDIO_POISON, which came with Linux 6.6, does the same, but most
 * distributions write to the kernel's log for each touch of a poisoned page.
 *
 * The rule, which only error_page.c knows: mappings are bounded (vm.max_map_count), and each run of
 * error pages amid others costs two.  So up to a quarter of that number of runs in the process they
 * are mappings; runs above it are poison, where the kernel has it.  Where it has not, the page
 * stays missing (-ENOSPC), which is waiting, not zeros; a region that closes cannot wait, and goes on
 * making mappings until the kernel has no more, when the rest of it becomes one error, with what is
 * resident.
 *
 * Private memory that is put right amid errors does not merge with what is around it later: there may
 * be an eighth as many of these pieces, above which the errors up to the next good page become
 * missing pages with it, and are asked for again when they are touched.
 *
 * An error page is put right (au_error_undo) by a mapping that is registered already and moved
 * over it, so that there is no moment at which a touch would find zeros.
 */
#ifndef AU_ERROR_PAGE_H
#define AU_ERROR_PAGE_H

#include "region.h"

#include <stdbool.h>
#include <stdint.h>

/* Have the empty file: best while there are descriptors.  0 or -errno. */
int au_error_prepare(void);

/* An error for whoever touches [start, start+length), memory of ours.  Wakes nobody.
 * `inherit`: forked children get the error too, and else nothing.  0 or -errno. */
int au_error_map(uint64_t start, uint64_t length, bool inherit);

/* Make errors of pages [from, to), which are INSTALLING and the caller's to settle, and which
 * nothing is in.  *done: bytes that are an error now, of state *state.  `closing`: the region
 * closes, and nothing else will do.  0, or -errno as an ioctl that installs.  Wakes nobody. */
int au_error_make(struct au_region *region, uint64_t from, uint64_t to, bool closing, int64_t *done,
		  uint8_t *state);

/* Pages [from, to), all of them INSTALLING and error mappings, become missing ones.  Another
 * thread has to read a message meanwhile: the sentry does.  0, or -errno: they are errors still. */
int au_error_undo(struct au_region *region, uint64_t from, uint64_t to);

/* Private memory that is to be put right has errors on both sides: may it be a piece of its own? */
bool au_error_piece(struct au_region *region);

/* The region's memory goes. */
void au_error_forget(struct au_region *region);

/* In a forked child, before its memory is registered: error mappings become memory that is missing
 * again, so that the child asks for itself. */
void au_error_inherited(struct au_region *region);
/* A child's own: errors of pages [from, to), which nobody brings, by its own descriptor. */
int au_error_refuse(struct au_region *region, uint64_t from, uint64_t to, int uffd);
void au_error_forked(void);

/* Runs of error pages that are mappings, in the process; and how many there may be.  0 means
 * the default, a quarter of vm.max_map_count. */
uint64_t au_error_runs(void);
void au_error_set_limit(uint64_t runs);

#endif
