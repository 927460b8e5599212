/* A region: one mapping that fills itself, and what is known of each of its pages.
 *
 * Three arrays, mapped without reserve so that what is never touched costs
 * nothing: a state byte per page, and a flag byte and a generation per block (the
 * fetch granule, a power of two of pages).  At 64 KiB blocks that is 0.03% of
 * what was touched.
 *
 * Page states change by compare-and-swap only; MISSING -> INSTALLING gives one
 * thread the right to issue the ioctl.  A page is PRESENT only after the kernel
 * said so.  Bits 4 to 7 of the state byte are left for DIRTY, PINNED and the like.
 * What an error page is made of: error_page.h.
 */
#ifndef AU_REGION_H
#define AU_REGION_H

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum au_page_state {
	AU_PAGE_MISSING = 0,
	AU_PAGE_INSTALLING = 1,
	AU_PAGE_PRESENT = 2,
	AU_PAGE_POISONED = 3,
};
#define AU_PAGE_STATE 0x03
/* A message arrived while the page was INSTALLING: wake it once more afterwards. */
#define AU_PAGE_TOUCHED 0x04
/* An error mapping is in the page's place (error_page.h). */
#define AU_PAGE_ERROR_MAPPED 0x08

enum au_block_flag {
	AU_BLOCK_IN_FLIGHT = 1, /* somebody fetches it */
	AU_BLOCK_WANTED = 2,    /* a thread waits for one of its pages */
	AU_BLOCK_REPORTED = 4,  /* that wait was reported while in flight */
};

enum au_region_kind {
	AU_KIND_ANONYMOUS = 0, /* private anonymous memory */
	AU_KIND_MEMFD = 1,     /* shared memory with a descriptor */
	AU_KIND_HUGETLB = 2,   /* private 2 MiB pages */
	AU_KIND_HUGETLB_MEMFD = 3,
};

enum au_region_option {
	AU_REGION_WRITABLE = 1,
	AU_REGION_REPORT_HITS = 2, /* tell of touches to blocks in flight, once each */
	AU_REGION_FORK = 4,        /* leave the mapping to forked children, as it is */
	AU_REGION_SERVE = 8,       /* and have them served (children.h) */
	AU_REGION_USER_MODE = 16,  /* they see faults of user mode only */
};

/* How a region came to this process. */
enum au_inherited {
	AU_INHERITED_NOT = 0,
	AU_INHERITED_ALL_FAULTS = 1, /* from a parent; system calls wait for missing pages */
	AU_INHERITED_USER_MODE = 2,  /* from a parent; system calls fail on missing pages */
};

#define AU_REGION_NAME 128

struct au_engine;

struct au_region {
	struct au_engine *engine;
	uint32_t id;
	uint32_t kind;
	uint32_t options;
	int memfd;              /* -1 unless the memory has a descriptor */
	ino_t inode;            /* and what it is of: the number may be used again */
	uint64_t start;         /* address */
	uint64_t length;        /* mapped bytes, a multiple of page_size */
	uint64_t object_length; /* bytes that mean something; the rest of the last page is zero */
	uint64_t page_size;
	uint64_t block_size;
	uint32_t page_shift;
	uint32_t block_shift;
	uint64_t pages, blocks;
	_Atomic uint8_t *states;
	_Atomic uint8_t *flags;
	_Atomic uint64_t *generations;
	const uint8_t *backing; /* the object itself, if it is memory of this process */
	uint8_t *tail;          /* one page for the unaligned end, under tail_lock */
	pthread_mutex_t tail_lock;
	_Atomic uint32_t users;
	_Atomic uint32_t readers; /* guarded copies under way; they may wait for pages */
	_Atomic uint32_t closing;
	_Atomic uint64_t present_pages;
	_Atomic uint64_t poisoned_pages;
	_Atomic uint64_t touched_blocks;
	uint64_t error_runs, error_pieces; /* error_page.c's */
	uint64_t serial;            /* with AU_REGION_SERVE: never given twice by one process */
	_Atomic uint32_t inherited; /* enum au_inherited: a child can touch, and no more */
	char name[AU_REGION_NAME];  /* what people call its contents, under the engine's lock */
	bool mapped;
	bool move_refused; /* the kernel cannot move pages here */
};

/* Mark blocks [first, first+count) as being fetched.  taken[i] becomes 1 for those
 * that the caller now owns (were neither in flight nor complete), 0 for others.
 * A block with poisoned pages counts as complete unless `heal`.
 * Returns how many it owns. */
int64_t au_region_begin(struct au_region *region, uint64_t first, uint64_t count, int heal,
			uint8_t *taken);

/* Give up the fetch of blocks [first, first+count).  wanted[i] becomes 1 where a
 * thread waits; with `keep_wanted` those stay in flight, owned by the caller;
 * without, the waiters are woken and fault afresh.
 * Returns how many are wanted. */
int64_t au_region_end(struct au_region *region, uint64_t first, uint64_t count, int keep_wanted,
		      uint8_t *wanted);

/* 1 when every page of [offset, offset+length) is PRESENT, 0 when not;
 * -EIO when one is POISONED.  *where is the offset of the first page that is not. */
int au_region_check(struct au_region *region, uint64_t offset, uint64_t length, uint64_t *where);

/* Runs of equal state in [offset, offset+length): fills starts/lengths/states, at most
 * max.  Returns the count; *next is where to go on, or the end. */
int64_t au_region_runs(struct au_region *region, uint64_t offset, uint64_t length, uint64_t *starts,
		       uint64_t *lengths, uint8_t *states, int64_t max, uint64_t *next);

/* Generation of the block at `block`: changes when one of its pages is installed or removed. */
uint32_t au_region_generation(struct au_region *region, uint64_t block);

/* Forget the pages of [offset, offset+length): MADV_DONTNEED and state MISSING.
 * Whole pages only.  0 or -errno. */
int au_region_drop(struct au_region *region, uint64_t offset, uint64_t length);

/* How much is resident, how much is poisoned (pages), how many blocks were ever touched. */
uint64_t au_region_present(struct au_region *region);
uint64_t au_region_poisoned(struct au_region *region);
uint64_t au_region_touched(struct au_region *region);

/* In a child that was forked with AU_REGION_SERVE: enum au_inherited, or -EBADF if the memory
 * cannot be touched. */
int au_region_inherited(struct au_region *region);

#define AU_EHWPOISON EHWPOISON
/* Whether a page that raised SIGBUS was there, so that neither its source nor a close is the reason:
 * the hardware has lost it.  Async-signal-safe. */
bool au_region_broken(struct au_region *region, uint64_t offset);
/* Drop such a page, if nobody can have written to it: the next touch has it fetched again.  False if
 * that cannot be.  Async-signal-safe. */
bool au_region_renew(struct au_region *region, uint64_t offset);
/* 1 if this process has regions of a parent. */
extern _Atomic uint32_t au_inherits;
/* The address of the page that was renewed last. */
extern _Atomic uint64_t au_renewed;

/* For the engine: reference while an operation is under way. */
bool au_region_enter(struct au_region *region);
void au_region_leave(struct au_region *region);
/* For the engine: pages [start, end) were removed behind our back. */
void au_region_removed(struct au_region *region, uint64_t start, uint64_t end);
/* In a forked child. */
void au_region_forked(struct au_region *region);

#endif
