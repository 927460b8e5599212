/* aiouffd_client.h: memory of this program that another process fills.
 *
 *	struct aiouffd *memory = aiouffd_attach("/run/weights.sock", NULL);
 *
 *	if (!memory)
 *		... errno, aiouffd_error()
 *	... memory->address[0] to memory->address[memory->length - 1] ...
 *	aiouffd_detach(memory);
 *
 * A touch of a page that is missing waits until the server (`aiouffd pager`, or any that speaks
 * docs/serve-protocol.md) has brought it.  Linux 5.11 or later; C11 or C++11; needs libc and threads
 * (-pthread), nothing to link with.  Include it first, or define _GNU_SOURCE.
 *
 * The server's death is a pause.  We keep a copy of the userfaultfd, so threads that wait go on
 * waiting, and a thread of ours, the keeper, hands everything over again as soon as a server
 * listens at the path.  It sleeps while nothing happens; it takes no lock, allocates nothing and has
 * all signals blocked, so it does its part whatever the other threads of the program are stuck in.
 *
 * Threads: any thread may call any function; but nobody may use a `struct aiouffd` during or after
 * aiouffd_detach.  All functions block.  Functions that return int return 0 or a negated errno.
 *
 * What a thread that waits for a page gets:
 *	the server is gone                its bytes, when one is there again; see `lost_ms`
 *	the server cannot have the bytes  SIGBUS (EFAULT in a system call), if the server says so
 *	aiouffd_detach                    SIGBUS or SIGSEGV (EFAULT), for the memory goes; never zeros
 *	fork                              nothing changes; in the child the memory is not there
 *
 * madvise(MADV_DONTNEED), munmap and mremap of such memory wait until the server has heard of it.
 * While there is none they wait.  aiouffd_detach does not.
 *
 * Other languages: functions are static inline unless AIOUFFD_API says something else.  One C file with
 *	#define AIOUFFD_API
 *	#include "aiouffd_client.h"
 * exports them all.
 */
#ifndef AIOUFFD_CLIENT_H
#define AIOUFFD_CLIENT_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#ifndef MAP_ANONYMOUS
#error "include aiouffd_client.h before other headers, or define _GNU_SOURCE"
#endif

#ifndef AIOUFFD_API
#define AIOUFFD_API static inline
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ------------------------------------------------------------------ what you use */

/* Options of attach and hand_over. */
#define AIOUFFD_WRITABLE 1u       /* attach: memory that may be written to; the object is not changed */
#define AIOUFFD_HUGETLB 2u        /* attach: pages of 2 MiB; the server has to serve such blocks */
#define AIOUFFD_USER_MODE_ONLY 4u /* system calls on missing pages fail with EFAULT */
#define AIOUFFD_ALL_FAULTS 8u     /* fail if that is the most this user may; see user_mode_only */
#define AIOUFFD_BACKGROUND 16u    /* ask the server to bring everything, behind what is touched */
/* Forked children are served as well.  Needs CAP_SYS_PTRACE.  A child has no copy of its descriptor:
 * when the server dies, what the child still lacks reads as zeros.  So this is not the default. */
#define AIOUFFD_FORK 32u
/* Fail with EDEADLK if the server is this very process, for programs whose server could not run while
 * a thread waits. */
#define AIOUFFD_OTHER_PROCESS 64u
/* `server_user` is set. */
#define AIOUFFD_SERVER_USER 128u

/* What happens when no server came back in `lost_ms`. */
enum aiouffd_on_lost {
	/* Threads that touch missing pages get SIGBUS; before Linux 6.6, in memory that aiouffd_hand_over
	 * was given, SIGSEGV. */
	AIOUFFD_POISON = 0,
	AIOUFFD_ABORT = 1,  /* abort() */
};

enum aiouffd_event {
	AIOUFFD_LOST = 1,    /* the server is gone; `error` says why the last attempt failed, or is 0 */
	AIOUFFD_RESUMED = 2, /* a server has taken over */
	AIOUFFD_GAVE_UP = 3, /* lost_ms have passed */
};

/* All zeros ("= {0}", in C++ "= {}"), or NULL instead of it, is a good choice. */
struct aiouffd_options {
	const char *object; /* name of the object; NULL or "": the server's only one */
	uint64_t offset;    /* attach: where in the object to begin, bytes, whole pages */
	uint64_t length;    /* attach: bytes; 0: up to the end */
	uint32_t flags;     /* AIOUFFD_WRITABLE and so on */
	/* How long to wait for a server that is not there: 0 not, -1 for ever.  One that listens and does not
	 * answer is given 30 s (ETIMEDOUT). */
	int timeout_ms;
	int cancel_fd;      /* attaching ends with ECANCELED once this is readable; 0: none */
	int lost_ms;        /* how long to wait for a server that was there; 0: for ever */
	enum aiouffd_on_lost on_lost;
	/* Called by the keeper: must not wait for anything, nor touch the memory.  Without it an outage of
	 * more than a second is told on stderr, once. */
	void (*on_event)(void *context, enum aiouffd_event event, int error);
	void *context;
	/* With AIOUFFD_SERVER_USER: whose server is believed besides root's and that of this program's own
	 * (effective) user; AIOUFFD_ANY_USER: anybody's.  Whoever may write to the directory of the socket
	 * can listen there, and who is given the userfaultfd decides what is in this program's memory. */
	uint32_t server_user;
};
#define AIOUFFD_ANY_USER UINT32_MAX

/* Memory that the program has mapped itself, for aiouffd_hand_over. */
struct aiouffd_area {
	void *address;      /* whole pages */
	uint64_t length;    /* bytes, whole pages */
	uint64_t offset;    /* where its bytes are in the object */
	uint32_t page_size; /* 0: the system's; 2 MiB for huge pages */
	uint32_t flags;     /* AIOUFFD_ZEROS: no object; it reads as zeros */
};
#define AIOUFFD_ZEROS 1u

struct aiouffd_state_;

struct aiouffd {
	uint8_t *address;     /* the first byte of the (first) area */
	uint64_t length;      /* bytes of the object there; 0: the object is empty */
	uint64_t object_size; /* bytes */
	int user_mode_only;   /* 1: system calls on missing pages fail with EFAULT */
	struct aiouffd_state_ *state_;
};

/* Map an object, or a part of one, of the server that listens at `path`.  NULL with errno: ENOENT,
 * ECONNREFUSED (nobody listens), ECANCELED, EINTR (a signal came while it waited), EPERM (no
 * userfaultfd for this user; or the server is another user's, see `server_user`), what the server said (see aiouffd_error), and others. */
AIOUFFD_API struct aiouffd *aiouffd_attach(const char *path, const struct aiouffd_options *options);

/* Have memory filled that the program has mapped itself.  What is not there yet, and nothing else,
 * comes from the server: private anonymous memory, also with huge pages, or a memfd's that nobody
 * else maps.  All areas have one page size.  Fork: see MADV_DONTFORK, which is yours to call.  When it
 * fails the memory is as before.  Parts may be unmapped, and moved (mremap); but a server that takes over
 * later knows only the old place of what was moved, and a touch of what is missing there is an error
 * then, as it is after aiouffd_detach. */
AIOUFFD_API struct aiouffd *aiouffd_hand_over(const char *path, const struct aiouffd_area *areas,
					      uint32_t count, const struct aiouffd_options *options);

/* The size of an object, and whether there is one. */
AIOUFFD_API int aiouffd_query(const char *path, const struct aiouffd_options *options, uint64_t *size);

/* Forget whole pages: they read as zeros from now on.  As MADV_DONTNEED_LOCKED (before Linux 5.18
 * MADV_DONTNEED, which refuses locked memory with EINVAL), and holds too when the server dies at this
 * very moment, or is dead.  ENOMEM: a part is not mapped any more; the rest was dropped. */
AIOUFFD_API int aiouffd_discard(struct aiouffd *memory, void *address, uint64_t length);

/* Is a server connected now; how many times was one lost and found again. */
AIOUFFD_API int aiouffd_connected(const struct aiouffd *memory);
AIOUFFD_API uint64_t aiouffd_resumed(const struct aiouffd *memory);

/* Let the server go, and keep the memory: what is there stays, a touch of the rest is an error, as with
 * AIOUFFD_POISON.  Until aiouffd_detach. */
AIOUFFD_API int aiouffd_refuse(struct aiouffd *memory);

/* The end.  Memory that attach has mapped is unmapped; memory of the program's own stays, with what is
 * there, and a touch of the rest is a SIGBUS (before Linux 6.6 none of it can be touched any more).
 * Waits until the server has let go, 5 seconds at most. */
AIOUFFD_API int aiouffd_detach(struct aiouffd *memory);

/* In a forked child, which has nothing of it: closes the child's copies of the descriptors. */
AIOUFFD_API void aiouffd_forked(struct aiouffd *memory);

/* What the last call of this thread that failed has to say. */
AIOUFFD_API const char *aiouffd_error(void);

/* --------------------------------------------------------------------- the kernel */

/* Old headers lack what newer kernels have, so all of it is declared here. */

struct aiouffd_api_ {
	uint64_t api, features, ioctls;
};

struct aiouffd_range_ {
	uint64_t start, length;
};

struct aiouffd_register_ {
	uint64_t start, length, mode, ioctls;
};

/* ZEROPAGE and POISON. */
struct aiouffd_fill_ {
	uint64_t start, length, mode;
	int64_t done;
};

struct aiouffd_message_ {
	uint8_t event, reserved[7];
	/* PAGEFAULT: flags, address; REMOVE, UNMAP: start, end; REMAP: from, to, length; FORK: fd */
	uint64_t a, b, c;
};

