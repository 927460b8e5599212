/* The ioctls of userfaultfd, one C function each, and nothing more.
 *
 * No allocation, no locks, no Python: any thread may call any of them, also the sentry, and with
 * every signal blocked. errno is not part of the interface and is left as it happened to be.
 *
 * Results: 0, or a negated errno. Functions that install pages also store in `*done` how many bytes
 * they completed, which is never negative and may be more than 0 with -EAGAIN: those bytes are in
 * place and their waiters woken (unless DONTWAKE), and the reason for stopping shows only when the
 * rest is tried. `done` may be NULL.
 */
#ifndef AU_ABI_H
#define AU_ABI_H

#include <stdint.h>

#include "uapi.h"

/* Ways to make a userfaultfd. */
enum au_abi_via {
	AU_VIA_SYSCALL = 0,   /* userfaultfd(2) */
	AU_VIA_DEVICE = 1,    /* open /dev/userfaultfd, AU_USERFAULTFD_IOC_NEW. 6.1 */
	AU_VIA_DEVICE_FD = 2, /* the same on `device`, a descriptor of it that somebody opened */
};

/* A new userfaultfd (>= 0), always O_CLOEXEC and O_NONBLOCK, or a negated errno. `flags` is
 * AU_USER_MODE_ONLY or 0. The handshake is still to be done. */
int au_abi_open(int flags, int via, int device);

/* The handshake: switches `features` on and stores what the kernel offers. It succeeds once per
 * descriptor; an unknown bit is -EINVAL and leaves the descriptor as it was. */
int au_abi_api(int fd, uint64_t features, uint64_t *offered, uint64_t *ioctls);

int au_abi_register(int fd, uint64_t start, uint64_t len, uint64_t mode, uint64_t *ioctls);
int au_abi_unregister(int fd, uint64_t start, uint64_t len);
int au_abi_wake(int fd, uint64_t start, uint64_t len);

int au_abi_copy(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode, int64_t *done);
int au_abi_zeropage(int fd, uint64_t start, uint64_t len, uint64_t mode, int64_t *done);
int au_abi_continue(int fd, uint64_t start, uint64_t len, uint64_t mode, int64_t *done);
int au_abi_poison(int fd, uint64_t start, uint64_t len, uint64_t mode, int64_t *done);
int au_abi_move(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode, int64_t *done);
int au_abi_writeprotect(int fd, uint64_t start, uint64_t len, uint64_t mode);
int au_abi_rwprotect(int fd, uint64_t start, uint64_t len, uint64_t mode); /* 7.3 */

/* What can be done to a range. */
enum au_op {
	AU_OP_COPY,
	AU_OP_ZERO,
	AU_OP_POISON,
	AU_OP_CONTINUE,
	AU_OP_MOVE,
	AU_OP_WRITEPROTECT,
	AU_OP_RWPROTECT,
	AU_OP_WAKE,
};
/* One of them. Bytes come from `src`, where the operation has any; those without a count of bytes
 * leave 0 in *done. */
int au_abi_apply(int fd, int op, uint64_t start, uint64_t src, uint64_t len, uint64_t mode,
		 int64_t *done);

/* Switches features on and off after the handshake: AU_FEATURE_RWP_ASYNC alone. 7.3 */
int au_abi_set_mode(int fd, uint64_t enable, uint64_t disable);

/* Reads up to `max` messages: how many (> 0), or a negated errno; -EAGAIN when there are none. */
long au_abi_read(int fd, struct au_uffd_msg *msgs, int max);

/* PAGEMAP_SCAN on a descriptor of /proc/PID/pagemap: how many regions were stored (>= 0), or a
 * negated errno. `arg->size` is set here; `arg->walk_end` tells where to continue. 6.7 */
long au_abi_pagemap_scan(int fd, struct au_pm_scan_arg *arg);

#endif
