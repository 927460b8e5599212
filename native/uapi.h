/* The userfaultfd ABI, complete to Linux 7.3, under the project's own names.
 *
 * Distributions ship old kernel headers (Debian 12's lacks POISON, MOVE, WP_ASYNC and the whole
 * of PAGEMAP_SCAN), and a program built there must still use what the running kernel offers. So
 * nothing here depends on <linux/userfaultfd.h>; uapi_check.c compares each value with it where it
 * has one.
 *
 * Bits and ioctls that no released kernel had by 7.3 are left out on purpose: they may change.
 *
 * The number in a comment is the first kernel with the feature.
 */
#ifndef AU_UAPI_H
#define AU_UAPI_H

#include <stddef.h>
#include <stdint.h>

/* ---- ioctl numbers: the kernel's _IOC, spelled out ---- */

#if defined(__mips__) || defined(__powerpc__) || defined(__sparc__) || defined(__alpha__)
#define AU_IOC_SIZE_BITS 13
#define AU_IOC_NONE 1u
#define AU_IOC_READ 2u
#define AU_IOC_WRITE 4u
#else
#define AU_IOC_SIZE_BITS 14
#define AU_IOC_NONE 0u
#define AU_IOC_WRITE 1u
#define AU_IOC_READ 2u
#endif

#define AU_IOC(direction, type, number, size) \
	(((direction) << (16 + AU_IOC_SIZE_BITS)) | ((unsigned)(size) << 16) | \
	 ((unsigned)(type) << 8) | (unsigned)(number))
#define AU_IO(type, number) AU_IOC(AU_IOC_NONE, type, number, 0)
#define AU_IOR(type, number, argument) AU_IOC(AU_IOC_READ, type, number, sizeof(argument))
#define AU_IOW(type, number, argument) AU_IOC(AU_IOC_WRITE, type, number, sizeof(argument))
#define AU_IOWR(type, number, argument) \
	AU_IOC(AU_IOC_READ | AU_IOC_WRITE, type, number, sizeof(argument))

/* ---- creation ---- */

/* Flag of userfaultfd(2) and of AU_USERFAULTFD_IOC_NEW, beside O_CLOEXEC and O_NONBLOCK. 5.11 */
#define AU_USER_MODE_ONLY 1

/* ioctl on /dev/userfaultfd; the argument is the flags themselves. 6.1 */
#define AU_USERFAULTFD_IOC_NEW AU_IO(0xAA, 0x00)

/* ---- the handshake ---- */

#define AU_UFFD_API UINT64_C(0xAA)

#define AU_FEATURE_PAGEFAULT_FLAG_WP (UINT64_C(1) << 0)    /* 5.7, probe only */
#define AU_FEATURE_EVENT_FORK (UINT64_C(1) << 1)           /* 4.11, needs CAP_SYS_PTRACE */
#define AU_FEATURE_EVENT_REMAP (UINT64_C(1) << 2)          /* 4.11 */
#define AU_FEATURE_EVENT_REMOVE (UINT64_C(1) << 3)         /* 4.11 */
#define AU_FEATURE_MISSING_HUGETLBFS (UINT64_C(1) << 4)    /* 4.11, probe only */
#define AU_FEATURE_MISSING_SHMEM (UINT64_C(1) << 5)        /* 4.11, probe only */
#define AU_FEATURE_EVENT_UNMAP (UINT64_C(1) << 6)          /* 4.11 */
#define AU_FEATURE_SIGBUS (UINT64_C(1) << 7)               /* 4.14 */
#define AU_FEATURE_THREAD_ID (UINT64_C(1) << 8)            /* 4.14 */
#define AU_FEATURE_MINOR_HUGETLBFS (UINT64_C(1) << 9)      /* 5.13, probe only */
#define AU_FEATURE_MINOR_SHMEM (UINT64_C(1) << 10)         /* 5.14, probe only */
#define AU_FEATURE_EXACT_ADDRESS (UINT64_C(1) << 11)       /* 5.18 */
#define AU_FEATURE_WP_HUGETLBFS_SHMEM (UINT64_C(1) << 12)  /* 5.19, probe only */
#define AU_FEATURE_WP_UNPOPULATED (UINT64_C(1) << 13)      /* 6.4 */
#define AU_FEATURE_POISON (UINT64_C(1) << 14)              /* 6.6, probe only */
#define AU_FEATURE_WP_ASYNC (UINT64_C(1) << 15)            /* 6.7, brings WP_UNPOPULATED */
#define AU_FEATURE_MOVE (UINT64_C(1) << 16)                /* 6.8, probe only */
#define AU_FEATURE_RWP (UINT64_C(1) << 17)                 /* 7.3 */
#define AU_FEATURE_RWP_ASYNC (UINT64_C(1) << 18)           /* 7.3, with RWP only */