#define AIOUFFD_IOC_NEW_ _IO(0xAA, 0x00)
#define AIOUFFD_IOC_REGISTER_ _IOWR(0xAA, 0x00, struct aiouffd_register_)
/* Not _IOW: a mistake that the kernel has to keep. */
#define AIOUFFD_IOC_UNREGISTER_ _IOR(0xAA, 0x01, struct aiouffd_range_)
#define AIOUFFD_IOC_WAKE_ _IOR(0xAA, 0x02, struct aiouffd_range_)
#define AIOUFFD_IOC_ZEROPAGE_ _IOWR(0xAA, 0x04, struct aiouffd_fill_)
#define AIOUFFD_IOC_POISON_ _IOWR(0xAA, 0x08, struct aiouffd_fill_)
#define AIOUFFD_IOC_API_ _IOWR(0xAA, 0x3F, struct aiouffd_api_)

#define AIOUFFD_MISSING_ UINT64_C(1)
#define AIOUFFD_FEATURE_FORK_ (UINT64_C(1) << 1)
#define AIOUFFD_FEATURE_REMAP_ (UINT64_C(1) << 2)
#define AIOUFFD_FEATURE_REMOVE_ (UINT64_C(1) << 3)
#define AIOUFFD_FEATURE_UNMAP_ (UINT64_C(1) << 6)

#define AIOUFFD_EVENT_PAGEFAULT_ 0x12
#define AIOUFFD_EVENT_FORK_ 0x13
#define AIOUFFD_EVENT_REMAP_ 0x14
#define AIOUFFD_EVENT_REMOVE_ 0x15
#define AIOUFFD_EVENT_UNMAP_ 0x16
#define AIOUFFD_DONTNEED_LOCKED_ 24 /* Linux 5.18 */

#define AIOUFFD_ADD_SEALS_ 1033
#define AIOUFFD_SEALS_ 7 /* no further seals, no shrinking, no growing */
#define AIOUFFD_MAP_HUGE_2M_ (21 << 26)

/* -------------------------------------------------------------------- the protocol */

/* See docs/serve-protocol.md. */

#define AIOUFFD_MAGIC_ UINT32_C(0x64667561) /* "aufd" */
#define AIOUFFD_VERSION_ 1
#define AIOUFFD_QUERY_ 1
#define AIOUFFD_ATTACH_ 2
#define AIOUFFD_ANSWER_ 3
#define AIOUFFD_ERROR_ 4
#define AIOUFFD_WIRE_BACKGROUND_ (UINT32_C(1) << 16)
#define AIOUFFD_WIRE_ERRORS_ (UINT32_C(1) << 17)
#define AIOUFFD_HEADER_SIZE_ 16
#define AIOUFFD_QUERY_SIZE_ 24
#define AIOUFFD_ATTACH_SIZE_ 80
#define AIOUFFD_AREA_SIZE_ 32
#define AIOUFFD_ANSWER_SIZE_ 72
#define AIOUFFD_ERROR_SIZE_ 40
#define AIOUFFD_RECORD_MAX_ 1048576
#define AIOUFFD_ANSWER_MAX_ 1024
#define AIOUFFD_NAME_MAX_ 1024
#define AIOUFFD_AREAS_MAX_ 4096
#define AIOUFFD_TAG_SIZE_ 32
/* Milliseconds that a server which listens may take to answer: the first time that one is looked for,
 * before there is a word of it; later on; and to let go. */
#ifndef AIOUFFD_FIRST_ANSWER_
#define AIOUFFD_FIRST_ANSWER_ 1000
#define AIOUFFD_NEXT_ANSWER_ 15000
#define AIOUFFD_ATTACH_ANSWER_ 30000
#endif
#define AIOUFFD_LET_GO_ 5000
/* Answered one by one although they are in no area, at most, while an event is in the way. */
#define AIOUFFD_OWED_MAX_ 256
#define AIOUFFD_REMOVED_ 1u
#define AIOUFFD_GONE_ 4u
#define AIOUFFD_MOVED_ 16u
#define AIOUFFD_FAILED_ 32u

/* ----------------------------------------------------------------------- our state */

enum aiouffd_command_ {
	AIOUFFD_KEEP_ = 0,
	AIOUFFD_REFUSE_ = 1, /* nobody serves any more: answer with errors */
	AIOUFFD_STOP_ = 2,
	AIOUFFD_HOLD_ = 3, /* the server has not agreed yet */
};

struct aiouffd_state_ {
	struct sockaddr_un path;
	struct aiouffd_options options;
	struct aiouffd_area *areas;
	uint32_t count;
	int ours;     /* the mapping was made by attach */
	int lingers;  /* a server may still hold the descriptor: the addresses must not be used again */
	int can_poison;
	/* Before Linux 6.6: what makes errors of pages of ours. */
	int empty;          /* a file */
	int pages[2];       /* a pipe: addresses */
	pthread_t mapper;
	int mapping;        /* there is a mapper; the keeper's */
	uint32_t mapped_up; /* no more of them */
	/* What the server says after its answer. */
	uint8_t heard[40];
	uint32_t heard_size, heard_skip;
	uint64_t page_size;
	uint64_t mapped; /* bytes, if ours */

	int uffd, states_fd, poke, sock; /* sock is the keeper's, once there is one */
	uint8_t *states; /* one byte per page, area after area: shared with the server */
	uint64_t states_length;
	uint8_t *record; /* what is sent to hand over */
	uint32_t record_length;
	uint8_t tag[AIOUFFD_TAG_SIZE_];

	pthread_t keeper;
	int started; /* there is a keeper */
	int keeping; /* and the server has agreed */
	/* Shared with the keeper, by atomic builtins, which C and C++ have in common. */
	uint32_t command, done, connected;
	uint64_t resumed;
};

struct aiouffd_answer_ {
	uint32_t status;
	uint64_t object_size;
	uint8_t tag[AIOUFFD_TAG_SIZE_];
	char text[256];
};

static __thread char aiouffd_text_[320];

AIOUFFD_API const char *aiouffd_error(void)
{
	return aiouffd_text_;
}

/* Returns `result`, which is a negated errno. */
static inline int aiouffd_fail_(int result, const char *what)
{
	snprintf(aiouffd_text_, sizeof aiouffd_text_, "%s", what);
	return result;
}

/* ----------------------------------------------------------------- time and waiting */

