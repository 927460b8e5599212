#include "abi.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* What the kernel leaves in an out field, as bytes done. It starts at 0 because early failures do
 * not touch it, and holds a negated errno after later ones. */
static void store_done(int64_t *done, int64_t field)
{
	if (done)
		*done = field > 0 ? field : 0;
}

static int call(int fd, unsigned long request, void *argument)
{
	return ioctl(fd, request, argument) ? -errno : 0;
}

static int new_from_device(int device, int flags)
{
	int fd = ioctl(device, AU_USERFAULTFD_IOC_NEW, (unsigned long)flags);

	return fd < 0 ? -errno : fd;
}

int au_abi_open(int flags, int via, int device)
{
	int fd;

	flags |= O_CLOEXEC | O_NONBLOCK;
	switch (via) {
	case AU_VIA_SYSCALL:
		fd = (int)syscall(SYS_userfaultfd, flags);
		return fd < 0 ? -errno : fd;
	case AU_VIA_DEVICE:
		device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
		if (device < 0)
			return -errno;
		fd = new_from_device(device, flags);
		close(device);
		return fd;
	case AU_VIA_DEVICE_FD:
		return new_from_device(device, flags);
	default:
		return -EINVAL;
	}
}

int au_abi_api(int fd, uint64_t features, uint64_t *offered, uint64_t *ioctls)
{
	struct au_uffdio_api arg = { .api = AU_UFFD_API, .features = features };
	int rc = call(fd, AU_UFFDIO_API, &arg);

	if (offered)
		*offered = rc ? 0 : arg.features;
	if (ioctls)
		*ioctls = rc ? 0 : arg.ioctls;
	return rc;
}

int au_abi_register(int fd, uint64_t start, uint64_t len, uint64_t mode, uint64_t *ioctls)
{
	struct au_uffdio_register arg = { .range = { start, len }, .mode = mode };
	int rc = call(fd, AU_UFFDIO_REGISTER, &arg);

	if (ioctls)
		*ioctls = rc ? 0 : arg.ioctls;
	return rc;
}

int au_abi_unregister(int fd, uint64_t start, uint64_t len)
{
	struct au_uffdio_range arg = { start, len };

	return call(fd, AU_UFFDIO_UNREGISTER, &arg);
}

int au_abi_wake(int fd, uint64_t start, uint64_t len)
{
	struct au_uffdio_range arg = { start, len };

	return call(fd, AU_UFFDIO_WAKE, &arg);
}

int au_abi_copy(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode, int64_t *done)
{
	struct au_uffdio_copy arg = { .dst = dst, .src = src, .len = len, .mode = mode };
	int rc = call(fd, AU_UFFDIO_COPY, &arg);

	store_done(done, arg.copy);
	return rc;
}

int au_abi_zeropage(int fd, uint64_t start, uint64_t len, uint64_t mode, int64_t *done)
{
	struct au_uffdio_zeropage arg = { .range = { start, len }, .mode = mode };
	int rc = call(fd, AU_UFFDIO_ZEROPAGE, &arg);

	store_done(done, arg.zeropage);
	return rc;
}

int au_abi_continue(int fd, uint64_t start, uint64_t len, uint64_t mode, int64_t *done)
{
	struct au_uffdio_continue arg = { .range = { start, len }, .mode = mode };
	int rc = call(fd, AU_UFFDIO_CONTINUE, &arg);

	store_done(done, arg.mapped);
	return rc;
}

int au_abi_poison(int fd, uint64_t start, uint64_t len, uint64_t mode, int64_t *done)
{
	struct au_uffdio_poison arg = { .range = { start, len }, .mode = mode };
	int rc = call(fd, AU_UFFDIO_POISON, &arg);

	store_done(done, arg.updated);
	return rc;
}

int au_abi_move(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode, int64_t *done)
{
	struct au_uffdio_move arg = { .dst = dst, .src = src, .len = len, .mode = mode };
	int rc = call(fd, AU_UFFDIO_MOVE, &arg);

	store_done(done, arg.move);
	return rc;
}

int au_abi_writeprotect(int fd, uint64_t start, uint64_t len, uint64_t mode)
{
	struct au_uffdio_writeprotect arg = { .range = { start, len }, .mode = mode };

	return call(fd, AU_UFFDIO_WRITEPROTECT, &arg);
}

int au_abi_rwprotect(int fd, uint64_t start, uint64_t len, uint64_t mode)
{
	struct au_uffdio_rwprotect arg = { .range = { start, len }, .mode = mode };

	return call(fd, AU_UFFDIO_RWPROTECT, &arg);
}

/* ------------------------------------------------- resolving without regions */

int au_abi_apply(int fd, int op, uint64_t start, uint64_t src, uint64_t len, uint64_t mode,
		 int64_t *done)
{
	if (done)
		*done = 0;
	switch (op) {
	case AU_OP_COPY:
		return au_abi_copy(fd, start, src, len, mode, done);
	case AU_OP_ZERO:
		return au_abi_zeropage(fd, start, len, mode, done);
	case AU_OP_POISON:
		return au_abi_poison(fd, start, len, mode, done);
	case AU_OP_CONTINUE:
		return au_abi_continue(fd, start, len, mode, done);
	case AU_OP_MOVE:
		return au_abi_move(fd, start, src, len, mode, done);
	case AU_OP_WRITEPROTECT:
		return au_abi_writeprotect(fd, start, len, mode);
	case AU_OP_RWPROTECT:
		return au_abi_rwprotect(fd, start, len, mode);
	case AU_OP_WAKE:
		return au_abi_wake(fd, start, len);
	default:
		return -EINVAL;
	}
}

int au_abi_set_mode(int fd, uint64_t enable, uint64_t disable)
{
	struct au_uffdio_set_mode arg = { .enable = enable, .disable = disable };

	return call(fd, AU_UFFDIO_SET_MODE, &arg);
}

long au_abi_read(int fd, struct au_uffd_msg *msgs, int max)
{
	ssize_t got;

	if (max <= 0)
		return -EINVAL;
	do
		got = read(fd, msgs, (size_t)max * sizeof(*msgs));
	while (got < 0 && errno == EINTR);
	if (got < 0)
		return -errno;
	return got / (ssize_t)sizeof(*msgs);
}

long au_abi_pagemap_scan(int fd, struct au_pm_scan_arg *arg)
{
	int got;

	arg->size = sizeof(*arg);
	got = ioctl(fd, AU_PAGEMAP_SCAN, arg);
	return got < 0 ? -errno : got;
}
