/* The few system calls that glibc does not wrap, and time in nanoseconds.
 *
 * Everything here is safe in signal handlers and allocates nothing.
 */
#ifndef AU_SYS_H
#define AU_SYS_H

#include <errno.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define AU_NS_PER_MS 1000000ULL
#define AU_NS_PER_S 1000000000ULL

/* The places between two steps of the protocol where another thread may come in: the C tests
 * wait there on purpose.  Nothing in the module. */
enum au_gap {
	AU_GAP_NONE,
	AU_GAP_EPOCH_READ,   /* the reader: epoch taken, messages not read */
	AU_GAP_READ_CLAIM,   /* messages read, no slot yet */
	AU_GAP_CLAIM_PENDING, /* slot claimed, not published */
	AU_GAP_PENDING_LOOK, /* slot published, page not looked at */
	AU_GAP_LOOK_TELL,    /* page looked at, block not flagged */
	AU_GAP_TAKE_MARK,    /* the installer: pages taken, slots not marked */
	AU_GAP_MARK_IOCTL,   /* slots marked, ioctl not issued */
	AU_GAP_IOCTL_SETTLE, /* ioctl done, pages not settled */
	AU_GAP_SETTLE_FREE,  /* pages settled, slots not freed */
	AU_GAP_FREE_WAKE,    /* slots freed, late ones not woken */
	AU_GAP_LOOK_SIGNAL,  /* the sentry: thread looked at, not signalled */
	AU_GAPS
};
#ifdef AU_TEST_GAPS
void au_test_gap(enum au_gap where);
#define AU_GAP(where) au_test_gap(AU_GAP_##where)
#else
#define AU_GAP(where) ((void)0)
#endif

/* Of the system, in bytes: 4 KiB on x86, 4 to 64 KiB on arm64.  Huge pages are a matter of each
 * mapping. */
static inline uint64_t au_page_size(void)
{
	return (uint64_t)sysconf(_SC_PAGESIZE);
}

/* To a multiple of `step`, a power of two. */
static inline uint64_t au_round_up(uint64_t value, uint64_t step)
{
	return (value + step - 1) & ~(step - 1);
}

static inline uint64_t au_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * AU_NS_PER_S + (uint64_t)now.tv_nsec;
}

static inline void au_sleep_ns(uint64_t ns)
{
	struct timespec left = {
		.tv_sec = (time_t)(ns / AU_NS_PER_S),
		.tv_nsec = (long)(ns % AU_NS_PER_S),
	};

	clock_nanosleep(CLOCK_MONOTONIC, 0, &left, NULL);
}

/* Make an eventfd readable; and have it readable no more. */
static inline void au_event_signal(int fd)
{
	uint64_t one = 1;

	if (write(fd, &one, sizeof one) < 0)
		return; /* at its maximum: it is readable anyway */
}

static inline void au_event_drain(int fd)
{
	uint64_t ignored;

	while (read(fd, &ignored, sizeof ignored) > 0)
		;
}

static inline uint32_t au_gettid(void)
{
	return (uint32_t)syscall(SYS_gettid);
}

/* Sleep while *word == expected, at most timeout_ns; early returns are normal.  0 or -errno:
 * -ETIMEDOUT, and -EINTR after a signal's handler (futex(2)). */
static inline int au_futex_wait(_Atomic uint32_t *word, uint32_t expected, uint64_t timeout_ns)
{
	struct timespec timeout = {
		.tv_sec = (time_t)(timeout_ns / AU_NS_PER_S),
		.tv_nsec = (long)(timeout_ns % AU_NS_PER_S),
	};

	if (syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, &timeout, NULL, 0) == 0)
		return 0;
	return errno == EAGAIN ? 0 : -errno;
}

static inline void au_futex_wake(_Atomic uint32_t *word)
{
	syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1 << 30, NULL, NULL, 0);
}

#endif