static inline uint64_t aiouffd_now_(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

/* Milliseconds of CLOCK_MONOTONIC when something that may take `ms` has taken too long; 0: never. */
static inline uint64_t aiouffd_until_(int ms)
{
	return ms < 0 ? 0 : aiouffd_now_() + (uint64_t)ms + 1;
}

/* Wait for `events` on `fd` (-1: just for the time).  `stop` is a descriptor or -1. */
static inline int aiouffd_wait_(int fd, short events, int stop, uint64_t until)
{
	struct pollfd items[2];
	int timeout = -1, count;

	if (until) {
		uint64_t now = aiouffd_now_();

		timeout = now >= until ? 0 : until - now > 1000000 ? 1000000 : (int)(until - now);
	}
	items[0].fd = fd;
	items[0].events = events;
	items[1].fd = stop;
	items[1].events = POLLIN;
	items[0].revents = items[1].revents = 0;
	count = poll(items, 2, timeout);
	if (count < 0)
		return -errno;
	if (items[1].revents)
		return -ECANCELED;
	return items[0].revents ? 0 : -ETIMEDOUT;
}

/* ------------------------------------------------------------------------- records */

static inline void aiouffd_put32_(uint8_t *to, uint32_t value)
{
	int index;

	for (index = 0; index < 4; index++)
		to[index] = (uint8_t)(value >> (8 * index));
}

static inline void aiouffd_put64_(uint8_t *to, uint64_t value)
{
	aiouffd_put32_(to, (uint32_t)value);
	aiouffd_put32_(to + 4, (uint32_t)(value >> 32));
}

static inline uint32_t aiouffd_get32_(const uint8_t *from)
{
	return (uint32_t)from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16 |
	       (uint32_t)from[3] << 24;
}

static inline uint64_t aiouffd_get64_(const uint8_t *from)
{
	return aiouffd_get32_(from) | (uint64_t)aiouffd_get32_(from + 4) << 32;
}

static inline void aiouffd_put_header_(uint8_t *to, uint32_t type, uint32_t length, uint32_t flags,
				       uint32_t fixed)
{
	aiouffd_put32_(to, AIOUFFD_MAGIC_);
	aiouffd_put32_(to + 4, AIOUFFD_VERSION_ | type << 16);
	aiouffd_put32_(to + 8, length);
	aiouffd_put32_(to + 12, flags);
	aiouffd_put32_(to + 16, fixed);
}

static inline uint32_t aiouffd_name_length_(const struct aiouffd_options *options)
{
	return options->object ? (uint32_t)strnlen(options->object, AIOUFFD_NAME_MAX_ + 1) : 0;
}

/* The record that hands everything over; built once, for the keeper must not allocate. */
static inline int aiouffd_build_record_(struct aiouffd_state_ *s)
{
	uint32_t name = aiouffd_name_length_(&s->options), index;
	uint8_t *at;

	s->record_length = AIOUFFD_ATTACH_SIZE_ + s->count * AIOUFFD_AREA_SIZE_ + name;
	s->record = at = (uint8_t *)calloc(1, s->record_length);
	if (!at)
		return -ENOMEM;
	aiouffd_put_header_(at, AIOUFFD_ATTACH_, s->record_length,
			    AIOUFFD_WIRE_ERRORS_ | (s->options.flags & AIOUFFD_BACKGROUND ?
							    AIOUFFD_WIRE_BACKGROUND_ :
							    0),
			    AIOUFFD_ATTACH_SIZE_);
	aiouffd_put32_(at + 20, name);
	aiouffd_put32_(at + 24, s->count);
	aiouffd_put32_(at + 28, AIOUFFD_AREA_SIZE_);
	memcpy(at + 48, s->tag, AIOUFFD_TAG_SIZE_);
	at += AIOUFFD_ATTACH_SIZE_;
	for (index = 0; index < s->count; index++, at += AIOUFFD_AREA_SIZE_) {
		const struct aiouffd_area *area = &s->areas[index];

		aiouffd_put64_(at, (uint64_t)(uintptr_t)area->address);
		aiouffd_put64_(at + 8, area->length);
		aiouffd_put64_(at + 16, area->offset);
		aiouffd_put32_(at + 24, area->page_size);
		aiouffd_put32_(at + 28, area->flags);
	}
	if (name)
		memcpy(at, s->options.object, name);
	return 0;
}

static inline int aiouffd_send_(int sock, const uint8_t *data, size_t length, const int *fds,
				unsigned count, int stop, uint64_t until)
{
	union {
		struct cmsghdr align;
		char space[CMSG_SPACE(2 * sizeof(int))];
	} control;
	struct msghdr message;
	struct iovec piece;
	size_t at = 0;
	ssize_t sent;
	int result;

	while (at < length) {
		memset(&message, 0, sizeof message);
		piece.iov_base = (void *)(uintptr_t)(data + at);
		piece.iov_len = length - at;
		message.msg_iov = &piece;
		message.msg_iovlen = 1;
		if (count && !at) {
			memset(&control, 0, sizeof control);
			message.msg_control = &control;
			message.msg_controllen = CMSG_SPACE(count * sizeof(int));
			control.align.cmsg_level = SOL_SOCKET;
			control.align.cmsg_type = SCM_RIGHTS;
			control.align.cmsg_len = CMSG_LEN(count * sizeof(int));
			memcpy(CMSG_DATA(&control.align), fds, count * sizeof(int));
		}
		sent = sendmsg(sock, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (sent > 0) {
			at += (size_t)sent;
			continue;
		}
		if (sent < 0 && errno != EAGAIN && errno != EINTR)
			return -errno;
		result = aiouffd_wait_(sock, POLLOUT, stop, until);
		if (result)
			return result;
	}
	return 0;
}

static inline int aiouffd_recv_(int sock, uint8_t *data, size_t length, int stop, uint64_t until)
{
	ssize_t got;
	int result;

	while (length) {
		got = recv(sock, data, length, MSG_DONTWAIT);
		if (got > 0) {
			data += got;
			length -= (size_t)got;
			continue;
		}
		if (got == 0)
			return -ECONNRESET;
		if (errno != EAGAIN && errno != EINTR)
			return -errno;
		result = aiouffd_wait_(sock, POLLIN, stop, until);
		if (result)
			return result;
	}
	return 0;
}

/* One answer.  0 whatever it says; else a negated errno. */
static inline int aiouffd_receive_answer_(int sock, struct aiouffd_answer_ *answer, int stop,
					  uint64_t until)
{
	uint8_t raw[AIOUFFD_ANSWER_MAX_], rest[256];
	uint32_t length, kept, fixed, text;
	int result = aiouffd_recv_(sock, raw, AIOUFFD_HEADER_SIZE_, stop, until);

	if (result)
		return result;
	length = aiouffd_get32_(raw + 8);
	if (aiouffd_get32_(raw) != AIOUFFD_MAGIC_ ||
	    aiouffd_get32_(raw + 4) >> 16 != AIOUFFD_ANSWER_ || length < AIOUFFD_ANSWER_SIZE_ ||
	    length > (1u << 20))
		return -EPROTO;
	kept = length < sizeof raw ? length : (uint32_t)sizeof raw;
	result = aiouffd_recv_(sock, raw + AIOUFFD_HEADER_SIZE_, kept - AIOUFFD_HEADER_SIZE_, stop,
			       until);
	for (length -= kept; !result && length; length -= kept) {
		kept = length < sizeof rest ? length : (uint32_t)sizeof rest;
		result = aiouffd_recv_(sock, rest, kept, stop, until);
	}
	if (result)
		return result;
	length = aiouffd_get32_(raw + 8);
	kept = length < sizeof raw ? length : (uint32_t)sizeof raw;
	fixed = aiouffd_get32_(raw + 16);
	text = aiouffd_get32_(raw + 64);
	if (fixed < AIOUFFD_ANSWER_SIZE_ || fixed > kept)
		return -EPROTO;
	if (text > kept - fixed)
		text = kept - fixed;
	if (text >= sizeof answer->text)
		text = (uint32_t)sizeof answer->text - 1;
	answer->status = aiouffd_get32_(raw + 20);
	answer->object_size = aiouffd_get64_(raw + 24);
	memcpy(answer->tag, raw + 32, AIOUFFD_TAG_SIZE_);
	memcpy(answer->text, raw + fixed, text);
	answer->text[text] = 0;
	return 0;
}

/* The errno for what a server says. */
static inline int aiouffd_status_(uint32_t status)
{
	switch (status) {
	case 0:
		return 0;
	case 2: /* no such object */
		return -ENOENT;
	case 3: /* the object is another one now */
		return -ESTALE;
	case 4: /* the server does not know what was asked for */
		return -EOPNOTSUPP;
	case 5: /* the server does not want to */
		return -EACCES;
	case 6: /* later, perhaps */
		return -EAGAIN;
	default:
		return -EPROTO;
	}
}

/* Who listens there, by the kernel's word: before anything is said, for a path is no identity. */
static inline int aiouffd_check_server_(int sock, const struct aiouffd_options *options)
{
	struct ucred server;
	socklen_t size = sizeof server;

	if (getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &server, &size))
		return -errno;
	if (server.uid == 0 || server.uid == geteuid())
		return 0;
	if ((options->flags & AIOUFFD_SERVER_USER) &&
	    (options->server_user == AIOUFFD_ANY_USER || options->server_user == server.uid))
		return 0;
	return -EPERM;
}

static inline int aiouffd_dial_(const struct sockaddr_un *to)
{
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), result;

	if (fd < 0)
		return -errno;
	if (connect(fd, (const struct sockaddr *)to, sizeof *to)) {
		result = -errno;
		close(fd);
		return result;
	}
	return fd;
}

static inline int aiouffd_ask_(int sock, const struct aiouffd_options *options,
			       struct aiouffd_answer_ *answer, int stop, uint64_t until)
{
	uint8_t record[AIOUFFD_QUERY_SIZE_ + AIOUFFD_NAME_MAX_];
	uint32_t name = aiouffd_name_length_(options);
	int result;

	memset(record, 0, sizeof record);
	aiouffd_put_header_(record, AIOUFFD_QUERY_, AIOUFFD_QUERY_SIZE_ + name, 0, AIOUFFD_QUERY_SIZE_);
	aiouffd_put32_(record + 20, name);
	if (name)
		memcpy(record + AIOUFFD_QUERY_SIZE_, options->object, name);
	result = aiouffd_send_(sock, record, AIOUFFD_QUERY_SIZE_ + name, NULL, 0, stop, until);
	if (!result)
		result = aiouffd_receive_answer_(sock, answer, stop, until);
	return result;
}

/* Hand everything over by a fresh connection, or one that asked first. */
static inline int aiouffd_present_(struct aiouffd_state_ *s, int sock,
				   struct aiouffd_answer_ *answer, int stop, uint64_t until)
{
	int fds[2], result;

	fds[0] = s->uffd;
	fds[1] = s->states_fd;
	result = aiouffd_send_(sock, s->record, s->record_length, fds, 2, stop, until);
	if (!result)
		result = aiouffd_receive_answer_(sock, answer, stop, until);
	return result;
}

/* ------------------------------------------------------------------------- the uffd */

static inline int aiouffd_ioctl_(int fd, unsigned long request, void *argument)
{
	return ioctl(fd, request, argument) ? -errno : 0;
}

static inline void aiouffd_wake_(struct aiouffd_state_ *s, uint64_t start, uint64_t length)
{
	struct aiouffd_range_ range;

	range.start = start;
	range.length = length;
	aiouffd_ioctl_(s->uffd, AIOUFFD_IOC_WAKE_, &range);
}

static inline void aiouffd_wake_all_(struct aiouffd_state_ *s)
{
	uint32_t index;

	for (index = 0; index < s->count; index++)
		aiouffd_wake_(s, (uint64_t)(uintptr_t)s->areas[index].address, s->areas[index].length);
}

/* The best that this user may have: system call, device, or without faults in system calls. */
static inline int aiouffd_make_uffd_(uint32_t flags, int *user_mode_only)
{
	int fd = -1, device, error = EPERM;

	*user_mode_only = 0;
	if (!(flags & AIOUFFD_USER_MODE_ONLY)) {
		fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
		error = errno;
		if (fd < 0 && error == EPERM) {
			device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
			if (device >= 0) {
				fd = ioctl(device, AIOUFFD_IOC_NEW_, O_CLOEXEC | O_NONBLOCK);
				close(device);
			}
		}
	}
	if (fd < 0 && error == EPERM && !(flags & AIOUFFD_ALL_FAULTS)) {
		fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1);
		error = errno;
		*user_mode_only = 1;
	}
	return fd < 0 ? -error : fd;
}