struct au_uffdio_api {
	uint64_t api;      /* in: AU_UFFD_API */
	uint64_t features; /* in: wanted; out: all that the kernel has */
	uint64_t ioctls;   /* out */
};

/* ---- ioctls on the descriptor ---- */

/* The number of an ioctl is also its bit in the `ioctls` masks. */
#define AU_UFFDIO_NR_REGISTER 0x00
#define AU_UFFDIO_NR_UNREGISTER 0x01
#define AU_UFFDIO_NR_WAKE 0x02
#define AU_UFFDIO_NR_COPY 0x03
#define AU_UFFDIO_NR_ZEROPAGE 0x04
#define AU_UFFDIO_NR_MOVE 0x05
#define AU_UFFDIO_NR_WRITEPROTECT 0x06
#define AU_UFFDIO_NR_CONTINUE 0x07
#define AU_UFFDIO_NR_POISON 0x08
#define AU_UFFDIO_NR_RWPROTECT 0x09
#define AU_UFFDIO_NR_SET_MODE 0x0A
#define AU_UFFDIO_NR_API 0x3F

struct au_uffdio_range {
	uint64_t start;
	uint64_t len;
};

#define AU_REGISTER_MODE_MISSING (UINT64_C(1) << 0) /* 4.3 */
#define AU_REGISTER_MODE_WP (UINT64_C(1) << 1)      /* 5.7 */
#define AU_REGISTER_MODE_MINOR (UINT64_C(1) << 2)   /* 5.13 */
#define AU_REGISTER_MODE_RWP (UINT64_C(1) << 3)     /* 7.3, not together with WP */

struct au_uffdio_register {
	struct au_uffdio_range range;
	uint64_t mode;
	uint64_t ioctls; /* out */
};

#define AU_COPY_MODE_DONTWAKE (UINT64_C(1) << 0)
#define AU_COPY_MODE_WP (UINT64_C(1) << 1) /* 5.7 */

struct au_uffdio_copy {
	uint64_t dst;
	uint64_t src;
	uint64_t len;
	uint64_t mode;
	int64_t copy; /* out: bytes, or a negated errno */
};

#define AU_ZEROPAGE_MODE_DONTWAKE (UINT64_C(1) << 0)

struct au_uffdio_zeropage {
	struct au_uffdio_range range;
	uint64_t mode;
	int64_t zeropage; /* out: bytes, or a negated errno */
};

#define AU_MOVE_MODE_DONTWAKE (UINT64_C(1) << 0)
#define AU_MOVE_MODE_ALLOW_SRC_HOLES (UINT64_C(1) << 1)

struct au_uffdio_move { /* 6.8 */
	uint64_t dst;
	uint64_t src;
	uint64_t len;
	uint64_t mode;
	int64_t move; /* out: bytes, or a negated errno */
};

/* Here, and only here, DONTWAKE is bit 1; both bits together are EINVAL. */
#define AU_WRITEPROTECT_MODE_WP (UINT64_C(1) << 0)
#define AU_WRITEPROTECT_MODE_DONTWAKE (UINT64_C(1) << 1)

struct au_uffdio_writeprotect { /* 5.7 */
	struct au_uffdio_range range;
	uint64_t mode;
};

