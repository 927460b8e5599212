#include "guard.h"

#include "counters.h"
#include "kick.h"
#include "region.h"
#include "registry.h"
#include "sys.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

/* Initial-exec: the handler must not make glibc allocate the variable. */
static __thread sigjmp_buf *volatile way_back __attribute__((tls_model("initial-exec")));
static __thread volatile uint64_t fault_address __attribute__((tls_model("initial-exec")));

/* The frame and the context of the chained call under way, to notice circles.  The
 * one we chain to may leave by a jump, so they may be old. */
static __thread volatile uintptr_t chain_frame __attribute__((tls_model("initial-exec")));
static __thread void *volatile chain_context __attribute__((tls_model("initial-exec")));

/* How often this thread has had the same page renewed in a row. */
#define RENEWALS 3
static __thread volatile uint64_t renewed_last __attribute__((tls_model("initial-exec")));
static __thread volatile uint32_t renewals __attribute__((tls_model("initial-exec")));

static struct sigaction previous;
static pthread_mutex_t start_lock = PTHREAD_MUTEX_INITIALIZER;

static void say(const char *text, uint64_t address, uint64_t offset)
{
	/* snprintf of integers is safe enough here: the process is about to end. */
	char line[256];
	int size = snprintf(line, sizeof line,
			    "aiouffd: thread %u touched %#llx, byte %llu of a lazy region: %s\n",
			    au_gettid(), (unsigned long long)address, (unsigned long long)offset, text);

	if (size > 0 && write(STDERR_FILENO, line, (size_t)size) < 0)
		return;
}

/* Whoever had the signal before us.  A crash reporter among them restores what it
 * found (us) and raises again: the second time it is the default's turn. */
static void chain(int number, siginfo_t *info, void *context)
{
	bool callable = (previous.sa_flags & SA_SIGINFO) ||
			(previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN);
	uintptr_t frame = (uintptr_t)__builtin_frame_address(0);
	/* Called back by our own callee, or raised again by it. */
	bool circle = chain_frame && (info->si_code <= 0 ||
				      (chain_context == context && frame < chain_frame));

	if (!callable || circle) {
		signal(SIGBUS, SIG_DFL);
		if (info->si_code <= 0)
			raise(SIGBUS);
		return; /* the repeated access ends the process */
	}
	chain_frame = frame;
	chain_context = context;
	if (previous.sa_flags & SA_SIGINFO)
		previous.sa_sigaction(number, info, context);
	else
		previous.sa_handler(number);
	chain_frame = 0;
}

/* Memory that is there and cannot be had, for the hardware has lost it: have it fetched again if
 * that can be, and repeat the access.  (Or an error was put right just now.)  Not for ever, should
 * that not help. */
static bool renewed(struct au_region *region, uint64_t address, uint64_t offset)
{
	if (!au_region_broken(region, offset))
		return false;
	renewals = renewed_last == address ? renewals + 1 : 0;
	renewed_last = address;
	if (renewals < RENEWALS) {
		au_region_renew(region, offset);
		return true;
	}
	renewed_last = 0;
	return false;
}

static void on_bus_error(int number, siginfo_t *info, void *context)
{
	uint64_t address = (uint64_t)(uintptr_t)info->si_addr, offset = 0;
	struct au_region *region = NULL;
	bool ours = info->si_code > 0 && au_regions_find(address, &offset, &region);

	/* Where our own thread has not touched it (BUS_MCEERR_AO), whoever does gets the error. */
	if (ours && region && (renewed(region, address, offset) || info->si_code == BUS_MCEERR_AO))
		return;
	if (ours && way_back) {
		au_count(AU_COUNT_guarded_faults, 1);
		fault_address = address;
		siglongjmp(*way_back, 1);
	}
	if (ours) {
		if (__atomic_load_n(&au_shared.exiting, __ATOMIC_SEQ_CST) &&
		    (pid_t)au_gettid() != getpid())
			for (;;)
				pause();
		if (region && au_region_broken(region, offset))
			say("the hardware has lost this memory, and what was written to it (a memory error); "
			    "drop it to have it fetched again",
			    address, offset);
		else
			say(atomic_load(&au_inherits) ?
			    "its source failed, or the process that serves it has closed it or is gone; "
			    "use buf[...] to get an exception instead" :
			    "its source failed or it was closed; "
			    "use buf[...], or await buf.read() where there is one, to get an exception instead",
		    address, offset);
	}
	chain(number, info, context);
}

int au_guard_start(void)
{
	struct sigaction present, action;
	int result = 0;

	pthread_mutex_lock(&start_lock);
	if (sigaction(SIGBUS, NULL, &present)) {
		result = -errno;
	} else if (!((present.sa_flags & SA_SIGINFO) && present.sa_sigaction == on_bus_error)) {
		memset(&action, 0, sizeof action);
		action.sa_sigaction = on_bus_error;
		/* Not deferred, so that a jump out leaves the signal usable. */
		action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
		sigemptyset(&action.sa_mask);
		previous = present;
		if (sigaction(SIGBUS, &action, NULL))
			result = -errno;
	}
	pthread_mutex_unlock(&start_lock);
	return result;
}

/* The first byte of [start, start+length) that cannot be had: copies and searches touch a page
 * anywhere, and a huge page goes as a whole.  The fault may also be on the other side of a copy. */
static uint64_t first_lost(const void *start, uint64_t length)
{
	uint64_t from = (uint64_t)(uintptr_t)start, page_size = au_page_size(), page, offset;
	struct au_region *region;

	if (fault_address - from >= length)
		return fault_address;
	if (au_regions_find(fault_address, &offset, &region) && region)
		page_size = region->page_size;
	page = fault_address & ~(page_size - 1);
	return page > from ? page : from;
}

int au_guard_copy(void *destination, const void *source, uint64_t length, uint64_t *address)
{
	sigjmp_buf here, *volatile outer = way_back;

	if (sigsetjmp(here, 0)) {
		way_back = outer;
		*address = first_lost(source, length);
		return -EIO;
	}
	way_back = &here;
	atomic_signal_fence(memory_order_seq_cst);
	memcpy(destination, source, length);
	atomic_signal_fence(memory_order_seq_cst);
	way_back = outer;
	return 0;
}

int au_guard_touch(const void *start, uint64_t length, uint64_t page_size, uint64_t *address)
{
	sigjmp_buf here, *volatile outer = way_back;
	const volatile uint8_t *volatile byte = start;
	const uint8_t *end = (const uint8_t *)start + length;

	if (sigsetjmp(here, 0)) {
		way_back = outer;
		*address = fault_address;
		return -EIO;
	}
	way_back = &here;
	atomic_signal_fence(memory_order_seq_cst);
	while (byte < end) {
		(void)*byte;
		byte = (const volatile uint8_t *)(((uintptr_t)byte & ~(page_size - 1)) + page_size);
	}
	atomic_signal_fence(memory_order_seq_cst);
	way_back = outer;
	return 0;
}

int64_t au_guard_find(const void *start, uint64_t length, const void *needle, uint64_t needle_length,
		      uint64_t *address)
{
	sigjmp_buf here, *volatile outer = way_back;
	const void *found;

	if (sigsetjmp(here, 0)) {
		way_back = outer;
		*address = first_lost(start, length);
		return -EIO;
	}
	way_back = &here;
	atomic_signal_fence(memory_order_seq_cst);
	found = memmem(start, length, needle, needle_length);
	atomic_signal_fence(memory_order_seq_cst);
	way_back = outer;
	return found ? (const uint8_t *)found - (const uint8_t *)start : -1;
}