static inline int aiouffd_open_uffd_(struct aiouffd_state_ *s, int *user_mode_only)
{
	uint64_t wanted = AIOUFFD_FEATURE_REMAP_ | AIOUFFD_FEATURE_REMOVE_ | AIOUFFD_FEATURE_UNMAP_;
	struct aiouffd_api_ api;
	int probe = aiouffd_make_uffd_(s->options.flags, user_mode_only), result;

	if (probe < 0)
		return aiouffd_fail_(probe, "userfaultfd cannot be had; `aiouffd doctor` says more");
	/* The handshake works once, so what there is has to be asked for on another descriptor. */
	memset(&api, 0, sizeof api);
	api.api = 0xAA;
	result = aiouffd_ioctl_(probe, AIOUFFD_IOC_API_, &api);
	close(probe);
	if (result)
		return aiouffd_fail_(result, "the kernel's userfaultfd is of an unknown kind");
	if ((api.features & wanted) != wanted)
		return aiouffd_fail_(-EOPNOTSUPP, "the kernel does not tell of removed memory");
	s->can_poison = (api.features >> 14) & 1;
	if (s->options.flags & AIOUFFD_FORK)
		wanted |= AIOUFFD_FEATURE_FORK_;
	s->uffd = aiouffd_make_uffd_(s->options.flags, user_mode_only);
	if (s->uffd < 0)
		return aiouffd_fail_(s->uffd, "userfaultfd cannot be had");
	memset(&api, 0, sizeof api);
	api.api = 0xAA;
	api.features = wanted;
	result = aiouffd_ioctl_(s->uffd, AIOUFFD_IOC_API_, &api);
	if (result)
		return aiouffd_fail_(result, s->options.flags & AIOUFFD_FORK ?
						     "following forks needs CAP_SYS_PTRACE" :
						     "the userfaultfd cannot be set up");
	return 0;
}

static inline int aiouffd_register_areas_(struct aiouffd_state_ *s)
{
	struct aiouffd_register_ range;
	uint32_t index;
	int result;

	for (index = 0; index < s->count; index++) {
		range.start = (uint64_t)(uintptr_t)s->areas[index].address;
		range.length = s->areas[index].length;
		range.mode = AIOUFFD_MISSING_;
		range.ioctls = 0;
		result = aiouffd_ioctl_(s->uffd, AIOUFFD_IOC_REGISTER_, &range);
		if (result)
			return aiouffd_fail_(result, "this memory cannot be registered");
	}
	return 0;
}

/* The file of page states: sealed, so that nobody can pull it from under the server. */
static inline int aiouffd_make_states_(struct aiouffd_state_ *s)
{
	uint32_t index;
	void *mapped;

	for (index = 0; index < s->count; index++)
		s->states_length += s->areas[index].length / s->page_size;
	/* MFD_CLOEXEC | MFD_ALLOW_SEALING */
	s->states_fd = (int)syscall(SYS_memfd_create, "aiouffd-states", 3u);
	if (s->states_fd < 0 || ftruncate(s->states_fd, (off_t)s->states_length) ||
	    fcntl(s->states_fd, AIOUFFD_ADD_SEALS_, AIOUFFD_SEALS_))
		return aiouffd_fail_(-errno, "the file of page states cannot be made");
	mapped = mmap(NULL, s->states_length, PROT_READ | PROT_WRITE, MAP_SHARED, s->states_fd, 0);
	if (mapped == MAP_FAILED)
		return aiouffd_fail_(-errno, "the file of page states cannot be mapped");
	s->states = (uint8_t *)mapped;
	madvise(mapped, s->states_length, MADV_DONTFORK);
	return 0;
}

/* States of the page at `address` and of those that follow it in its area (*left, at least 1); NULL
 * if it is in no area. */
static inline uint8_t *aiouffd_states_at_(struct aiouffd_state_ *s, uint64_t address, uint64_t *left)
{
	uint8_t *states = s->states;
	uint32_t index;

	for (index = 0; index < s->count; index++) {
		uint64_t start = (uint64_t)(uintptr_t)s->areas[index].address;
		uint64_t length = s->areas[index].length;

		if (address >= start && address - start < length) {
			*left = (start + length - address + s->page_size - 1) / s->page_size;
			return states + (address - start) / s->page_size;
		}
		states += length / s->page_size;
	}
	return NULL;
}

static inline void aiouffd_mark_(struct aiouffd_state_ *s, uint64_t start, uint64_t end, uint8_t bits)
{
	uint64_t left, index;
	uint8_t *states;

	while (start < end) {
		states = aiouffd_states_at_(s, start, &left);
		if (!states) {
			start += s->page_size;
			continue;
		}
		if (left > (end - start + s->page_size - 1) / s->page_size)
			left = (end - start + s->page_size - 1) / s->page_size;
		for (index = 0; index < left; index++)
			__atomic_fetch_or(&states[index], bits, __ATOMIC_SEQ_CST);
		start += left * s->page_size;
	}
}

/* The first state from number `at` on, before `end`, that has one of `bits`; `end` if none has.  Over
 * the holes of the file: to read them would make memory of them. */
static inline uint64_t aiouffd_next_with_(const struct aiouffd_state_ *s, uint64_t at, uint64_t end,
					  uint8_t bits)
{
	off_t data, hole;

	while (at < end && (data = lseek(s->states_fd, (off_t)at, SEEK_DATA)) >= 0) {
		hole = lseek(s->states_fd, data, SEEK_HOLE);
		for (at = (uint64_t)data; (off_t)at < hole && at < end; at++)
			if (__atomic_load_n(&s->states[at], __ATOMIC_SEQ_CST) & bits)
				return at;
	}
	return end;
}

/* The first state from number `at` on, before `end`, without GONE; `at` is not in a hole of the file
 * but where 4096 of them begin. */
static inline uint64_t aiouffd_next_there_(const struct aiouffd_state_ *s, uint64_t at, uint64_t end)
{
	for (; at < end; at++) {
		if (at % 4096 == 0 && lseek(s->states_fd, (off_t)at, SEEK_DATA) != (off_t)at)
			break;
		if (!(__atomic_load_n(&s->states[at], __ATOMIC_SEQ_CST) & AIOUFFD_GONE_))
			break;
	}
	return at;
}

/* Whether a part was moved by mremap: where to we do not know. */
static inline int aiouffd_was_moved_(const struct aiouffd_state_ *s)
{
	return aiouffd_next_with_(s, 0, s->states_length, AIOUFFD_MOVED_) < s->states_length;
}

/* -------------------------------------------------------- answering without a server */

/* Before Linux 6.6 the kernel makes no errors.  There an error page is a private mapping of an empty file,
 * where the mapping is ours.  To replace a mapping is an event, and waits until it was read, by the
 * server or by the keeper; so a thread of its own does it. */
static inline void *aiouffd_map_errors_(void *argument)
{
	struct aiouffd_state_ *s = (struct aiouffd_state_ *)argument;
	uint64_t page, left;
	uint8_t *states;
	void *place;

	while (read(s->pages[0], &page, sizeof page) == (ssize_t)sizeof page && page) {
		states = aiouffd_states_at_(s, page, &left);
		place = (void *)(uintptr_t)page;
		if (states && !(__atomic_fetch_or(states, AIOUFFD_FAILED_, __ATOMIC_SEQ_CST) &
				(AIOUFFD_FAILED_ | AIOUFFD_GONE_))) {
			/* An offset that goes with the address: neighbours become one mapping. */
			if (mmap(place, s->page_size, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, s->empty,
				 (off_t)page) != MAP_FAILED)
				madvise(place, s->page_size, MADV_DONTFORK);
			else
				mprotect(place, s->page_size, PROT_NONE);
		}
		aiouffd_wake_(s, page, s->page_size);
	}
	return NULL;
}

/* True once there is one. */
static inline int aiouffd_start_mapper_(struct aiouffd_state_ *s)
{
	if (s->mapping || __atomic_load_n(&s->mapped_up, __ATOMIC_SEQ_CST))
		return s->mapping;
	if (s->empty < 0)
		s->empty = (int)syscall(SYS_memfd_create, "aiouffd: error page", 1u);
	if (s->empty < 0)
		return 0;
	if (s->pages[0] < 0) {
		if (pipe(s->pages)) {
			s->pages[0] = s->pages[1] = -1;
			return 0;
		}
		fcntl(s->pages[0], F_SETFD, FD_CLOEXEC);
		fcntl(s->pages[1], F_SETFD, FD_CLOEXEC);
		fcntl(s->pages[1], F_SETFL, O_NONBLOCK);
	}
	/* Every signal is blocked, for they are in the keeper. */
	s->mapping = pthread_create(&s->mapper, NULL, aiouffd_map_errors_, s) == 0;
	return s->mapping;
}

/* An error for who waits for this page; the keeper's. */
static inline void aiouffd_make_error_(struct aiouffd_state_ *s, uint64_t page)
{
	uint64_t left;
	uint8_t *states = aiouffd_states_at_(s, page, &left);

	if (states && s->ours && aiouffd_start_mapper_(s) &&
	    !__atomic_load_n(&s->mapped_up, __ATOMIC_SEQ_CST)) {
		/* If there is no room now, who waits asks again. */
		if (write(s->pages[1], &page, sizeof page) == (ssize_t)sizeof page)
			return;
	} else if (!states || !(__atomic_load_n(states, __ATOMIC_SEQ_CST) & AIOUFFD_GONE_)) {
		mprotect((void *)(uintptr_t)page, s->page_size, PROT_NONE);
	}
	aiouffd_wake_(s, page, s->page_size);
}

/* Before the keeper stops, which reads the events. */
static inline void aiouffd_stop_mapper_(struct aiouffd_state_ *s)
{
	uint64_t no_page = 0;

	__atomic_store_n(&s->mapped_up, 1, __ATOMIC_SEQ_CST);
	if (!s->mapping)
		return;
	while (write(s->pages[1], &no_page, sizeof no_page) < 0 && (errno == EAGAIN || errno == EINTR))
		aiouffd_wait_(-1, 0, -1, aiouffd_until_(1));
	pthread_join(s->mapper, NULL);
}

/* 0, or -EAGAIN where an event is in the way: unread, or read, but the thread that has caused it has not
 * run since. */