#define AU_CONTINUE_MODE_DONTWAKE (UINT64_C(1) << 0)
#define AU_CONTINUE_MODE_WP (UINT64_C(1) << 1) /* 6.4 */

struct au_uffdio_continue { /* 5.13 */
	struct au_uffdio_range range;
	uint64_t mode;
	int64_t mapped; /* out: bytes, or a negated errno */
};

#define AU_POISON_MODE_DONTWAKE (UINT64_C(1) << 0)

struct au_uffdio_poison { /* 6.6 */
	struct au_uffdio_range range;
	uint64_t mode;
	int64_t updated; /* out: bytes, or a negated errno */
};

/* As WRITEPROTECT, DONTWAKE included. */
#define AU_RWPROTECT_MODE_RWP (UINT64_C(1) << 0)
#define AU_RWPROTECT_MODE_DONTWAKE (UINT64_C(1) << 1)

struct au_uffdio_rwprotect { /* 7.3 */
	struct au_uffdio_range range;
	uint64_t mode;
};

struct au_uffdio_set_mode { /* 7.3; of AU_FEATURE_*: RWP_ASYNC alone */
	uint64_t enable;
	uint64_t disable;
};

/* UNREGISTER and WAKE should have been _IOW; the mistake is part of the ABI. */
#define AU_UFFDIO_API AU_IOWR(0xAA, AU_UFFDIO_NR_API, struct au_uffdio_api)
#define AU_UFFDIO_REGISTER AU_IOWR(0xAA, AU_UFFDIO_NR_REGISTER, struct au_uffdio_register)
#define AU_UFFDIO_UNREGISTER AU_IOR(0xAA, AU_UFFDIO_NR_UNREGISTER, struct au_uffdio_range)
#define AU_UFFDIO_WAKE AU_IOR(0xAA, AU_UFFDIO_NR_WAKE, struct au_uffdio_range)
#define AU_UFFDIO_COPY AU_IOWR(0xAA, AU_UFFDIO_NR_COPY, struct au_uffdio_copy)
#define AU_UFFDIO_ZEROPAGE AU_IOWR(0xAA, AU_UFFDIO_NR_ZEROPAGE, struct au_uffdio_zeropage)
#define AU_UFFDIO_MOVE AU_IOWR(0xAA, AU_UFFDIO_NR_MOVE, struct au_uffdio_move)
#define AU_UFFDIO_WRITEPROTECT \
	AU_IOWR(0xAA, AU_UFFDIO_NR_WRITEPROTECT, struct au_uffdio_writeprotect)
#define AU_UFFDIO_CONTINUE AU_IOWR(0xAA, AU_UFFDIO_NR_CONTINUE, struct au_uffdio_continue)
#define AU_UFFDIO_POISON AU_IOWR(0xAA, AU_UFFDIO_NR_POISON, struct au_uffdio_poison)
#define AU_UFFDIO_RWPROTECT AU_IOWR(0xAA, AU_UFFDIO_NR_RWPROTECT, struct au_uffdio_rwprotect)
#define AU_UFFDIO_SET_MODE AU_IOW(0xAA, AU_UFFDIO_NR_SET_MODE, struct au_uffdio_set_mode)

/* ---- messages ---- */

#define AU_EVENT_PAGEFAULT 0x12
#define AU_EVENT_FORK 0x13
#define AU_EVENT_REMAP 0x14
#define AU_EVENT_REMOVE 0x15
#define AU_EVENT_UNMAP 0x16

#define AU_PAGEFAULT_FLAG_WRITE (UINT64_C(1) << 0)
#define AU_PAGEFAULT_FLAG_WP (UINT64_C(1) << 1)
#define AU_PAGEFAULT_FLAG_MINOR (UINT64_C(1) << 2)
#define AU_PAGEFAULT_FLAG_RWP (UINT64_C(1) << 3) /* 7.3 */