static inline int aiouffd_refuse_page_(struct aiouffd_state_ *s, uint64_t page)
{
	struct aiouffd_fill_ fill;
	uint64_t left;
	uint8_t *states = aiouffd_states_at_(s, page, &left);
	int result;

	fill.start = page;
	fill.length = s->page_size;
	fill.mode = 0;
	fill.done = 0;
	if (states && s->page_size <= 65536 &&
	    (__atomic_load_n(states, __ATOMIC_SEQ_CST) & (AIOUFFD_REMOVED_ | AIOUFFD_GONE_)) ==
		    AIOUFFD_REMOVED_)
		result = aiouffd_ioctl_(s->uffd, AIOUFFD_IOC_ZEROPAGE_, &fill);
	else {
		result = s->can_poison ? aiouffd_ioctl_(s->uffd, AIOUFFD_IOC_POISON_, &fill) : -EINVAL;
		if (result == -EINVAL || result == -ENOTTY) {
			aiouffd_make_error_(s, page);
			return 0;
		}
	}
	if (result == -EAGAIN)
		return result;
	/* Where nothing could be done it asks again. */
	aiouffd_wake_(s, page, s->page_size);
	return 0;
}

static inline void aiouffd_note_event_(struct aiouffd_state_ *s, const struct aiouffd_message_ *message)
{
	switch (message->event) {
	case AIOUFFD_EVENT_REMOVE_:
		aiouffd_mark_(s, message->a, message->b, AIOUFFD_REMOVED_);
		break;
	case AIOUFFD_EVENT_UNMAP_:
		aiouffd_mark_(s, message->a, message->b, AIOUFFD_GONE_);
		break;
	case AIOUFFD_EVENT_REMAP_:
		aiouffd_mark_(s, message->a, message->a + message->c, AIOUFFD_GONE_ | AIOUFFD_MOVED_);
		break;
	case AIOUFFD_EVENT_FORK_:
		close((int)(uint32_t)message->a);
		break;
	default:
		break;
	}
}

/* Whoever asks for a page gets an error, or the zeros that are due; whoever waits for an event to be
 * read goes on.  Reads all there is.
 *
 * read() gives faults before events, and while an event is unread nothing can be filled.  So who
 * cannot be answered must not be woken before all is read: it would fault again, and so many of them
 * that the events are never reached. */
static inline void aiouffd_refuse_some_(struct aiouffd_state_ *s)
{
	struct aiouffd_message_ messages[16];
	uint64_t page, left, owed[AIOUFFD_OWED_MAX_];
	int index, count, again, elsewhere;
	ssize_t size;

	do {
		again = elsewhere = 0;
		while ((size = read(s->uffd, messages, sizeof messages)) > 0) {
			count = (int)(size / (ssize_t)sizeof *messages);
			for (index = 0; index < count; index++)
				aiouffd_note_event_(s, &messages[index]);
			for (index = 0; index < count; index++) {
				if (messages[index].event != AIOUFFD_EVENT_PAGEFAULT_)
					continue;
				page = messages[index].b & ~(s->page_size - 1);
				if (aiouffd_refuse_page_(s, page) == 0)
					continue;
				again = 1;
				if (aiouffd_states_at_(s, page, &left))
					continue;
				if (elsewhere < AIOUFFD_OWED_MAX_)
					owed[elsewhere++] = page;
				else
					aiouffd_wake_(s, page, s->page_size);
			}
		}
		if (again) {
			aiouffd_wait_(-1, 0, -1, aiouffd_until_(0));
			aiouffd_wake_all_(s);
			while (elsewhere)
				aiouffd_wake_(s, owed[--elsewhere], s->page_size);
		}
	} while (again && __atomic_load_n(&s->command, __ATOMIC_SEQ_CST) != AIOUFFD_STOP_);
}

/* Give what is missing of [start, start + length) an error, for good.  One thread, nobody serves. */
static inline int aiouffd_poison_(struct aiouffd_state_ *s, uint64_t start, uint64_t length)
{
	/* What is not registered or lies in several mappings fails as a whole; so, in pieces. */
	uint64_t piece = 2u << 20, end = start + length, step, fine = 0;
	struct aiouffd_fill_ fill;
	int result, tries = 0;

	if (piece < s->page_size)
		piece = s->page_size;
	while (start < end) {
		step = start < fine ? s->page_size : piece - start % piece;
		if (step > end - start)
			step = end - start;
		fill.start = start;
		fill.length = step;
		fill.mode = 0;
		fill.done = 0;
		result = aiouffd_ioctl_(s->uffd, AIOUFFD_IOC_POISON_, &fill);
		if (!result) {
			start += step;
		} else if (result == -EAGAIN) {
			if (fill.done > 0) {
				start += (uint64_t)fill.done;
				continue;
			}
			if (++tries > 5000)
				return -EAGAIN;
			aiouffd_refuse_some_(s);
			aiouffd_wait_(-1, 0, -1, aiouffd_until_(0));
		} else if (result == -EINVAL || result == -ENOTTY) {
			return -EOPNOTSUPP;
		} else if (result != -EEXIST && result != -ENOENT && result != -EFAULT) {
			return result;
		} else if (result == -EEXIST || step == s->page_size) {
			start += s->page_size; /* it is there, or no memory of ours */
		} else {
			fine = start + step;
		}
	}
	return 0;
}

/* ----------------------------------------------------------------------- the keeper */

static inline void aiouffd_say_(struct aiouffd_state_ *s, const char *text, int error,
				const char *more)
{
	char line[512], number[32];
	int size;

	snprintf(number, sizeof number, " (errno %d)", error);
	size = snprintf(line, sizeof line, "aiouffd: process %d, %s: %s%s%s%s\n", (int)getpid(),
			s->path.sun_path, text, error ? number : "", *more ? ": " : "", more);
	if (size > (int)sizeof line - 1)
		size = (int)sizeof line - 1;
	/* Nobody may be reading there, and we must not wait for that. */
	if (size > 0 && aiouffd_wait_(STDERR_FILENO, POLLOUT, -1, 1) == 0 &&
	    write(STDERR_FILENO, line, (size_t)size) < 0)
		return;
}

static inline void aiouffd_tell_(struct aiouffd_state_ *s, enum aiouffd_event event, int error)
{
	if (s->options.on_event)
		s->options.on_event(s->options.context, event, error);
}

static inline uint32_t aiouffd_command_now_(struct aiouffd_state_ *s)
{
	return __atomic_load_n(&s->command, __ATOMIC_SEQ_CST);
}

/* Whether there is something else to do than to keep. */
static inline int aiouffd_ordered_(struct aiouffd_state_ *s)
{
	uint64_t ignored;

	/* In this order, or a command that comes between the two would not be heard of; and in any
	 * case, or the poke for a command that was seen before would wake us for ever. */
	if (read(s->poke, &ignored, sizeof ignored) < 0 && errno != EAGAIN)
		return 1;
	return aiouffd_command_now_(s) != AIOUFFD_KEEP_;
}

/* Tell the server that we go, and wait until it has let go: until then it may still fill pages, and
 * whatever memory comes to lie at their addresses. */
static inline void aiouffd_part_(struct aiouffd_state_ *s, int ms)
{
	uint64_t until = aiouffd_until_(ms);
	uint8_t ignored[256];
	ssize_t got;
	int result;

	if (s->sock < 0)
		return;
	shutdown(s->sock, SHUT_WR);
	for (;;) {
		got = recv(s->sock, ignored, sizeof ignored, MSG_DONTWAIT);
		if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR))
			break;
		result = got > 0 ? 0 : aiouffd_wait_(s->sock, POLLIN, -1, until);
		if (result == -ETIMEDOUT || aiouffd_now_() >= until) {
			s->lingers = 1;
			break;
		}
	}
	close(s->sock);
	s->sock = -1;
	__atomic_store_n(&s->connected, 0, __ATOMIC_SEQ_CST);
}

/* So many more bytes of what a server says after its answer: pages that it cannot have, and cannot make
 * errors itself.  False: this is no server of ours. */
static inline int aiouffd_hear_(struct aiouffd_state_ *s, uint32_t size)
{
	const uint8_t *record = s->heard;
	uint64_t start, length, left;
	uint32_t whole;

	if (s->heard_skip) {
		s->heard_skip -= size;
		return 1;
	}
	s->heard_size += size;
	if (s->heard_size < AIOUFFD_ERROR_SIZE_)
		return 1;
	s->heard_size = 0;
	whole = aiouffd_get32_(record + 8);
	if (aiouffd_get32_(record) != AIOUFFD_MAGIC_ ||
	    aiouffd_get32_(record + 4) != (AIOUFFD_VERSION_ | AIOUFFD_ERROR_ << 16) ||
	    whole < AIOUFFD_ERROR_SIZE_ || whole > AIOUFFD_RECORD_MAX_)
		return 0;
	s->heard_skip = whole - AIOUFFD_ERROR_SIZE_;
	start = aiouffd_get64_(record + 24);
	length = aiouffd_get64_(record + 32);
	for (; length && !(start % s->page_size); start += s->page_size) {
		if (!aiouffd_states_at_(s, start, &left))
			return 0;
		aiouffd_make_error_(s, start);
		length -= length < s->page_size ? length : s->page_size;
	}
	return 1;
}

/* Until the server is gone (0), or a command comes (-ECANCELED). */
static inline int aiouffd_watch_(struct aiouffd_state_ *s)
{
	uint32_t want;
	ssize_t got;

	s->heard_size = s->heard_skip = 0;
	for (;;) {
		if (aiouffd_ordered_(s))
			return -ECANCELED;
		want = AIOUFFD_ERROR_SIZE_ - s->heard_size;
		if (s->heard_skip)
			want = s->heard_skip < sizeof s->heard ? s->heard_skip : sizeof s->heard;
		got = recv(s->sock, s->heard + s->heard_size, want, MSG_DONTWAIT);
		if (got > 0 && aiouffd_hear_(s, (uint32_t)got))
			continue;
		/* A server that has something else to say after its answer is none. */
		if (got >= 0 || (errno != EAGAIN && errno != EINTR))
			return 0;
		aiouffd_wait_(s->sock, POLLIN, s->poke, 0);
	}
}

/* One attempt to find a server. */
static inline int aiouffd_return_(struct aiouffd_state_ *s, struct aiouffd_answer_ *answer,
				  uint64_t until)
{
	int result;

	answer->text[0] = 0;
	answer->status = 0;
	s->sock = aiouffd_dial_(&s->path);
	if (s->sock < 0)
		return s->sock;
	result = aiouffd_check_server_(s->sock, &s->options);
	if (result) {
		close(s->sock);
		s->sock = -1;
		snprintf(answer->text, sizeof answer->text, "another user's server listens there");
		return result;
	}
	result = aiouffd_present_(s, s->sock, answer, s->poke, until);
	if (!result)
		result = aiouffd_status_(answer->status);
	if (result && result != -ECONNRESET && result != -EPIPE && !answer->status) {
		/* It may have the descriptor. */
		aiouffd_part_(s, aiouffd_command_now_(s) == AIOUFFD_KEEP_ ? AIOUFFD_FIRST_ANSWER_ :
									    AIOUFFD_LET_GO_);
	} else if (result) {
		close(s->sock);
		s->sock = -1;
	}
	return result;
}

/* Look for a server until there is one (0), or a command comes, or the time is over. */
static inline int aiouffd_search_(struct aiouffd_state_ *s)
{
	uint64_t until = s->options.lost_ms > 0 ? aiouffd_until_(s->options.lost_ms) : 0;
	uint64_t since = aiouffd_now_(), pause, jitter = since ^ (uintptr_t)s ^ (uint64_t)getpid(), limit;
	struct aiouffd_answer_ answer;
	int result, told = 0, patience = AIOUFFD_FIRST_ANSWER_;

	aiouffd_part_(s, AIOUFFD_FIRST_ANSWER_);
	aiouffd_put32_(s->record + 40, (uint32_t)__atomic_load_n(&s->resumed, __ATOMIC_SEQ_CST) + 1);
	aiouffd_tell_(s, AIOUFFD_LOST, 0);
	for (;;) {
		if (aiouffd_ordered_(s))
			return -ECANCELED;
		/* One that listens and does not answer is no server, and another may come. */
		limit = aiouffd_until_(patience);
		result = aiouffd_return_(s, &answer, until && until < limit ? until : limit);
		if (!result)
			break;
		if (result == -ETIMEDOUT)
			patience = AIOUFFD_NEXT_ANSWER_;
		if (result == -ECANCELED)
			continue;
		if (until && aiouffd_now_() >= until) {
			aiouffd_tell_(s, AIOUFFD_GAVE_UP, -result);
			return -ETIMEDOUT;
		}
		if (!told && !s->options.on_event && aiouffd_now_() - since > 1000) {
			told = 1;
			aiouffd_say_(s, "lost the server; threads that touch missing pages wait until one is back", -result,
				     answer.text);
		}
		/* So an outage becomes an eighth longer at most.  And clients of one server spread out,
		 * or they would all knock at once. */
		pause = (aiouffd_now_() - since) / 16;
		pause = pause < 1 ? 1 : pause > 250 ? 250 : pause;
		jitter = jitter * UINT64_C(6364136223846793005) + 1442695040888963407u;
		aiouffd_wait_(-1, 0, s->poke, aiouffd_until_((int)(pause + (jitter >> 33) % pause)));
	}
	__atomic_fetch_add(&s->resumed, 1, __ATOMIC_SEQ_CST);
	__atomic_store_n(&s->connected, 1, __ATOMIC_SEQ_CST);
	/* What the old server had read died with it. */
	aiouffd_wake_all_(s);
	aiouffd_tell_(s, AIOUFFD_RESUMED, 0);
	if (told)
		aiouffd_say_(s, "a server is there again", 0, "");
	return 0;
}

static inline void aiouffd_give_up_(struct aiouffd_state_ *s)
{
	uint32_t keep = AIOUFFD_KEEP_;

	if (!s->options.on_event)
		aiouffd_say_(s, "no server came back in time", 0,
			     s->options.on_lost == AIOUFFD_ABORT ?
				     "the program is aborted" :
				     "touching what is missing is an error from now on");
	if (s->options.on_lost == AIOUFFD_ABORT)
		abort();
	__atomic_compare_exchange_n(&s->command, &keep, AIOUFFD_REFUSE_, 0, __ATOMIC_SEQ_CST,
				    __ATOMIC_SEQ_CST);
}

static inline void *aiouffd_keep_(void *argument)
{
	struct aiouffd_state_ *s = (struct aiouffd_state_ *)argument;
	int result;

	while (aiouffd_command_now_(s) == AIOUFFD_HOLD_) {
		aiouffd_wait_(-1, 0, s->poke, 0);
		aiouffd_ordered_(s);
	}
	while (aiouffd_command_now_(s) == AIOUFFD_KEEP_)
		if (aiouffd_watch_(s) == 0 && aiouffd_search_(s) == -ETIMEDOUT)
			aiouffd_give_up_(s);
	aiouffd_part_(s, AIOUFFD_LET_GO_);
	if (aiouffd_command_now_(s) == AIOUFFD_REFUSE_) {
		/* From here on messages are ours: have everybody ask again. */
		aiouffd_wake_all_(s);
		aiouffd_refuse_some_(s);
		__atomic_store_n(&s->done, AIOUFFD_REFUSE_, __ATOMIC_SEQ_CST);
		while (aiouffd_command_now_(s) == AIOUFFD_REFUSE_) {
			aiouffd_refuse_some_(s);
			result = aiouffd_wait_(s->uffd, POLLIN, s->poke,
					       s->lingers ? aiouffd_until_(500) : 0);
			if (result == -ECANCELED)
				aiouffd_ordered_(s);
			/* A server that was stopped may read once more before it sees that we went. */
			if (result == -ETIMEDOUT)
				aiouffd_wake_all_(s);
		}
	}
	return NULL;
}

static inline int aiouffd_start_keeper_(struct aiouffd_state_ *s, uint32_t command)
{
	pthread_attr_t attributes;
	sigset_t all, before;
	int error;

	__atomic_store_n(&s->command, command, __ATOMIC_SEQ_CST);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 256 * 1024);
	error = pthread_create(&s->keeper, &attributes, aiouffd_keep_, s);
	pthread_attr_destroy(&attributes);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	/* Not EAGAIN, which would mean a server that is busy. */
	if (error)
		return aiouffd_fail_(error == EAGAIN ? -ENOMEM : -error,
				     "the keeper thread cannot be started");
	pthread_setname_np(s->keeper, "aiouffd-keeper");
	s->started = 1;
	return 0;
}

static inline void aiouffd_order_(struct aiouffd_state_ *s, uint32_t command)
{
	uint64_t one = 1;

	__atomic_store_n(&s->command, command, __ATOMIC_SEQ_CST);
	if (write(s->poke, &one, sizeof one) < 0)
		return; /* it is readable already */
}

/* ------------------------------------------------------------------ beginning and end */

static inline void aiouffd_start_refusing_(struct aiouffd_state_ *s)
{
	aiouffd_order_(s, AIOUFFD_REFUSE_);
	while (__atomic_load_n(&s->done, __ATOMIC_SEQ_CST) != AIOUFFD_REFUSE_)
		aiouffd_wait_(-1, 0, -1, aiouffd_until_(0));
}

/* The end of memory without a hole.  It is never left registered and missing: that would read as
 * zeros.  False if it has to stay registered. */
static inline int aiouffd_end_run_(struct aiouffd_state_ *s, uint64_t start, uint64_t length)
{
	void *address = (void *)(uintptr_t)start;
	struct aiouffd_range_ range;

	/* Before it is unregistered, which lets those go on who wait. */
	if (s->ours || (s->keeping && aiouffd_poison_(s, start, length)))
		if (mprotect(address, length, PROT_NONE))
			return 0;
	range.start = start;
	range.length = length;
	aiouffd_ioctl_(s->uffd, AIOUFFD_IOC_UNREGISTER_, &range);
	aiouffd_wake_(s, start, length);
	if (s->ours && s->lingers)
		madvise(address, length, MADV_DONTNEED);
	else if (s->ours)
		munmap(address, length);
	return 1;
}

/* The end of all memory, but for what the program has unmapped: something else may be there now. */
static inline int aiouffd_end_areas_(struct aiouffd_state_ *s)
{
	uint64_t number = 0, at, next, end;
	uint32_t index;
	int ended = 1;

	for (index = 0; index < s->count; index++) {
		uint64_t start = (uint64_t)(uintptr_t)s->areas[index].address, first = number;

		end = number += s->areas[index].length / s->page_size;
		for (at = first; at < end; at = next) {
			at = s->states ? aiouffd_next_there_(s, at, end) : at;
			next = s->states ? aiouffd_next_with_(s, at, end, AIOUFFD_GONE_) : end;
			if (at < next && !aiouffd_end_run_(s, start + (at - first) * s->page_size,
							   (next - at) * s->page_size))
				ended = 0;
		}
	}
	return ended;
}