/* The kernel's is packed; every field is naturally aligned, so this one need not be. */
struct au_uffd_msg {
	uint8_t event;
	uint8_t reserved1;
	uint16_t reserved2;
	uint32_t reserved3;
	union {
		struct {
			uint64_t flags;
			uint64_t address;
			uint32_t ptid; /* with AU_FEATURE_THREAD_ID; a hint, see docs */
		} pagefault;
		struct {
			uint32_t ufd; /* a new descriptor of the reader */
		} fork;
		struct {
			uint64_t from;
			uint64_t to;
			uint64_t len; /* the old length */
		} remap;
		struct {
			uint64_t start;
			uint64_t end;
		} remove; /* and unmap */
		struct {
			uint64_t reserved1;
			uint64_t reserved2;
			uint64_t reserved3;
		} reserved;
	} arg;
};

/* ---- PAGEMAP_SCAN: an ioctl on /proc/PID/pagemap. 6.7 ---- */

#define AU_PAGE_IS_WPALLOWED (UINT64_C(1) << 0)
#define AU_PAGE_IS_WRITTEN (UINT64_C(1) << 1)
#define AU_PAGE_IS_FILE (UINT64_C(1) << 2)
#define AU_PAGE_IS_PRESENT (UINT64_C(1) << 3)
#define AU_PAGE_IS_SWAPPED (UINT64_C(1) << 4)
#define AU_PAGE_IS_PFNZERO (UINT64_C(1) << 5)
#define AU_PAGE_IS_HUGE (UINT64_C(1) << 6)
#define AU_PAGE_IS_SOFT_DIRTY (UINT64_C(1) << 7) /* 6.8 */
#define AU_PAGE_IS_GUARD (UINT64_C(1) << 8)      /* 6.15 */
#define AU_PAGE_IS_ACCESSED (UINT64_C(1) << 9)   /* 7.3 */

#define AU_PM_SCAN_WP_MATCHING (UINT64_C(1) << 0)
#define AU_PM_SCAN_CHECK_WPASYNC (UINT64_C(1) << 1)

struct au_page_region {
	uint64_t start;
	uint64_t end;
	uint64_t categories;
};

struct au_pm_scan_arg {
	uint64_t size; /* of this structure */
	uint64_t flags;
	uint64_t start;
	uint64_t end;
	uint64_t walk_end; /* out: where the walk stopped */
	uint64_t vec;      /* address of struct au_page_region[vec_len], or 0 */
	uint64_t vec_len;
	uint64_t max_pages; /* 0: no limit */
	uint64_t category_inverted;
	uint64_t category_mask;
	uint64_t category_anyof_mask;
	uint64_t return_mask;
};

#define AU_PAGEMAP_SCAN AU_IOWR('f', 16, struct au_pm_scan_arg)

_Static_assert(sizeof(struct au_uffdio_api) == 24, "uffdio_api");
_Static_assert(sizeof(struct au_uffdio_range) == 16, "uffdio_range");
_Static_assert(sizeof(struct au_uffdio_register) == 32, "uffdio_register");
_Static_assert(sizeof(struct au_uffdio_copy) == 40, "uffdio_copy");
_Static_assert(sizeof(struct au_uffdio_zeropage) == 32, "uffdio_zeropage");
_Static_assert(sizeof(struct au_uffdio_move) == 40, "uffdio_move");
_Static_assert(sizeof(struct au_uffdio_writeprotect) == 24, "uffdio_writeprotect");
_Static_assert(sizeof(struct au_uffdio_continue) == 32, "uffdio_continue");
_Static_assert(sizeof(struct au_uffdio_poison) == 32, "uffdio_poison");
_Static_assert(sizeof(struct au_uffdio_rwprotect) == 24, "uffdio_rwprotect");
_Static_assert(sizeof(struct au_uffdio_set_mode) == 16, "uffdio_set_mode");
_Static_assert(sizeof(struct au_uffd_msg) == 32, "uffd_msg");
_Static_assert(offsetof(struct au_uffd_msg, arg) == 8, "uffd_msg.arg");
_Static_assert(sizeof(struct au_page_region) == 24, "page_region");
_Static_assert(sizeof(struct au_pm_scan_arg) == 96, "pm_scan_arg");

#endif