/* Mappings that are errors, in the place of memory of ours. */
static inline void aiouffd_end_errors_(struct aiouffd_state_ *s)
{
	const uint8_t gone = AIOUFFD_FAILED_ | AIOUFFD_GONE_;
	uint64_t at = 0;

	if (!s->states || !s->mapping || s->lingers)
		return;
	for (; (at = aiouffd_next_with_(s, at, s->states_length, AIOUFFD_FAILED_)) < s->states_length;
	     at++)
		if ((__atomic_load_n(&s->states[at], __ATOMIC_SEQ_CST) & gone) == gone)
			munmap((uint8_t *)s->areas[0].address + at * s->page_size, s->page_size);
}

static inline void aiouffd_close_errors_(struct aiouffd_state_ *s)
{
	int index;

	for (index = 0; index < 2; index++)
		if (s->pages[index] >= 0)
			close(s->pages[index]);
	if (s->empty >= 0)
		close(s->empty);
	s->empty = s->pages[0] = s->pages[1] = -1;
}

static inline void aiouffd_free_(struct aiouffd_state_ *s)
{
	if (s->uffd >= 0)
		close(s->uffd);
	if (s->states)
		munmap(s->states, s->states_length);
	if (s->states_fd >= 0)
		close(s->states_fd);
	if (s->poke >= 0)
		close(s->poke);
	aiouffd_close_errors_(s);
	free(s->record);
	free(s->areas);
	free((void *)(uintptr_t)s->options.object);
	free(s);
}

/* Everything goes, but for `memory` itself. */
static inline void aiouffd_drop_(struct aiouffd_state_ *s)
{
	int ended = 1;

	if (s->keeping) {
		aiouffd_start_refusing_(s);
		aiouffd_stop_mapper_(s);
		/* What was moved lives on, and must not become zeros: the keeper stays, and answers
		 * with errors until the program ends. */
		ended = !aiouffd_was_moved_(s);
	}
	if (s->started && ended) {
		aiouffd_order_(s, AIOUFFD_STOP_);
		pthread_join(s->keeper, NULL);
		s->started = 0;
	}
	aiouffd_part_(s, AIOUFFD_LET_GO_);
	if (s->uffd >= 0) {
		if (!aiouffd_end_areas_(s))
			ended = 0;
		aiouffd_end_errors_(s);
		if (!s->started) {
			aiouffd_refuse_some_(s); /* let go who waits in madvise or mremap */
			if (s->states && aiouffd_was_moved_(s))
				ended = 0;
		}
	} else if (s->ours) {
		munmap(s->areas[0].address, s->mapped);
	}
	if (ended) {
		aiouffd_free_(s);
		return;
	}
	/* If no thread is to be had, threads that touch it wait for ever: better than zeros. */
	if (s->started || aiouffd_start_keeper_(s, AIOUFFD_REFUSE_) == 0)
		pthread_detach(s->keeper);
}

static inline int aiouffd_absolute_(struct sockaddr_un *to, const char *path)
{
	char here[sizeof to->sun_path];
	int size;

	memset(to, 0, sizeof *to);
	to->sun_family = AF_UNIX;
	/* The program may change its directory before the server comes back. */
	if (!path || !*path)
		return aiouffd_fail_(-ENOENT, "the path is empty");
	if (path[0] == '/')
		size = snprintf(to->sun_path, sizeof to->sun_path, "%s", path);
	else if (getcwd(here, sizeof here))
		size = snprintf(to->sun_path, sizeof to->sun_path, "%s/%s", here, path);
	else
		size = -1;
	if (size < 0 || size >= (int)sizeof to->sun_path)
		return aiouffd_fail_(-ENAMETOOLONG, "the path of the socket is longer than 107 bytes");
	return 0;
}

static inline struct aiouffd_state_ *aiouffd_new_state_(const char *path,
							const struct aiouffd_options *options,
							int *result)
{
	struct aiouffd_state_ *s = (struct aiouffd_state_ *)calloc(1, sizeof *s);

	if (!s) {
		*result = aiouffd_fail_(-ENOMEM, "no memory");
		return NULL;
	}
	s->uffd = s->states_fd = s->poke = s->sock = s->empty = s->pages[0] = s->pages[1] = -1;
	if (options)
		s->options = *options;
	s->options.object = NULL;
	*result = aiouffd_absolute_(&s->path, path);
	if (!*result && options && aiouffd_name_length_(options) > AIOUFFD_NAME_MAX_)
		*result = aiouffd_fail_(-ENAMETOOLONG, "the object's name is longer than 1024 bytes");
	if (!*result && options && options->object) {
		s->options.object = strdup(options->object);
		if (!s->options.object)
			*result = aiouffd_fail_(-ENOMEM, "no memory");
	}
	if (*result) {
		aiouffd_drop_(s);
		return NULL;
	}
	return s;
}

static inline int aiouffd_stop_fd_(const struct aiouffd_state_ *s)
{
	return s->options.cancel_fd > 0 ? s->options.cancel_fd : -1;
}

static inline int aiouffd_no_answer_(int result)
{
	return aiouffd_fail_(result, result == -ETIMEDOUT ? "the server listens, and does not answer" :
							    "the server hung up without an answer (does it "
							    "serve this user? its log says more)");
}

/* The connection exists, the areas are known. */
static inline int aiouffd_begin_(struct aiouffd_state_ *s, struct aiouffd *memory)
{
	struct aiouffd_answer_ answer;
	int result = aiouffd_open_uffd_(s, &memory->user_mode_only);

	if (!result)
		result = aiouffd_register_areas_(s);
	if (!result)
		result = aiouffd_make_states_(s);
	if (!result)
		result = aiouffd_build_record_(s);
	if (!result) {
		s->poke = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		if (s->poke < 0)
			result = aiouffd_fail_(-errno, "no descriptor is free");
	}
	/* All that may fail comes before the server agrees: then it fills pages. */
	if (!result)
		result = aiouffd_start_keeper_(s, AIOUFFD_HOLD_);
	if (result)
		return result;
	result = aiouffd_present_(s, s->sock, &answer, aiouffd_stop_fd_(s),
				  aiouffd_until_(AIOUFFD_ATTACH_ANSWER_));
	if (result)
		return aiouffd_no_answer_(result);
	if (answer.status)
		return aiouffd_fail_(aiouffd_status_(answer.status), answer.text);
	/* The server that comes next must have this version of the object. */
	memcpy(s->record + 48, answer.tag, AIOUFFD_TAG_SIZE_);
	memory->object_size = answer.object_size;
	s->keeping = 1;
	/* Before the keeper begins: it may lose the server at once. */
	__atomic_store_n(&s->connected, 1, __ATOMIC_SEQ_CST);
	aiouffd_order_(s, AIOUFFD_KEEP_);
	return 0;
}

static inline int aiouffd_dial_first_(struct aiouffd_state_ *s)
{
	struct ucred server;
	socklen_t size = sizeof server;

	s->sock = aiouffd_dial_(&s->path);
	if (s->sock >= 0) {
		if (aiouffd_check_server_(s->sock, &s->options))
			return aiouffd_fail_(-EPERM, "the server is another user's, who may be anybody "
						     "(server_user)");
		if ((s->options.flags & AIOUFFD_OTHER_PROCESS) &&
		    !getsockopt(s->sock, SOL_SOCKET, SO_PEERCRED, &server, &size) &&
		    server.pid == getpid())
			return aiouffd_fail_(-EDEADLK, "the server is this process itself");
		return 0;
	}
	switch (-s->sock) {
	case ENOENT:
		return aiouffd_fail_(s->sock, "there is no such socket");
	case ECONNREFUSED:
		return aiouffd_fail_(s->sock, "nobody listens on the socket");
	default:
		return aiouffd_fail_(s->sock, "the server cannot be connected to");
	}
}

/* Whether another attempt may help. */
static inline int aiouffd_may_pass_(int result, int dialled)
{
	switch (-result) {
	case ENOENT:
	case EACCES:
		return !dialled; /* else it is what the server said */
	case ECONNREFUSED:
	case ECONNRESET:
	case EPIPE:
	case EAGAIN:
	case ETIMEDOUT:
		return 1;
	default:
		return 0;
	}
}

/* One attempt of attach. */
static inline int aiouffd_attach_once_(struct aiouffd_state_ *s, struct aiouffd *memory)
{
	int protection = PROT_READ, flags = MAP_PRIVATE | MAP_ANONYMOUS, result;
	uint64_t offset = s->options.offset, length = s->options.length;
	struct aiouffd_answer_ answer;
	void *address;

	result = aiouffd_ask_(s->sock, &s->options, &answer, aiouffd_stop_fd_(s),
			      aiouffd_until_(AIOUFFD_ATTACH_ANSWER_));
	if (result)
		return aiouffd_no_answer_(result);
	if (answer.status)
		return aiouffd_fail_(aiouffd_status_(answer.status), answer.text);
	memory->object_size = answer.object_size;
	memcpy(s->tag, answer.tag, sizeof s->tag);
	if (offset > answer.object_size || length > answer.object_size - offset)
		return aiouffd_fail_(-ERANGE, "the object is smaller than that");
	if (!length)
		length = answer.object_size - offset;
	memory->length = length;
	if (!length)
		return 0;
	s->page_size = (uint64_t)sysconf(_SC_PAGESIZE);
	if (s->options.flags & AIOUFFD_HUGETLB) {
		s->page_size = 2u << 20;
		flags |= MAP_HUGETLB | AIOUFFD_MAP_HUGE_2M_;
	} else {
		flags |= MAP_NORESERVE;
	}
	if (offset & (s->page_size - 1))
		return aiouffd_fail_(-EINVAL, "the offset is not a multiple of the page size");
	if (s->options.flags & AIOUFFD_WRITABLE)
		protection |= PROT_WRITE;
	s->mapped = (length + s->page_size - 1) & ~(s->page_size - 1);
	s->areas = (struct aiouffd_area *)calloc(1, sizeof *s->areas);
	if (!s->areas)
		return aiouffd_fail_(-ENOMEM, "no memory");
	address = mmap(NULL, s->mapped, PROT_NONE, flags, -1, 0);
	if (address == MAP_FAILED) {
		s->mapped = 0;
		return aiouffd_fail_(-errno, "the memory cannot be mapped");
	}
	s->ours = 1;
	/* After mlockall(MCL_FUTURE) it would come filled, with zeros that pass for bytes. */
	munlock(address, s->mapped);
	if (mprotect(address, s->mapped, protection)) {
		result = -errno;
		munmap(address, s->mapped);
		s->mapped = 0;
		s->ours = 0;
		return aiouffd_fail_(result, "the memory cannot be mapped");
	}
	s->count = 1;
	s->areas[0].address = address;
	s->areas[0].length = s->mapped;
	s->areas[0].offset = offset;
	s->areas[0].page_size = (uint32_t)s->page_size;
	memory->address = (uint8_t *)address;
	if (!(s->options.flags & AIOUFFD_FORK) && madvise(address, s->mapped, MADV_DONTFORK))
		return aiouffd_fail_(-errno, "the memory cannot be kept from forked children");
	return aiouffd_begin_(s, memory);
}

static inline int aiouffd_hand_over_once_(struct aiouffd_state_ *s, struct aiouffd *memory,
					  const struct aiouffd_area *areas, uint32_t count)
{
	uint32_t index;

	s->areas = (struct aiouffd_area *)calloc(count, sizeof *areas);
	if (!s->areas)
		return aiouffd_fail_(-ENOMEM, "no memory");
	s->count = count;
	for (index = 0; index < count; index++) {
		s->areas[index] = areas[index];
		if (!areas[index].page_size)
			s->areas[index].page_size = (uint32_t)sysconf(_SC_PAGESIZE);
	}
	s->page_size = s->areas[0].page_size;
	memory->address = (uint8_t *)s->areas[0].address;
	memory->length = s->areas[0].length;
	return aiouffd_begin_(s, memory);
}

static inline struct aiouffd *aiouffd_connect_(const char *path, const struct aiouffd_area *areas,
					       uint32_t count, const struct aiouffd_options *options)
{
	struct aiouffd *memory = (struct aiouffd *)calloc(1, sizeof *memory);
	uint64_t until = options && options->timeout_ms > 0 ? aiouffd_until_(options->timeout_ms) : 0;
	int forever = options && options->timeout_ms < 0, pause = 2, dialled, result;
	/* A queue that is full for a moment is no server that is not there. */
	uint64_t crowded = aiouffd_until_(AIOUFFD_FIRST_ANSWER_);
	struct aiouffd_state_ *s;

	if (!memory) {
		aiouffd_fail_(-ENOMEM, "no memory");
		errno = ENOMEM;
		return NULL;
	}
	for (;;) {
		s = aiouffd_new_state_(path, options, &result);
		if (!s)
			break;
		result = aiouffd_dial_first_(s);
		dialled = !result;
		if (!result && areas)
			result = aiouffd_hand_over_once_(s, memory, areas, count);
		else if (!result)
			result = aiouffd_attach_once_(s, memory);
		if (!result) {
			memory->state_ = s;
			if (!s->keeping) /* an empty object needs nobody to serve it */
				aiouffd_part_(s, AIOUFFD_LET_GO_);
			return memory;
		}
		aiouffd_drop_(s);
		memset(memory, 0, sizeof *memory);
		if (!aiouffd_may_pass_(result, dialled) ||
		    !(forever || (until && aiouffd_now_() < until) ||
		      (result == -EAGAIN && !dialled && aiouffd_now_() < crowded)))
			break;
		result = aiouffd_wait_(-1, 0,
				       options && options->cancel_fd > 0 ? options->cancel_fd : -1,
				       aiouffd_until_(pause));
		if (result != -ETIMEDOUT) {
			aiouffd_fail_(result, "it was given up");
			break;
		}
		if (pause < 256)
			pause *= 2;
	}
	free(memory);
	errno = -result;
	return NULL;
}

AIOUFFD_API struct aiouffd *aiouffd_attach(const char *path, const struct aiouffd_options *options)
{
	return aiouffd_connect_(path, NULL, 0, options);
}

AIOUFFD_API struct aiouffd *aiouffd_hand_over(const char *path, const struct aiouffd_area *areas,
					      uint32_t count, const struct aiouffd_options *options)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), size;
	uint32_t index;

	for (index = 0; index < count; index++) {
		size = areas[index].page_size ? areas[index].page_size : page;
		if ((size & (size - 1)) || size < page || !areas[index].length ||
		    ((uint64_t)(uintptr_t)areas[index].address | areas[index].length) & (size - 1) ||
		    size != (areas[0].page_size ? areas[0].page_size : page))
			break;
	}
	if (!count || count > AIOUFFD_AREAS_MAX_ || index < count) {
		aiouffd_fail_(-EINVAL, "1 to 4096 areas of whole pages of one size");
		errno = EINVAL;
		return NULL;
	}
	return aiouffd_connect_(path, areas, count, options);
}

AIOUFFD_API int aiouffd_query(const char *path, const struct aiouffd_options *options, uint64_t *size)
{
	struct aiouffd_answer_ answer;
	struct aiouffd_state_ *s;
	int result;

	s = aiouffd_new_state_(path, options, &result);
	if (!s)
		return result;
	result = aiouffd_dial_first_(s);
	if (!result) {
		result = aiouffd_ask_(s->sock, &s->options, &answer, aiouffd_stop_fd_(s),
				      aiouffd_until_(AIOUFFD_ATTACH_ANSWER_));
		if (result)
			aiouffd_no_answer_(result);
		else if (answer.status)
			result = aiouffd_fail_(aiouffd_status_(answer.status), answer.text);
		else
			*size = answer.object_size;
		close(s->sock);
		s->sock = -1;
	}
	aiouffd_drop_(s);
	return result;
}

static inline int aiouffd_discard_some_(struct aiouffd_state_ *s, uint64_t start, uint64_t length,
					uint8_t *before)
{
	void *address = (void *)(uintptr_t)start;
	uint64_t at, left, number;
	uint8_t *states;
	int result;

	/* Before, for a server that dies between hearing of it and noting it down; after, for one that
	 * has noted something else at the same time. */
	for (at = start, number = 0; at < start + length; at += s->page_size) {
		states = aiouffd_states_at_(s, at, &left);
		before[number++] = __atomic_fetch_or(states, AIOUFFD_REMOVED_, __ATOMIC_SEQ_CST);
	}
	result = madvise(address, length, AIOUFFD_DONTNEED_LOCKED_) ? -errno : 0;
	if (result == -EINVAL)
		result = madvise(address, length, MADV_DONTNEED) ? -errno : 0;
	for (at = start, number = 0; at < start + length; at += s->page_size) {
		states = aiouffd_states_at_(s, at, &left);
		if (!result || result == -ENOMEM)
			__atomic_fetch_or(states, AIOUFFD_REMOVED_, __ATOMIC_SEQ_CST);
		else if (!(before[number] & AIOUFFD_REMOVED_))
			__atomic_fetch_and(states, (uint8_t)~AIOUFFD_REMOVED_, __ATOMIC_SEQ_CST);
		number++;
	}
	return result;
}

AIOUFFD_API int aiouffd_discard(struct aiouffd *memory, void *address, uint64_t length)
{
	struct aiouffd_state_ *s = memory->state_;
	uint64_t start = (uint64_t)(uintptr_t)address, at, left, step;
	int result = 0, hole = 0;
	uint8_t before[512];

	if (!s->page_size || (start | length) & (s->page_size - 1))
		return aiouffd_fail_(-EINVAL, "only whole pages can be discarded");
	for (at = start; at < start + length; at += step) {
		if (!aiouffd_states_at_(s, at, &left))
			return aiouffd_fail_(-EINVAL, "that is not memory that is served");
		step = left * s->page_size;
	}
	for (at = start; at < start + length && !result; at += step) {
		step = start + length - at < sizeof before * s->page_size ? start + length - at :
									    sizeof before * s->page_size;
		result = aiouffd_discard_some_(s, at, step, before);
		if (result == -ENOMEM) { /* a hole, around which it is done */
			hole = result;
			result = 0;
		}
	}
	result = result ? result : hole;
	return result ? aiouffd_fail_(result, "the pages cannot be dropped") : 0;
}

AIOUFFD_API int aiouffd_connected(const struct aiouffd *memory)
{
	return (int)__atomic_load_n(&memory->state_->connected, __ATOMIC_SEQ_CST);
}

AIOUFFD_API uint64_t aiouffd_resumed(const struct aiouffd *memory)
{
	return __atomic_load_n(&memory->state_->resumed, __ATOMIC_SEQ_CST);
}

AIOUFFD_API int aiouffd_refuse(struct aiouffd *memory)
{
	struct aiouffd_state_ *s = memory->state_;

	if (!s->keeping)
		return 0;
	aiouffd_start_refusing_(s);
	return 0;
}

AIOUFFD_API int aiouffd_detach(struct aiouffd *memory)
{
	if (!memory)
		return 0;
	aiouffd_drop_(memory->state_);
	free(memory);
	return 0;
}

AIOUFFD_API void aiouffd_forked(struct aiouffd *memory)
{
	struct aiouffd_state_ *s = memory->state_;

	/* What a failed attempt may have left open is the keeper's, which is not here. */
	if (s->sock >= 0)
		close(s->sock);
	if (s->uffd >= 0)
		close(s->uffd);
	if (s->states_fd >= 0)
		close(s->states_fd);
	if (s->poke >= 0)
		close(s->poke);
	s->sock = s->uffd = s->states_fd = s->poke = -1;
	aiouffd_close_errors_(s);
}

#ifdef __cplusplus
}
#endif

#endif
